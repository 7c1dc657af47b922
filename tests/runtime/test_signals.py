from __future__ import annotations

import signal
import threading

import pytest

from holdfast.cli import main
from holdfast.runtime.signals import Terminated, sigterm_kept, sigterm_raises


@pytest.fixture(autouse=True)
def _default():
    """However the tests were started."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def stops():
    signal.raise_signal(signal.SIGTERM)
    pytest.fail("went on")


def goes_on():
    signal.raise_signal(signal.SIGTERM)
    return 0


@pytest.mark.parametrize(("number", "code", "says"), [("SIGTERM", 143, "Terminated"), ("SIGINT", 130, "Interrupted")])
def test_a_command_ends_with_the_code_and_says_how_to_continue(number, code, says, monkeypatch, capsys):
    monkeypatch.setattr("holdfast.runtime.documents.recipe_names", lambda: signal.raise_signal(getattr(signal, number)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended:
        main.main(["recipes"])
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == code
    assert capsys.readouterr().err == (
        f"holdfast: {says}. Finished results are kept; the same command continues from there.\n"
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_catches_ctrl_c_catches_it():
    with pytest.raises(KeyboardInterrupt), sigterm_raises():
        stops()


def test_an_ignored_sigterm_stays_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_raises():
        assert goes_on() == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_callers_own_handler_stays():
    seen = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with sigterm_raises():
        goes_on()
    assert seen == [signal.SIGTERM]


def test_one_of_several_processes_keeps_the_default(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with sigterm_raises():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_another_thread_nothing_is_set():
    seen = []

    def work():
        with sigterm_raises(), sigterm_kept():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_librarys_handler_does_not_outlast_its_start():
    with sigterm_raises():
        with sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(Terminated):
            stops()
