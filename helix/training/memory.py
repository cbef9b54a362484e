"""How much memory one training step takes at its peak, told from shapes alone, and the micro-batch that fits a limit.

The step itself is run, the code of the model and of helix.training.step.train_step, on tensors that have shapes and
no memory (torch's FakeTensorMode), while a ledger counts the bytes of every storage from the operator that makes it to
the moment it dies. Nothing is allocated, and whatever changes in a model changes the prediction.

What the ledger cannot see is what allocators lose between blocks and what libraries keep for themselves; the error
bound below is for that.

A GPU is played on the CPU: with CUDA's autocast (helix.training.autocast) and with the operators of
helix.models.scan_triton, whose shapes need no GPU. mamba-ssm is taken for the same; it keeps its output and copies
besides, by estimate a fifth more, for which there is the bound. Where Triton is not installed the CPU's operators stand
in: they keep more in bf16 and hold less in a backward of few tokens, within the bound too. Attention without a matrix
of weights is the CPU's, which keeps the same tensors as CUDA's. A step that will be recorded as a CUDA graph is counted
with the recording. None of it has been held against a GPU.

Legend: B batch, T samples.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helix.data.loader import Batch
from helix.models.classifier import build_classifier, cost
from helix.models.scan import forced, kernels, scan_backend, simulated
from helix.spec import TrialSpec, from_json, resolve, to_json
from helix.training.autocast import CudaAutocast
from helix.training.graphs import Choice, asked, why_not
from helix.training.optim import build_optimizer
from helix.training.ranks import Ranks
from helix.training.step import FILLED_TOKENS, Position, train_step

Device = Literal["cpu", "cuda"]

GIB = 2**30

#: From this size on a compact process maps each block for itself, so that it goes back to the system when it is freed.
COMPACT_FROM_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A measured peak is at most `relative` of the predicted one above it, and `fixed_bytes` more."""

    relative: float
    fixed_bytes: int


#: By the allocator. "heap" is what a process on a CPU has unasked: glibc's heap, whose holes are used again but never
#: quite filled (11 to 42 % were measured, and up to three times the prediction where blocks are recomputed: there only
#: "compact" will do). "compact" is `compact_large_blocks`, which costs a fifth to a third of the speed on long clips,
#: since the system clears every page that it hands out. "cuda" is torch's own, which rounds blocks up to 2 to 20 MiB.
BOUNDS = {
    "heap": Bound(relative=0.45, fixed_bytes=64 * 2**20),
    "compact": Bound(relative=0.05, fixed_bytes=48 * 2**20),
    "cuda": Bound(relative=0.25, fixed_bytes=512 * 2**20),
}

#: What a process holds before the first model: a worker with Ray, torch and the compiled kernels on a CPU; on a GPU
#: the context of CUDA with its libraries, as torch's users report it.
PROCESS_BYTES: dict[Device, int] = {"cpu": 768 * 2**20, "cuda": 1024 * 2**20}

#: The reference scan is thousands of operators per clip, so it is run on this many tokens and extended: its bytes are
#: a polynomial of the number of tokens, of degree two where attention keeps its weights.
SHORT_TOKENS = (64, 128, 192)

#: Micro-batches that are run: the second finds the gradients of the first, and from there on all are alike.
ALIKE_AFTER = 2


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The bytes that are held when one step holds most, by what they are for; the process itself is not in them.

    `activations` were made before the backward, the batch with them; `transient` in the backward, where blocks that are
    recomputed make theirs again. `gradients` are those that are complete at that moment. `graph` is what recording the
    step as a CUDA graph takes besides: a step's own tensors once more, since a graph keeps its memory to itself while
    steps without it are run, and the states that it is compared by.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    graph: int = 0

    @property
    def peak_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    def upper_bytes(self, allocator: str) -> int:
        """The most that it will take by the bound of that allocator, a name in BOUNDS."""
        bound = BOUNDS[allocator]
        return math.ceil(self.peak_bytes * (1 + bound.relative)) + bound.fixed_bytes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a step is cut to fit: `micro_batch` clips at a time, None for all that a rank has, whether blocks are
    computed again in the backward, and whether the process has to be made compact (`compact_large_blocks`).

    `needed_bytes`: what to make room for, with the error bound and the process itself.
    """

    micro_batch: int | None = None
    recompute: bool = False
    compact: bool = False
    predicted: Prediction
    needed_bytes: int


def predict(
    spec: TrialSpec,
    *,
    samples: int,
    classes: int,
    micro_batch: int | None = None,
    recompute: bool = False,
    device_type: Device = "cpu",
    ranks: int = 1,
    graphs: Choice = "auto",
) -> Prediction:
    """What one step of `spec` on clips of `samples` takes, on each of so many ranks.

    `graphs`: as in helix.training.trainer.Fit. Raises ValueError where the model cannot be built for such clips.

    Equal models, batches and lengths are simulated once per process, which takes a fraction of a second. What scans on
    a GPU keeps what the CPU's kernels keep, so those stand in for it, whatever HELIX_SCAN asks of the GPU.
    """
    whole = Ranks(count=ranks).largest_part(spec.training.batch_size)
    size = whole if micro_batch is None else min(micro_batch, whole)
    if size < 1:
        raise ValueError(f"micro_batch is {micro_batch}; wanted 1 or more")
    found = _predict(_shapes(spec), samples, classes, size, recompute, device_type, _scan_on(device_type), ranks)
    tokens = size * _tokens(_shapes(spec), samples, classes)
    if why_not(graphs, device_type, ranks=ranks, tokens=tokens) is not None:
        return found
    return dataclasses.replace(found, graph=_graph_bytes(found))


@cache
def _tokens(shapes: str, samples: int, classes: int) -> int:
    spec = from_json(json.loads(shapes))
    return cost(spec.model, spec.protocol, classes=classes, samples=samples).tokens


def _graph_bytes(step: Prediction) -> int:
    """Beside a step: another, while two copies of what a step changes are kept; or the four copies that are there in
    the end, where weights are most of it (helix.training.graphs)."""
    state = step.parameters + step.optimizer
    return max(step.gradients + step.activations + step.transient + 2 * state, 4 * state)


def _scan_on(device_type: Device) -> str:
    """The scan that is simulated for a device, whatever HELIX_SCAN asks of a GPU."""
    if device_type == "cpu":
        return scan_backend(torch.device("cpu"), torch.float32)
    # Asked for first: where Triton is missing and not needed, that is worth no warning.
    if importlib.util.find_spec("triton") is not None and kernels("triton") is not None:
        return "triton"
    with forced("auto"):
        return scan_backend(torch.device("cpu"), torch.float32)


def choose(
    spec: TrialSpec,
    *,
    samples: int,
    classes: int,
    limit_bytes: int | None,
    device_type: Device = "cpu",
    ranks: int = 1,
) -> Placement:
    """How a step of `spec` fits into `limit_bytes`, the process included and with the error bound as head-room.

    Where several `ranks` share the batch, that is how the part of one of them fits into what one of them has.

    The whole batch in one go is best, and is what there is without a limit. Where it does not fit, smaller
    micro-batches cost next to nothing as long as each fills the device, while recomputing costs a second forward, a
    third more work, at any size. So recomputing comes second, or first where without it a micro-batch would leave the
    device idle and with it a larger one fits. Compacting costs as much as recomputing and saves less; it comes where
    one clip would not fit otherwise, and with recomputing, which is not worth it on a heap. Of the sizes that need the
    same number of passes the smallest is taken. Steps that are recorded as a CUDA graph need room for that too; where
    there is none whatever the size is, the step alone has to fit, since a recording without memory is given up. Raises
    ValueError, saying what would fit, where nothing does.
    """
    return _choose(_shapes(spec), samples, classes, limit_bytes, device_type, ranks, asked("auto"))


@cache
def _choose(
    shapes: str,
    samples: int,
    classes: int,
    limit_bytes: int | None,
    device_type: Device,
    ranks: int,
    wanted: Choice,
) -> Placement:
    spec = from_json(json.loads(shapes))
    whole = Ranks(count=ranks).largest_part(spec.training.batch_size)
    tokens = cost(spec.model, spec.protocol, classes=classes, samples=samples).tokens

    def place(size: int, recompute: bool, compact: bool, graphs: Choice = wanted) -> Placement:
        how = {"micro_batch": size, "recompute": recompute, "device_type": device_type, "ranks": ranks}
        predicted = predict(spec, samples=samples, classes=classes, graphs=graphs, **how)
        return Placement(
            micro_batch=size if size < whole else None,
            recompute=recompute,
            compact=compact,
            predicted=predicted,
            needed_bytes=needed_bytes(predicted, device_type, compact=compact),
        )

    if limit_bytes is None:
        return place(whole, False, False)
    on_cpu = device_type == "cpu"
    ways = [(False, False), *([(False, True)] if on_cpu else []), (True, on_cpu)]
    for graphs in (wanted,) if on_cpu else (wanted, "off"):
        found: tuple[int, bool, bool] | None = None
        for way in ways:
            size = _largest(whole, lambda size, way=(*way, graphs): place(size, *way).needed_bytes, limit_bytes)
            if size and (found is None or size > found[0]):
                found = (size, *way)
            if found and (found[0] == whole or found[0] * tokens >= FILLED_TOKENS[device_type]):
                break
        if found is not None:
            return place(*found, graphs)
    size = {"samples": samples, "classes": classes, "ranks": ranks}
    raise ValueError(_refusal(spec, **size, limit_bytes=limit_bytes, device=device_type))


def needed_bytes(predicted: Prediction, device_type: Device, *, compact: bool) -> int:
    """What a process has to have room for that takes such steps: with the error bound, and with what it is itself."""
    allocator = "cuda" if device_type == "cuda" else "compact" if compact else "heap"
    return predicted.upper_bytes(allocator) + PROCESS_BYTES[device_type]


def compact_large_blocks() -> bool:
    """From here on blocks of COMPACT_FROM_BYTES go back to the system when they are freed; False where only others can.

    glibc keeps freed blocks of up to 32 MiB in its heap, for speed, and a step leaves holes there that its next tensors
    do not fit into.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_mmap_threshold = -3
    return mallopt is not None and mallopt(m_mmap_threshold, COMPACT_FROM_BYTES) == 1


def available_bytes() -> int:
    """The memory that this machine can still give, or the container that this process runs in where that is less."""
    return min([psutil.virtual_memory().available, *_cgroup_bytes(Path("/sys/fs/cgroup"))])


def gib(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.2f} GiB" if count < 10 * GIB else f"{count / GIB:.1f} GiB"


class Alone(Ranks):
    """One of several ranks that hears nothing of the others: it holds what it holds among them."""

    def agree(self, *values: float) -> tuple[float, ...]:
        return values

    def _exchange(self, collective: Callable[..., Any], *arguments: Any) -> None:
        pass


class Rehearsal:
    """A step of `spec` on clips of silence, to be run again and again: for real, or inside a ledger.

    Of several `ranks` it is the step of one of them, without the others.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        samples: int,
        classes: int,
        micro_batch: int | None = None,
        recompute: bool = False,
        ranks: int = 1,
    ):
        self.spec, self.samples, self.micro_batch = resolve(spec), samples, micro_batch
        self.ranks = Alone(count=ranks)
        self.model = build_classifier(self.spec.model, self.spec.protocol, classes=classes).train()
        self.model.recompute = recompute
        self.optimizer = build_optimizer(self.model, self.spec.training, self.spec.protocol)

    def step(self) -> None:
        whole = self.spec.training.batch_size
        own = self.ranks.largest_part(whole)
        # Clips to mix with that other ranks have are more than its own in no case.
        size = min(2 * own, whole) if self.spec.augment.mixup_alpha else own
        batch = Batch(
            wave_BT=torch.zeros(size, self.samples),
            label_B=torch.zeros(size, dtype=torch.long),
            samples_B=torch.full((size,), self.samples),
            clip_B=torch.arange(size),
            whole=whole,
            partner_B=None if own == whole else torch.arange(own),
        )
        at = Position(epoch=0, step=0, steps_per_epoch=1)
        how = {"micro_batch": self.micro_batch, "ranks": self.ranks}
        train_step(self.model, self.optimizer, batch, self.spec, at, **how)


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is made while this mode is on, until it dies.

    `part` names what is being made, unless a backward is running: that makes what is `transient`. `scan` is the backend
    whose operators hold more than they return.
    """

    def __init__(self, scan: str = "reference") -> None:
        super().__init__()
        self.part = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        module = kernels(scan)
        self._workspace: dict[str, Callable[..., int]] = module.WORKSPACE_BYTES if module else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What is on the meta device is there to be counted by the models themselves.
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._enter(leaf.untyped_storage())
        workspace = self._workspace.get(func.name() if hasattr(func, "name") else "")
        self._compare(workspace(*args) if workspace else 0)
        return result

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor to another part than the one it was made as."""
        key = tensor.untyped_storage()._cdata
        reference, size, before = self._storages[key]
        self._storages[key] = (reference, size, part)
        self.live[before] -= size
        self.live[part] += size

    def forget_peak(self) -> None:
        self.peak = Counter(self.live)

    def _enter(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        part, size = "transient" if in_backward else self.part, storage.nbytes()
        self._storages[key] = (weakref.ref(storage, lambda _: self._leave(key)), size, part)
        self.live[part] += size

    def _leave(self, key: int) -> None:
        _, size, part = self._storages.pop(key)
        self.live[part] -= size

    def _compare(self, workspace: int) -> None:
        if self.live.total() + workspace > self.peak.total():
            self.peak = Counter(self.live)
            self.peak["transient"] += workspace


def _shapes(spec: TrialSpec) -> str:
    """What of a spec has to do with memory, as a key: trials of all folds, seeds and rates share one prediction."""
    value = to_json(resolve(spec))
    training = {name: value["training"][name] for name in ("batch_size", "precision")}
    parts = {name: value[name] for name in ("model", "augment", "protocol")}
    return json.dumps({**parts, "training": training}, sort_keys=True)


@cache
def _predict(
    shapes: str,
    samples: int,
    classes: int,
    micro_batch: int,
    recompute: bool,
    device_type: Device,
    scan: str,
    ranks: int,
) -> Prediction:
    spec = from_json(json.loads(shapes))
    tokens = cost(spec.model, spec.protocol, classes=classes, samples=samples).tokens
    how = {"micro_batch": micro_batch, "recompute": recompute, "device_type": device_type, "ranks": ranks}
    if scan != "reference" or tokens <= SHORT_TOKENS[-1]:
        return _simulate(spec, samples=samples, classes=classes, **how)
    short = dataclasses.replace(spec, model=dataclasses.replace(spec.model, pool_tokens=None))
    points = {}
    for wanted in SHORT_TOKENS:
        length = samples * wanted // tokens
        at = cost(short.model, short.protocol, classes=classes, samples=length).tokens
        points[at] = _simulate(short, samples=length, classes=classes, **how)
    return _extend(points, tokens)


class _Seen(Exception):  # noqa: N818  (nothing is wrong)
    """The rest of the step would show nothing new."""


def _simulate(
    spec: TrialSpec,
    *,
    samples: int,
    classes: int,
    micro_batch: int,
    recompute: bool,
    passes: int = ALIKE_AFTER,
    device_type: Device = "cpu",
    ranks: int = 1,
) -> Prediction:
    """The peak of one step, of which so many micro-batches are run."""
    scan = _scan_on(device_type)
    ledger = Ledger(scan)
    autocast = CudaAutocast if device_type == "cuda" else contextlib.nullcontext
    # Permutations for mixup come from numpy and are real; they are as small as a batch.
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, simulated(scan):
        ledger.part = "parameters"
        how = {"micro_batch": micro_batch, "recompute": recompute, "ranks": ranks}
        rehearsal = Rehearsal(spec, samples=samples, classes=classes, **how)
        for block in rehearsal.model.blocks:
            block.forward = _within(autocast, block.forward)
        # The moments are made by the first step; every other step finds them.
        ledger.part = "optimizer"
        for parameter in rehearsal.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        rehearsal.optimizer.step()
        rehearsal.optimizer.zero_grad(set_to_none=True)
        for parameter in rehearsal.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradients"))
        ledger.part = "activations"
        ledger.forget_peak()
        logits, calls = _within(autocast, rehearsal.model.logits), itertools.count(1)

        def some_logits(*inputs: Tensor) -> Tensor:
            if next(calls) > passes:
                raise _Seen
            return logits(*inputs)

        rehearsal.model.logits = some_logits  # type: ignore[method-assign]
        with contextlib.suppress(_Seen):
            rehearsal.step()
    return Prediction(**{field.name: ledger.peak[field.name] for field in dataclasses.fields(Prediction)})


def _within(context: Callable[[], contextlib.AbstractContextManager], function: Callable) -> Callable:
    """The function, called in a context."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return called


def _extend(points: dict[int, Prediction], tokens: int) -> Prediction:
    """The polynomial through predictions for a few numbers of tokens, at `tokens` (Lagrange)."""
    weights = {at: math.prod((tokens - other) / (at - other) for other in points if other != at) for at in points}
    return Prediction(
        **{
            field.name: max(0, round(sum(weight * getattr(points[at], field.name) for at, weight in weights.items())))
            for field in dataclasses.fields(Prediction)
        }
    )


def _largest(whole: int, needed: Callable[[int], int], limit_bytes: int) -> int:
    """The largest micro-batch whose need is within the limit, of those that share a batch evenly; 0 where none is.

    Needs are nearly proportional, and what bends them bends upwards (a peak is the highest of several moments, each
    proportional), so a chord lies above them: what fits by the chord fits.
    """
    if needed(whole) <= limit_bytes:
        return whole
    sizes = sorted({math.ceil(whole / passes) for passes in range(2, whole + 1)})
    if not sizes or needed(sizes[0]) > limit_bytes:
        return 0
    if needed(sizes[-1]) <= limit_bytes:
        return sizes[-1]
    low, high = needed(sizes[0]), needed(sizes[-1])
    slope = (high - low) / (sizes[-1] - sizes[0])
    by_chord = [size for size in sizes if low + slope * (size - sizes[0]) <= limit_bytes]
    return next((size for size in reversed(by_chord) if needed(size) <= limit_bytes), 0)


def _refusal(spec: TrialSpec, *, samples: int, classes: int, limit_bytes: int, device: Device, ranks: int = 1) -> str:
    def needed(spec: TrialSpec, samples: int) -> int:
        how = {"micro_batch": 1, "recompute": True, "device_type": device, "ranks": ranks}
        smallest = predict(spec, samples=samples, classes=classes, graphs="off", **how)
        return needed_bytes(smallest, device, compact=True)

    def fits(samples: int) -> bool:
        """Whether a clip of that length is long enough for the model and short enough for the limit."""
        try:
            return needed(spec, samples) <= limit_bytes
        except ValueError:
            return False

    def tokens(samples: int) -> int:
        return cost(spec.model, spec.protocol, classes=classes, samples=samples).tokens

    would = [f"a limit of {gib(needed(spec, samples))}"]
    changes = {
        "protocol.attn_impl=sdpa": dataclasses.replace(
            spec, protocol=dataclasses.replace(spec.protocol, attn_impl="sdpa")
        ),
        "training.precision=bf16": dataclasses.replace(
            spec, training=dataclasses.replace(spec.training, precision="bf16")
        ),
    }
    for name, changed in changes.items():
        if changed != spec and needed(changed, samples) <= limit_bytes:
            would.append(f"{name}, which needs {gib(needed(changed, samples))}")
    if spec.training.batch_size > ranks:
        single = dataclasses.replace(spec, training=dataclasses.replace(spec.training, batch_size=ranks))
        if needed(single, samples) <= limit_bytes:
            would.append("a smaller training.batch_size")
    # To a sixteenth of the clip is as near as anybody needs to know.
    low, high = 0, 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(samples * middle // 16) else (low, middle)
    if low:
        length = samples * low // 16
        would.append(f"clips of {tokens(length):,} tokens ({length:,} samples)")
    return (
        f"one step of {'-'.join(spec.model.pattern)} on {tokens(samples):,} tokens does not fit into "
        f"{gib(limit_bytes)}, one clip at a time and recomputing every block. What would fit: {'; '.join(would)}"
    )


def _cgroup_bytes(root: Path) -> list[int]:
    """What the control group of this process may still take, by version 2 and 1; empty where it has no limit."""
    found = []
    for limit, usage, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most, used = ((root / name).read_text().strip() for name in (limit, usage))
            rows = dict(line.split() for line in (root / stat).read_text().splitlines())
        except OSError:
            continue
        if most.isdecimal():
            # Files that nobody has open are in the count, and are given up when memory is short.
            found.append(max(0, int(most) - int(used) + int(rows.get(cached, 0))))
    return found
