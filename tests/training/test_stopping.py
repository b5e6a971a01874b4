import os
import signal

import pytest

from qlatrain.training.stopping import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_does_not_end(number):
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested


def test_the_second_ctrl_c_ends_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_ctrl_c_after_sigterm_ends_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may ask twice
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_given_back(fails):
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    try:
        with StopRequest():
            assert [signal.getsignal(number) for number in StopRequest.SIGNALS] != before
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
