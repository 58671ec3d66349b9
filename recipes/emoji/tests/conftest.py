"""The toys of the library's own tests."""

from tests.conftest import toy_folder, toy_pipe

__all__ = ["toy_folder", "toy_pipe"]
