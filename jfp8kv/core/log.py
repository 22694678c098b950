"""The library's logger. Silent by default apart from warnings.

    logging.getLogger("jfp8kv").setLevel(logging.INFO)
"""

import logging

logger = logging.getLogger("jfp8kv")
