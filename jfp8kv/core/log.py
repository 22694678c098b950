"""The logger of the library. Silent by default apart from warnings.

logging.getLogger("jfp8kv").setLevel(logging.INFO)
"""

import functools
import logging

logger = logging.getLogger("jfp8kv")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time that this process has this message."""
    logger.warning(message)
