"""A stop signal is a flag, a second Ctrl-C is not; former handlers come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tunesmith.engine.signals import StopSignals


@pytest.fixture(autouse=True)
def ordinary_handlers():
    """Handlers as in a foreground process: a suite started in the background has some of them ignored."""
    ordinary = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
    ordinary[signal.SIGINT] = signal.default_int_handler
    former = {number: signal.signal(number, handler) for number, handler in ordinary.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGUSR1, 143)],
)
def test_a_signal_sets_the_flag_and_the_handler_comes_back(number, code):
    former, said = signal.getsignal(number), []
    with StopSignals(said.append) as stop:
        assert not stop.requested and stop.exit_code == 0 and stop.name == ""
        os.kill(os.getpid(), number)
        assert stop.requested and stop.exit_code == code and stop.name == number.name
    assert signal.getsignal(number) == former
    assert len(said) == 1 and number.name in said[0]


def test_a_second_interrupt_raises_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_many_sigterms_stay_one_request_and_the_first_signal_decides():
    with StopSignals() as stop:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 143


def test_an_ignored_signal_stays_ignored_as_under_nohup():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, signal.SIG_DFL)]
