"""Warnings of many calls, each said once."""

import logging
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def warnings_once() -> Generator[None, None, None]:
    """Says a warning of the pipeline once, and not again in every call inside."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_first = message not in seen
        seen.add(message)
        return is_first

    logger = logging.getLogger("foveate")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
