"""Warnings of many calls, each said once."""

import logging
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def warnings_once(*, by_code: bool = False) -> Generator[None, None, None]:
    """Says a warning of the pipeline once, and not again in every call inside.

    Args:
        by_code: Whether those that differ only in what they name count as one, such as prompts that were cut.
    """
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        said = getattr(record, "code", None) if by_code else None
        said = said or record.getMessage()
        is_first = said not in seen
        seen.add(said)
        return is_first

    logger = logging.getLogger("foveate")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
