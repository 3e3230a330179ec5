"""Ctrl-C during a run that is part of a program."""

from __future__ import annotations

import signal
import threading

import pytest

from lorasb_ds.system.signals import InterruptRequest


def test_the_first_one_asks_and_the_second_one_interrupts() -> None:
    stop, before = InterruptRequest(), signal.getsignal(signal.SIGINT)
    with stop.listening():
        stop.can_save()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_before_there_is_something_to_save_interrupts() -> None:
    stop = InterruptRequest()
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not stop.requested


def test_other_threads_do_not_listen() -> None:
    found = []

    def listen() -> None:
        with InterruptRequest().listening():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
