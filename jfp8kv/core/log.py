"""The logger of the library. By default it shows warnings only.

logging.basicConfig()
logging.getLogger("jfp8kv").setLevel(logging.INFO)
"""

import functools
import logging

logger = logging.getLogger("jfp8kv")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per message and process."""
    logger.warning(message)
