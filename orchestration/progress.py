"""How far a preparation or a download is: a bar on a terminal, a line now and then where there is none."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

#: How often a line is printed where no bar can be drawn.
LINE_EVERY_S = 10.0
MB = 1e6


class ProgressDisplay:
    """Shows stages one after the other. `watch` hears of a preparation, `on_bytes` of a download."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._stage: str | None = None
        self._task = self._bar.add_task("", visible=False, count="")
        self._began = self._printed = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._console.is_terminal:
            self._bar.stop()

    def watch(self, what: str, done: int, total: int, done_bytes: int, total_bytes: int) -> None:
        """`done` of `total` recordings or files, of so many bytes; 0 in all where that is not known."""
        unit = "files" if what.startswith("checking") else "recordings"
        size = f", {done_bytes / MB:.0f} of {total_bytes / MB:.0f} MB" if total_bytes else f", {done_bytes / MB:.0f} MB"
        self._show(what, done, total, f"{done} of {total} {unit}{size if done_bytes or total_bytes else ''}")

    def on_bytes(self, name: str, done: int, total: int | None) -> None:
        """`done` bytes of `total` of one file."""
        size = f"{done / MB:.1f} MB" if total is None else f"{done / MB:.1f} of {total / MB:.1f} MB"
        self._show(f"downloading {name}", done, total, size)

    def _show(self, stage: str, done: int, total: int | None, count: str) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._printed = stage, now, now
            self._bar.reset(self._task, description=stage, total=total, visible=True, count=count)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total, count=count)
            return
        finished = total is not None and done >= total
        if finished or now - self._printed >= LINE_EVERY_S:
            self._printed = now
            left_s = (now - self._began) * (total - done) / done if total and done else 0.0
            self._console.print(f"{stage}: {count}" + (f", about {left_s:.0f} s left" if left_s >= 1 else ""))
