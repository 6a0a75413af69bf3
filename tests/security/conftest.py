"""The working folder of the command line's tests."""

from tests.cli.conftest import bases, run, work, write  # noqa: F401
