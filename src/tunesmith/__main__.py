"""`python -m tunesmith` is the command `tunesmith`."""

from __future__ import annotations

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
STEADY = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""What keeps glibc's heap in one piece: small blocks freed between two tensors join them again instead of being set
aside, so that a step finds the room of the step before (docs/log.md). It is read when a process starts, never later."""


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
