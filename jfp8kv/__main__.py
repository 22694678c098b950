"""`python -m jfp8kv` runs the command line."""

import sys

from jfp8kv.cli import main

if __name__ == "__main__":
    sys.exit(main())
