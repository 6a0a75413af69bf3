"""`python -m tunesmith` is the command `tunesmith`."""

from __future__ import annotations

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
STEADY = (
    "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    ":glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1099511627776"
)
"""What keeps glibc's heap in one piece, and keeps it: small blocks freed between two tensors join them again instead
of being set aside, so that a step finds the room of the step before; and what a step has freed is not given back to
the system to be asked for again, page by page, by the next (docs/log.md). It is read when a process starts, never
later."""


def main() -> int:
    """The command, in a process whose heap does not fall to pieces; a user's own `GLIBC_TUNABLES` stands."""
    if TUNABLES not in os.environ and has_glibc():
        os.environ[TUNABLES] = STEADY
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from tunesmith.cli import main as command  # after the process has become the one that stays

    return command()


def has_glibc() -> bool:
    """True where C's library is GNU's."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
