"""A notice asks for one checkpoint, wherever it comes from."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from orchestration.notices import Notices, sigterm_notice

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_notice_is_told_once_and_a_new_one_again():
    said, clock = [None], Clock()
    notices = Notices([lambda: said[0]], ask_s=1, clock=clock)
    told = []
    for second, value in enumerate([None, "at 12:00", "at 12:00", None, "at 13:00", "at 14:00"]):
        clock.now, said[0] = float(second), value
        told.append(notices())
    assert told == [False, True, False, False, True, True]


def test_a_source_is_asked_no_more_often_than_it_may_cost():
    asked, clock = [], Clock()
    notices = Notices([lambda: asked.append(1)], ask_s=0.5, clock=clock)
    for step in range(1000):
        clock.now = step / 1000
        notices()
    assert len(asked) == 2


def test_several_sources_are_one_question():
    said: list[str | None] = [None, "SIGTERM"]
    clock = Clock()
    notices = Notices([lambda: said[0], lambda: said[1]], ask_s=0, clock=clock)
    assert [notices(), notices()] == [True, False]
    said[0] = "node is drained"
    assert [notices(), notices()] == [True, False]


def test_the_first_sigterm_is_a_notice():
    before = signal.getsignal(signal.SIGTERM)
    try:
        source = sigterm_notice()
        assert source() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert source() == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the next one ends the process"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_ends_the_process():
    code = (
        "import os, signal; from orchestration.notices import sigterm_notice; sigterm_notice();"
        "os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True); os.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGTERM and ended.stdout.strip() == "alive"


def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    sources = []
    thread = threading.Thread(target=lambda: sources.append(sigterm_notice()))
    thread.start()
    thread.join()
    assert sources[0]() is None and signal.getsignal(signal.SIGTERM) == before
