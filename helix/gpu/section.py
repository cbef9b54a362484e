"""What a section of `helix bench gpu` is given, and what it hands back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from helix.bench import Conditions, NotRunError, Row, Table, Target, Timing, brief
from helix.models.scan import scan_backend
from helix.out_of_memory import is_out_of_memory

#: What all samples of one contestant may take together, so that a section ends in minutes.
BUDGET_S = 4.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Work that was timed: `seconds` for so many floating-point operations and for bytes that surely had to be moved.

    `unit` is what multiplies: "fp32", "tf32" or "bf16" of the matrix products, "fp32" too for work outside of them.
    """

    name: str
    seconds: float
    flops: float
    moved_bytes: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """The figures of one section; `loads` are what the roofline sets beside the limits. `failed`: what of it ended in
    an error that is no figure."""

    tables: tuple[Table, ...] = ()
    targets: tuple[Target, ...] = ()
    loads: tuple[Load, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The device, how to measure on it, and when to leave out what is left; `option` gives the section more."""

    device: torch.device
    how: Conditions
    seconds: float
    option: str = "section_s"
    clock: Callable[[], float] = time.perf_counter
    until: float = field(default=0.0)

    @classmethod
    def begin(cls, device: torch.device, how: Conditions, seconds: float, option: str = "section_s") -> "Stage":
        """A section that may take so many seconds from now."""
        bounded = replace(how, budget_s=min(how.budget_s, BUDGET_S))
        until = time.perf_counter() + seconds
        return cls(device=device, how=bounded, seconds=seconds, option=option, until=until)

    @property
    def left_s(self) -> float:
        return max(0.0, self.until - self.clock())

    def require_time(self) -> None:
        """NotRunError once the time of the section is spent."""
        if not self.left_s:
            raise NotRunError(f"the {self.seconds:g} s of this section were spent; {self.option}=... gives it more")


def lost(what: str, error: Exception) -> Part:
    """What stands where something failed that the rest does not need: a row with the error."""
    row = Row(name="failed", values=(), note=why(error))
    return Part(tables=(Table(title=what, columns=(), rows=(row,)),), failed=(what,))


def why(error: Exception) -> str:
    """A note for a row: running out of memory is a finding, in three words."""
    return "out of memory" if is_out_of_memory(error) else brief(error)


def scan_named(device: torch.device) -> str:
    """Which scan the models of ours have there, for a title: no figure says anything without it."""
    return f"scan by {scan_backend(device, torch.float32)}"


#: The columns of `device_row` before that of what each costs.
COLUMNS = ("device ms", "wall ms", "times ours")


def device_row(name: str, result: Timing | Exception, ours: Timing | Exception | None, *, each_s: float) -> Row:
    """Device ms, wall ms, the ratio of its time on the wall to that of `ours`, and what each unit costs of that."""
    if isinstance(result, Exception):
        return Row(name=name, values=(None,) * 4, note=why(result))
    ratio = result.wall_s / ours.wall_s if isinstance(ours, Timing) else None
    note = f"median of {result.runs}" if result.runs > 1 else "one run"
    return Row(name=name, values=(1e3 * result.cpu_s, 1e3 * result.wall_s, ratio, result.wall_s / each_s), note=note)


def wall_ratio(slow: Timing | Exception | None, fast: Timing | Exception | None) -> float | None:
    """How many times as long on the wall; None where one of them has no time."""
    return slow.wall_s / fast.wall_s if isinstance(slow, Timing) and isinstance(fast, Timing) else None
