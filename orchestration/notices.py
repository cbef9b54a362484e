"""Notices that this machine will be taken away, from wherever they come, as one question: save now?

Ray's own (a drained node, which the daemon in cluster/ asks for when the cloud says so), and SIGTERM. A notice asks for
one checkpoint at the next step; training goes on, since the machine may live longer than it was said, or be spared.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

logger = logging.getLogger(__name__)

#: Sources are asked this often at most: one asks Ray, in a barrier over the ranks that takes some milliseconds.
ASK_S = 0.5


class Notices:
    """Called at every step: True once for each notice. A source returns None, or what it was told."""

    def __init__(
        self, sources: Sequence[Callable[[], Any]], *, ask_s: float = ASK_S, clock: Callable[[], float] = time.monotonic
    ):
        self.sources, self.ask_s, self.clock = sources, ask_s, clock
        self._asked = -ask_s
        self._told: list[str | None] = [None] * len(sources)

    def __call__(self) -> bool:
        now = self.clock()
        if now - self._asked < self.ask_s:
            return False
        self._asked = now
        new = False
        for number, source in enumerate(self.sources):
            said = source()
            text = None if said is None else repr(said)
            if text is not None and text != self._told[number]:
                logger.warning("notice that this machine goes away (%s): a checkpoint is made at this step", text)
                new = True
            self._told[number] = text
        return new


def sigterm_notice() -> Callable[[], str | None]:
    """A source that tells of SIGTERM. The first one is taken as a notice; a second one ends the process as ever.

    Python takes signals in the main thread only. A Ray worker trains in another one and leaves its signals to Ray,
    which tells of a node that is terminated by itself.
    """
    received: list[str] = []
    if threading.current_thread() is threading.main_thread():

        def receive(*_: Any) -> None:
            received.append("SIGTERM")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        signal.signal(signal.SIGTERM, receive)
    return lambda: received[-1] if received else None
