"""Asked to stop: finish the step, save, leave. A second Ctrl-C leaves at once; the last checkpoint is intact."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class StopSignals:
    """Context manager: SIGINT, SIGTERM, SIGHUP and SIGUSR1 set `requested` instead of ending the process.

    A signal that was ignored on entry stays ignored (`nohup`, background jobs). A second SIGINT raises
    `KeyboardInterrupt` wherever the program is. Outside the main thread nothing is installed and `requested`
    stays False, since Python only delivers signals there. The former handlers are back on exit.
    """

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._notify = notify
        self._former: dict[signal.Signals, Any] = {}
        self._num_interrupts = 0

    @property
    def requested(self) -> bool:
        """True once a signal asked to stop after this step."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """130 when Ctrl-C (SIGINT) asked first, 143 for the others, 0 when nothing asked."""
        if self.received is None:
            return 0
        return 130 if self.received == signal.SIGINT else 143

    @property
    def name(self) -> str:
        """The signal that asked first, as in "SIGTERM"; empty when none did."""
        return "" if self.received is None else self.received.name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, former in self._former.items():
            # None: the handler was installed from C; Python cannot give it back.
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                raise KeyboardInterrupt
        first = self.received is None
        self.received = self.received or received
        if first and self._notify is not None:
            self._notify(f"{received.name}: stopping after this step (Ctrl-C once more to stop at once)")
