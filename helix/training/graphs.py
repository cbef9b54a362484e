"""A training step recorded once as a CUDA graph and replayed for every batch: one launch instead of hundreds.

That pays where the launches take longer than the work, so for few tokens in flight. A graph does the same work on the
same memory each time: what differs from step to step is copied to where the recording read it. So the recorded step is
`helix.training.step.take`, which reads nothing but tensors; weights, moments and the rate stay where they are.

A wrong recording must not give wrong numbers. The first replays are each held against the same step without a graph,
from the same weights, and have to give the same bits (or, where two such steps differ, be within SLACK times their
distance); where they do not, or where there is no memory to see it, there is no graph from then on, and a warning says
so. A graph keeps the memory of a whole step to itself, and a step without one needs as much again.

torch.compile was not taken instead: the scans are operators that it does not look into, and what it would fuse around
them would change bits.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from helix.errors import first_line
from helix.out_of_memory import is_out_of_memory
from helix.training.step import FILLED_TOKENS, Found, Inputs

logger = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]

#: Steps before the recording, on a stream of their own: libraries choose their algorithms and allocate then.
WARM_UP = 3

#: Replays that are held against a step without a graph: the second one shows what was recorded as a constant.
CHECKED = 2

#: How much further a replay may be from the step that it stands for than that step done twice is from itself. That is
#: no distance at all but where a kernel adds with atomics, as the backward of mamba-ssm does.
SLACK = 10.0

#: What records: of a device, a function that does a step and the same to be called while recording, it makes one that
#: does that step again. It may do the step as often as it likes; whoever asks puts the state back.
Capture = Callable[[torch.device, Callable[[], None], Callable[[], None]], Callable[[], None]]

#: Tensors that a step changes, by kind.
State = dict[str, list[Tensor]]


def cuda_graph(device: torch.device, run: Callable[[], None], recorded: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph, by the recipe of torch's notes on CUDA semantics.

    Where it cannot be one it raises whatever torch or a kernel does.
    """
    with torch.cuda.device(device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run()
        finally:
            here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The block of `here` brings the current stream back: a recording that fails leaves its own in its place.
        recording = partial(torch.cuda.graph, graph, capture_error_mode="thread_local")
        with _pool_for(graph) as pool, torch.cuda.stream(here), recording(pool=pool):
            recorded()
        return graph.replay


#: Graphs whose recording was never ended: torch's allocator of pinned memory asks them with each allocation whether it
#: is theirs, for as long as the process lives.
_UNENDED: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _pool_for(graph: torch.cuda.CUDAGraph) -> Iterator[torch.cuda._POOL_HANDLE]:
    """A pool of the current device for the recording of `graph`, given back where that fails.

    CUDAGraph.capture_end of torch 2.13 raises before it ends the pool where CUDA calls the recording invalid (an
    operation in it waited for the device, say). The allocator then takes the recording to go on: the next time that it
    has to give memory back, it ends with an internal assertion instead.
    """
    pool, device = torch.cuda.graph_pool_handle(), torch.cuda.current_device()
    try:
        yield pool
    except BaseException:
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:  # torch has ended it, and the graph releases it
            pass
        else:
            torch._C._cuda_releasePool(device, pool)
            _UNENDED.append(graph)
        raise


#: What records on a type of device; on others there are no graphs.
CAPTURES: dict[str, Capture] = {"cuda": cuda_graph}


def asked(choice: Choice) -> Choice:
    """`choice`, or for "auto" what HELIX_GRAPHS in the environment says. Raises ValueError where that is unknown."""
    found = (os.environ.get("HELIX_GRAPHS") or "auto") if choice == "auto" else choice
    if found not in ("auto", "on", "off"):
        raise ValueError(f"HELIX_GRAPHS is {found!r}; wanted auto, on or off")
    return found


def why_not(choice: Choice, device: torch.device | str, *, ranks: int, tokens: int) -> str | None:
    """Why steps of so many tokens in flight are not to be recorded, None where they are."""
    wanted, device_type = asked(choice), torch.device(device).type
    if wanted == "off":
        return "graphs are switched off"
    if device_type not in CAPTURES:
        return f"a device of type {device_type} has none"
    if ranks > 1:
        return f"{ranks} ranks meet within each step"
    if wanted == "auto" and tokens > FILLED_TOKENS["cuda"]:
        return f"{tokens:,} tokens in flight keep the device busy for longer than their launches take"
    return None


def graphed(
    take: Callable[[Inputs], Found],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    choice: Choice,
    device: torch.device | str,
    ranks: int,
    tokens: int,
    settle: Callable[[], None] = lambda: None,
) -> "Graphed | None":
    """`take` as a graph, or None with the reason in the log; as a warning where graphs were asked for by name."""
    reason = why_not(choice, device, ranks=ranks, tokens=tokens)
    if reason is None:
        return Graphed(take, model, optimizer, CAPTURES[torch.device(device).type], settle=settle)
    logger.log(logging.WARNING if asked(choice) == "on" else logging.INFO, "no CUDA graph: %s", reason)
    return None


class Graphed:
    """`take` of one model and one optimiser: recorded by the first call, replayed by those that follow.

    Weights and the optimiser's state have to stay in the memory where they are: who puts others there makes another of
    these. `settle`: called before the recording; after it no other thread may use the device until the call returns.
    """

    def __init__(
        self,
        take: Callable[[Inputs], Found],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        capture: Capture,
        *,
        settle: Callable[[], None] = lambda: None,
    ):
        self.take, self.model, self.optimizer, self.capture, self.settle = take, model, optimizer, capture, settle
        self.checks, self.replays = CHECKED, True
        self._inputs: Inputs | None = None
        self._found_3 = torch.empty(0)
        self._replay: Callable[[], None] = self._run

    def __call__(self, inputs: Inputs) -> Found:
        """One step. What it returns is the caller's to keep."""
        held = self._inputs or self._record(inputs)
        pairs = list(zip(held.tensors(), inputs.tensors(), strict=True))
        if any(mine.shape != given.shape for mine, given in pairs):
            return self.take(inputs)
        for mine, given in pairs:
            mine.copy_(given)
        if self.checks:
            self.checks -= 1
            self._check()
            if not self.checks:  # what steps without a graph took is for others now
                torch.cuda.empty_cache()
        else:
            self._replay()
        loss, norm, hits = self._found_3.clone().unbind()
        return loss, norm, hits

    def _run(self) -> None:
        """The step on the held inputs, without a graph."""
        assert self._inputs is not None
        self.optimizer.zero_grad(set_to_none=True)
        self._found_3.copy_(torch.stack(self.take(self._inputs)))

    def _recorded(self) -> None:
        with _capturable(self.optimizer):
            self._run()

    def _record(self, inputs: Inputs) -> Inputs:
        """Hold inputs like these, record a step on them, and leave weights and moments as they were."""
        self.settle()
        held = self._inputs = Inputs(**{name: tensor.clone() for name, tensor in vars(inputs).items()})
        self._found_3 = torch.zeros(3, dtype=torch.float64, device=inputs.wave_BT.device)
        before = _copied(self._state())
        try:
            self._replay = self.capture(inputs.wave_BT.device, self._run, self._recorded)
        except Exception as error:  # a kernel may raise anything; what is wrong with the step it says again without
            self._give_up(f"it could not be recorded: {first_line(error)}")
        finally:
            self._become(before)
        return held

    def _check(self) -> None:
        """`_compare`; where there is no memory for that, the step without a graph, and no graph from then on."""
        before: State | None = None
        try:
            before = _copied(self._state())
            self._compare(before)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._give_up("there is no memory for it beside a step that is not one")
        else:
            return
        # Here and not above: the error holds what its frames held.
        if before is not None:
            self._become(before)
        self._run()

    def _compare(self, before: State) -> None:
        """Replay, and keep what the step without a graph finds where that is something else. We are at `before`."""

        def found(step: Callable[[], None]) -> State:
            """What a step makes of the state before it."""
            self._become(before)
            self._found_3.fill_(math.nan)
            step()
            after = {**self._state(), **{f"found {n}": [value] for n, value in enumerate(self._found_3.unbind())}}
            return _copied(after)

        again, wanted = found(self._run), found(self._run)
        begin = {name: before.get(name) or [torch.zeros_like(one) for one in wanted[name]] for name in wanted}
        noise, apart = (_apart(begin, wanted, other) for other in (again, found(self._replay)))
        if apart <= SLACK * noise:
            logger.info("a replayed step is %.1e of it from the step, which is %.1e from itself", apart, noise)
            return
        self._become(wanted)
        self._found_3.copy_(torch.stack([wanted[f"found {n}"][0] for n in range(3)]))
        self._give_up(f"a replay is {apart:.1e} of the step away from the step, which is {noise:.1e} from itself")

    def _become(self, state: State) -> None:
        """Be at `state` again. Moments that it does not know are those that the first step of all has made since."""
        for name, tensors in self._state().items():
            values = state.get(name) or [torch.zeros_like(tensor) for tensor in tensors]
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)

    def _give_up(self, reason: str) -> None:
        logger.warning("no CUDA graph, the training goes on without: %s", reason)
        self._replay, self.checks, self.replays = self._run, 0, False

    def _state(self) -> State:
        """All that a step changes, by kind: weights, buffers and moments; the last are none before the first of all."""
        weights = list(self.model.parameters())
        state: State = {"weights": list[Tensor](weights), "buffers": list(self.model.buffers())}
        for weight in weights:
            for name, moment in self.optimizer.state.get(weight, {}).items():
                state.setdefault(name, []).append(moment)
        return {name: [tensor.detach() for tensor in tensors] for name, tensors in state.items()}


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """torch refuses to record an optimiser that was not declared fit for it; outside of a recording it warns of one."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False


def _copied(state: State) -> State:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in state.items()}


def _apart(before: State, wanted: State, other: State) -> float:
    """The distance between two states as a part of the way to the first, of the kind where that is most.

    Infinite where one of them holds what is not a number.
    """
    most = 0.0
    for name in wanted:
        way, off = (_squared(wanted[name], state[name]) for state in (before, other))
        if off != 0:
            most = max(most, math.sqrt(off / way) if way > 0 and math.isfinite(off / way) else math.inf)
    return most


def _squared(some: list[Tensor], others: list[Tensor]) -> float:
    """The squared distance of two lists of tensors."""
    return sum((a.double() - b.double()).square().sum().item() for a, b in zip(some, others, strict=True))
