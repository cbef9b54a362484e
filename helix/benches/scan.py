"""The selective scan beside scans by others: time, peak memory and error, forward and with all gradients.

Targets are those of the paper's shape, E 512 and N 32, on one thread. Legend: B batch, L tokens, E channels, N state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.bench import (
    TIMING_COLUMNS,
    Conditions,
    NotRunError,
    Outcome,
    Row,
    Table,
    Target,
    Timing,
    brief,
    process_clocks,
    race,
    ratio_of,
    require_positive,
    timing_row,
)
from helix.models.agreement import (
    SCAN_BOUNDS,
    SCAN_NAMES,
    SEQUENTIAL_TOKENS,
    by_backend,
    compile_kernels,
    exact_scan,
    relative_errors,
    run,
    scan_inputs,
    scanned,
)
from helix.models.scan import scan_backend
from helix.peers import MissingPeerError, Peer, peers
from helix.process import forget_peak, held_bytes, in_own_process, peak_bytes
from helix.registry import BENCHES

MODES = ("forward", "forward+backward")

#: (mode, L, the slower, the faster, at least so many times). Where numba cannot be used its rows are "not measured".
RATIO_TARGETS = (
    ("forward", 500, "mamba-ssm selective_scan_ref", "numba", 20.0),
    ("forward+backward", 500, "mambapy pscan", "numba", 20.0),
    ("forward+backward", 3000, "mambapy pscan", "numba", 45.0),
    ("forward+backward", 3000, "mambapy pscan", "reference", 5.0),
)
MEMORY_TARGET_MIB, MEMORY_TOKENS = 550.0, 30_000
STRETCH_PS = 500.0


@BENCHES.register("scan")
@dataclass(frozen=True, kw_only=True)
class ScanBench:
    """`tokens` are the lengths that are timed; memory is measured at `memory_tokens`, errors at `error_tokens` with so
    many channels. `mamba_ssm`: the folder of its source, unpacked or as downloaded, where it is not installed."""

    batch: int = 1
    channels: int = 512
    state: int = 32
    tokens: tuple[int, ...] = (500, 3000, 30_000)
    memory_tokens: tuple[int, ...] = (3000, 30_000)
    error_tokens: tuple[int, ...] = (517, 30_000)
    error_channels: int = 64
    mamba_ssm: str = ""

    def __post_init__(self) -> None:
        require_positive(self)

    def run(self, how: Conditions) -> Outcome:
        compile_kernels()
        scans, missing = self._scans()
        timings = {(mode, n): self._race(mode, n, scans, how) for n in self.tokens for mode in MODES}
        tables = [self._times(mode, n, found, missing) for (mode, n), found in timings.items()]
        memory = {(name, n): self._peak(name, n, how) for n in self.memory_tokens for name in self._ours()}
        errors = {n: self._errors(n, scans, how) for n in self.error_tokens}
        tables += [_memory_table(memory), _error_table(errors)]
        return Outcome(tables=tuple(tables), targets=tuple(self._targets(timings, memory, errors)))

    def _ours(self) -> list[str]:
        """The backends that can be used here, the fastest first."""
        best = scan_backend(torch.device("cpu"), torch.float32)
        return list(dict.fromkeys([best, "reference"]))

    def _scans(self) -> tuple[dict[str, tuple[Callable[..., Tensor], Peer | None]], list[Row]]:
        """Each scan that can be had, with its limits where it is a peer; and a row for each that cannot."""
        found: dict[str, tuple[Callable[..., Tensor], Peer | None]] = {
            name: (by_backend(name), None) for name in self._ours()
        }
        missing = []
        for peer in peers(self.mamba_ssm):
            try:
                found[peer.name] = (peer.load(), peer)
            except MissingPeerError as error:
                missing.append(Row(name=peer.name, values=(), note=f"not here: {error}"))
        return found, missing

    def _race(self, mode: str, tokens: int, scans: Mapping, how: Conditions) -> dict[str, Timing | Exception]:
        inputs = scan_inputs(self.batch, tokens, self.channels, self.state)
        contestants, refused = {}, {}
        for name, (scan, peer) in scans.items():
            if peer is not None and tokens > (peer.forward_tokens if mode == "forward" else peer.training_tokens):
                refused[name] = NotRunError(peer.limit)
            else:
                contestants[name] = _work(mode, scan, inputs)
        how.say(f"{mode}, L={tokens}")
        timed = race(contestants, how, clocks=process_clocks)
        return {name: refused.get(name) or timed[name] for name in scans}

    def _times(self, mode: str, tokens: int, found: Mapping[str, Timing | Exception], missing: list[Row]) -> Table:
        ours = found[self._ours()[0]]
        each_s = 1e-12 * self.batch * tokens * self.channels * self.state
        columns = (*TIMING_COLUMNS, "ps per element")
        rows = [timing_row(name, result, ours, each_s=each_s) for name, result in found.items()]
        rows += [Row(name=row.name, values=(None,) * len(columns), note=row.note) for row in missing]
        shape = f"B={self.batch}, L={tokens:,}, E={self.channels}, N={self.state}"
        return Table(title=f"{mode}, {shape}", columns=columns, rows=tuple(rows))

    def _peak(self, backend: str, tokens: int, how: Conditions) -> float | Exception:
        how.say(f"memory of {backend}, L={tokens}")
        shape = (self.batch, tokens, self.channels, self.state)
        try:
            return in_own_process(peak_above_inputs, backend, shape, threads=how.threads)
        except (OSError, RuntimeError) as error:
            return error

    def _errors(self, tokens: int, scans: Mapping, how: Conditions) -> dict[str, dict[str, float] | Exception]:
        """The larger error of both directions for each scan and tensor."""
        inputs = scan_inputs(self.batch, tokens, self.error_channels, self.state)
        how.say(f"errors, L={tokens}")
        wanted = {way: exact_scan(inputs, reverse=way) for way in (False, True)}
        found: dict[str, dict[str, float] | Exception] = {}
        for name, (scan, peer) in scans.items():
            if peer is not None and tokens > SEQUENTIAL_TOKENS:
                continue
            try:
                both = [
                    relative_errors(
                        run(scanned(scan, reverse=way), inputs, dtype=torch.float32), wanted[way], SCAN_NAMES
                    )
                    for way in (False, True)
                ]
                found[name] = {key: max(errors[key] for errors in both) for key in SCAN_NAMES}
            except Exception as error:  # a peer may raise anything; that is its row
                found[name] = error
        return found

    def _targets(self, timings: Mapping, memory: Mapping, errors: Mapping) -> list[Target]:
        shape_holds = (self.batch, self.channels, self.state) == (1, 512, 32)
        targets = []
        for mode, tokens, slow, fast, wanted in RATIO_TARGETS:
            results = timings.get((mode, tokens), {}) if shape_holds else {}
            name = f"{mode}, L={tokens:,}: {slow} / {fast}"
            targets.append(Target(name=name, wanted=wanted, found=ratio_of(results, slow, fast), unit="times"))
        for tokens in self.tokens:
            result = timings["forward+backward", tokens].get("numba")
            elements = self.batch * tokens * self.channels * self.state
            found = 1e12 * result.cpu_s / elements if isinstance(result, Timing) and shape_holds else None
            name = f"stretch: forward+backward of numba, L={tokens:,}"
            targets.append(Target(name=name, wanted=STRETCH_PS, found=found, unit="ps per element", at_most=True))
        peak = memory.get((self._ours()[0], MEMORY_TOKENS)) if shape_holds else None
        targets.append(
            Target(
                name=f"peak memory above the inputs, forward+backward, L={MEMORY_TOKENS:,}",
                wanted=MEMORY_TARGET_MIB,
                found=peak if isinstance(peak, float) else None,
                unit="MiB",
                at_most=True,
            )
        )
        for tokens, found in errors.items():
            for backend in self._ours():
                each = found[backend]
                worst = max(each.values()) if isinstance(each, dict) else None
                name = f"relative error of {backend}, output and all gradients, L={tokens:,}"
                targets.append(Target(name=name, wanted=SCAN_BOUNDS["cpu"], found=worst, unit="", at_most=True))
        return targets


def peak_above_inputs(backend: str, shape: tuple[int, int, int, int]) -> float:
    """MiB that forward+backward needs at its peak beyond the inputs; to be run in a process of its own."""
    _, _, channels, state = shape
    _work("forward+backward", by_backend(backend), scan_inputs(1, 64, channels, state))()
    work = _work("forward+backward", by_backend(backend), scan_inputs(*shape))
    forget_peak()
    before = held_bytes()
    work()
    return (peak_bytes() - before) / 2**20


def _work(mode: str, scan: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """What is timed: one forward pass without gradients, or one with all of them."""
    leaves = [x.detach().requires_grad_(mode != "forward") for x in inputs]
    # The gradient of the output is one that is there already, as in a model.
    dy_BLE = torch.ones_like(inputs[0])

    def work() -> object:
        with torch.set_grad_enabled(mode != "forward"):
            y_BLE = scan(*leaves[:-1], dt_bias_E=leaves[-1])
        return y_BLE if mode == "forward" else torch.autograd.grad(y_BLE, leaves, dy_BLE)

    return work


def _memory_table(memory: Mapping[tuple[str, int], float | Exception]) -> Table:
    rows = [
        Row(
            name=f"{name}, L={tokens:,}",
            values=(None,) if isinstance(peak, Exception) else (peak,),
            note=brief(peak) if isinstance(peak, Exception) else "",
        )
        for (name, tokens), peak in memory.items()
    ]
    return Table(title="peak memory above the inputs, forward+backward", columns=("MiB",), rows=tuple(rows))


def _error_table(errors: Mapping[int, Mapping[str, dict[str, float] | Exception]]) -> Table:
    rows = []
    for tokens, found in errors.items():
        for name, each in found.items():
            values = (
                (None,) * len(SCAN_NAMES) if isinstance(each, Exception) else tuple(each[key] for key in SCAN_NAMES)
            )
            note = brief(each) if isinstance(each, Exception) else ""
            rows.append(Row(name=f"{name}, L={tokens:,}", values=values, note=note))
    title = "error of float32 relative to float64, output and gradients, the larger of both directions"
    return Table(title=title, columns=SCAN_NAMES, rows=tuple(rows))
