"""The selective scan on a device: each backend and mamba-ssm's own kernel, time, memory and error, at many lengths.

Legend: B batch, L tokens, E channels, N state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helix.bench import NotRunError, Row, Table, Target, Timing, without_frames
from helix.gpu.clock import peak_of, race_on
from helix.gpu.roofline import scan_bytes
from helix.gpu.section import COLUMNS, Load, Part, Stage, device_row, wall_ratio, why
from helix.models.agreement import (
    SCAN_BOUNDS,
    SCAN_NAMES,
    by_backend,
    exact_scan,
    relative_errors,
    run,
    scan_inputs,
    scanned,
)
from helix.models.scan import BACKENDS, kernels, scan_backend

MODES = ("forward", "forward+backward")

#: Our fastest scan that is deterministic, by the type of device.
OURS = {"cuda": "triton", "cpu": "numba"}

#: The kernel alone, in the layout that it wants, without what our models pay to get there and back.
KERNEL = "mamba-ssm's kernel, channels first"

#: FLOPs for each number of the states, as the model's own cost counts them; a backward is two forwards.
FORWARD_FLOPS = 9

#: Ours forward+backward is at least as fast as mamba-ssm's, from this many tokens on, at the paper's E and N.
TARGET, TARGET_TOKENS, PAPER_SHAPE = 1.0, 500, (512, 32)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Lengths, and a batch for each so that about `in_flight` tokens are under way, at most `batch` clips."""

    tokens: tuple[int, ...]
    batch: int
    in_flight: int
    channels: int
    state: int
    error_channels: int

    def batch_at(self, tokens: int) -> int:
        return max(1, min(self.batch, self.in_flight // tokens))


#: A scan as a function of the tensors of `scan_inputs`, and those tensors on the device.
Contestant = tuple[Callable[..., Tensor], list[Tensor]]


def scans(stage: Stage, shapes: Shapes) -> Part:
    """The section: times at every length, then memory, then errors."""
    backends, missing = backends_on(stage.device)
    tables, targets, loads = [], [], []
    for tokens in shapes.tokens:
        for mode in MODES:
            found = _race(stage, shapes, mode, tokens, backends)
            tables.append(_times(stage, shapes, mode, tokens, found, missing))
            loads += _loads(shapes, mode, tokens, found)
            if mode == MODES[1] and tokens >= TARGET_TOKENS:
                targets.append(_target(stage, shapes, tokens, found))
    tables.append(_memory(stage, shapes, backends))
    errors, worst = _errors(stage, shapes, backends)
    name = f"relative error of {OURS[stage.device.type]}, output and all gradients"
    targets.append(Target(name=name, wanted=SCAN_BOUNDS[stage.device.type], found=worst, unit="", at_most=True))
    return Part(tables=(*tables, errors), targets=tuple(targets), loads=tuple(loads))


def backends_on(device: torch.device) -> tuple[list[str], list[Row]]:
    """The backends that can scan there, ours first; and a row for each that is made for it and cannot."""
    found, missing = [], []
    for name in dict.fromkeys([OURS.get(device.type, "reference"), *BACKENDS, "reference"]):
        if name in BACKENDS and BACKENDS[name].device != device.type:
            continue
        try:
            found.append(scan_backend(device, torch.float32, backend=name))
        except ValueError:
            row = Row(name=name, values=(None,) * 4, note="not run: it cannot be imported; see helix doctor")
            missing.append(row)
    return found, missing


def on_device(inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same tensors there, slices of wider ones where they are slices, as a layer hands them over."""
    return [
        x.to(device)
        if x._base is None
        else x._base.to(device).as_strided(x.shape, x.stride(), x.storage_offset()).detach()
        for x in inputs
    ]


def channels_first(inputs: Sequence[Tensor]) -> list[Tensor]:
    """u, dt, B, C and z with the tokens side by side, as mamba-ssm's kernel takes them."""
    u, dt, A, B, C, D, z, bias = inputs
    return [u.mT.contiguous(), dt.mT.contiguous(), A, B.mT.contiguous(), C.mT.contiguous(), D, z.mT.contiguous(), bias]


def kernel_alone(*tensors: Tensor) -> Tensor:
    """mamba-ssm's kernel on the tensors of `channels_first`."""
    u, dt, A, B, C, D, z, bias = tensors
    module = kernels("mamba_ssm")
    assert module is not None
    return module.selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


def work(mode: str, contestant: Contestant) -> Callable[[], object]:
    """What is timed: one forward without gradients, or one with all of them."""
    scan, inputs = contestant
    leaves = [x.detach().requires_grad_(mode != MODES[0]) for x in inputs]
    dy = torch.ones_like(inputs[0])  # the gradient of the output is one that is there already, as in a model

    def once() -> object:
        with torch.set_grad_enabled(mode != MODES[0]):
            y = scan(*leaves)
        return y if mode == MODES[0] else torch.autograd.grad(y, leaves, dy)

    return once


def _race(
    stage: Stage, shapes: Shapes, mode: str, tokens: int, backends: Sequence[str]
) -> dict[str, Timing | Exception]:
    batch = shapes.batch_at(tokens)
    stage.how.say(f"scan, {mode}, B={batch}, L={tokens:,}")
    names = [*backends, *([KERNEL] if "mamba_ssm" in backends else [])]
    try:
        stage.require_time()
        inputs = on_device(scan_inputs(batch, tokens, shapes.channels, shapes.state), stage.device)
    except (NotRunError, RuntimeError, MemoryError) as error:
        return dict.fromkeys(names, without_frames(error))
    contestants = {name: work(mode, (scanned(by_backend(name)), inputs)) for name in backends}
    if KERNEL in names:
        contestants[KERNEL] = work(mode, (kernel_alone, channels_first(inputs)))
    return race_on(stage.device, contestants, stage.how)


def _times(
    stage: Stage,
    shapes: Shapes,
    mode: str,
    tokens: int,
    found: Mapping[str, Timing | Exception],
    missing: Sequence[Row],
) -> Table:
    batch = shapes.batch_at(tokens)
    each_s = 1e-12 * batch * tokens * shapes.channels * shapes.state
    ours = found.get(OURS.get(stage.device.type, "reference"))
    rows = [device_row(name, result, ours, each_s=each_s) for name, result in found.items()]
    title = f"scan, {mode}, B={batch}, L={tokens:,}, E={shapes.channels}, N={shapes.state}"
    return Table(title=title, columns=(*COLUMNS, "ps per element"), rows=(*rows, *missing))


def _target(stage: Stage, shapes: Shapes, tokens: int, found: Mapping[str, Timing | Exception]) -> Target:
    """Held against the faster of the kernel alone and the kernel as our models have it."""
    ours = found.get(OURS.get(stage.device.type, "reference"))
    ratios = [wall_ratio(found.get(name), ours) for name in (KERNEL, "mamba_ssm")]
    measured = [ratio for ratio in ratios if ratio is not None]
    holds = (shapes.channels, shapes.state) == PAPER_SHAPE
    return Target(
        name=f"scan, forward+backward, L={tokens:,}: mamba-ssm, the faster of both layouts / triton",
        wanted=TARGET,
        found=min(measured) if measured and holds and stage.device.type == "cuda" else None,
        unit="times",
    )


def _loads(shapes: Shapes, mode: str, tokens: int, found: Mapping[str, Timing | Exception]) -> list[Load]:
    batch, backward = shapes.batch_at(tokens), mode != MODES[0]
    size = batch * tokens * shapes.channels * shapes.state
    return [
        Load(
            name=f"scan, {mode}, L={tokens:,}, {name}",
            seconds=result.cpu_s,
            flops=FORWARD_FLOPS * size * (3 if backward else 1),
            moved_bytes=scan_bytes(batch, tokens, shapes.channels, shapes.state, backward=backward),
            unit="fp32",  # a scan multiplies outside of the matrix units
        )
        for name, result in found.items()
        if isinstance(result, Timing) and name != "reference"
    ]


def _memory(stage: Stage, shapes: Shapes, backends: Sequence[str]) -> Table:
    rows = []
    for tokens in shapes.tokens:
        for name in backends:
            try:
                stage.require_time()
                inputs = on_device(
                    scan_inputs(shapes.batch_at(tokens), tokens, shapes.channels, shapes.state), stage.device
                )
                peak = peak_of(stage.device, work(MODES[1], (scanned(by_backend(name)), inputs)))
                values, note = (peak.tensor_bytes / 2**20,), ""
            except Exception as error:  # a kernel may raise anything; that is its row
                values, note = (None,), why(without_frames(error))
            rows.append(Row(name=f"{name}, L={tokens:,}", values=values, note=note))
    title = "scan, peak memory above the inputs, forward+backward"
    return Table(title=title, columns=("MiB",), rows=tuple(rows))


def _errors(stage: Stage, shapes: Shapes, backends: Sequence[str]) -> tuple[Table, float | None]:
    """The larger error of both directions for each backend and length; and the largest of ours."""
    rows, worst = [], []
    for tokens in shapes.tokens:
        stage.how.say(f"errors of the scan, L={tokens:,}")
        inputs = scan_inputs(1, tokens, shapes.error_channels, shapes.state)
        wanted: list[list[Tensor]] = []
        for name in backends:
            try:
                stage.require_time()
                wanted = wanted or [exact_scan(inputs, reverse=way, device=stage.device) for way in (False, True)]
                both = [_distances(stage, name, inputs, wanted[way], reverse=way) for way in (False, True)]
                each = [max(errors[key] for errors in both) for key in SCAN_NAMES]
                values, note = (each[0], max(each[1:])), ""
                if name == OURS.get(stage.device.type):
                    worst.append(max(each))
            except Exception as error:  # as above
                values, note = (None, None), why(without_frames(error))
            rows.append(Row(name=f"{name}, L={tokens:,}", values=values, note=note))
    title = "scan, error of float32 relative to float64, the larger of both directions"
    table = Table(title=title, columns=("output", "worst gradient"), rows=tuple(rows))
    return table, max(worst) if worst else None


def _distances(
    stage: Stage, name: str, inputs: list[Tensor], wanted: list[Tensor], *, reverse: bool
) -> dict[str, float]:
    given = run(scanned(by_backend(name), reverse=reverse), inputs, dtype=torch.float32, device=stage.device)
    return relative_errors(given, wanted, SCAN_NAMES)
