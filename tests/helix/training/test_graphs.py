"""Steps that are replayed give the bits of steps that are not, and a recording that would not is found out.

On a CPU a tape stands in for a CUDA graph: it keeps every operator of the recorded step with the tensors that it read
and wrote, and does them again on the same memory, without the Python in between. What a graph would miss, it misses.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from helix.data.shards import Recordings
from helix.determinism import ask_for_the_same_bits
from helix.protocol import profile
from helix.spec import TrialSpec
from helix.storage import FolderStorage
from helix.training import graphs, trainer
from helix.training.graphs import Graphed
from helix.training.step import Found, Inputs
from helix.training.trainer import Fit, StoppedError, fit
from orchestration.grid import VARIANTS
from tests.conftest import with_training
from tests.helix.training.test_step import Unwaited


class Tape(Unwaited):
    """Every operator while it is on; a wait for a result fails as it does while a graph is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.plays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # As they are at this call, on the same memory: some operators change the shape of what they are given.
        given = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, *given, tree_map_only(Tensor, Tensor.detach, result)))
        return result

    @torch.no_grad()
    def play(self) -> None:
        self.plays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for held, made in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(held, Tensor) and held.untyped_storage()._cdata != made.untyped_storage()._cdata:
                    held.copy_(made)


TAPES: list[Tape] = []


def tape(_device: torch.device, run: Callable[[], None], recorded: Callable[[], None]) -> Callable[[], None]:
    for _ in range(graphs.WARM_UP):
        run()
    TAPES.append(Tape())
    with TAPES[-1]:
        recorded()
    return TAPES[-1].play


@pytest.fixture
def taped(monkeypatch) -> list[Tape]:
    """From here on a CPU has tapes for graphs and, as CUDA does, a rate that lies in memory."""
    TAPES.clear()
    monkeypatch.setitem(graphs.CAPTURES, "cpu", tape)
    rate_in_memory(monkeypatch)
    return TAPES


def rate_in_memory(monkeypatch) -> None:
    real = trainer.build_optimizer

    def build(*arguments: Any) -> torch.optim.AdamW:
        optimizer = real(*arguments)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return optimizer

    monkeypatch.setattr(trainer, "build_optimizer", build)


def science(result: dict[str, Any]) -> tuple[Any, ...]:
    """What must not depend on graphs."""
    losses = [(row["train_losses"], row["test_loss"], row["train_accuracy"]) for row in result["rows"]]
    return result["weights_sha256"], losses, result["confusion"], result["skipped_steps"]


def run(spec: TrialSpec, data: Recordings, folder, **how: Any) -> tuple[Any, ...]:
    return science(fit(spec, data, Fit(storage=FolderStorage(folder), **how)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_ends_with_the_bits_that_it_has_without_a_graph(variant, tiny_spec, tiny_data, tmp_path, taped):
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4])
    spec = replace(with_training(tiny_spec, epochs=2), model=model)
    assert run(spec, tiny_data, tmp_path / "a", graphs="on") == run(spec, tiny_data, tmp_path / "b", graphs="off")
    assert [one.plays for one in taped] == [6]


@pytest.mark.parametrize("name", ["authors", "fair"])
def test_so_does_every_profile(name, tiny_spec, tiny_data, tmp_path, taped):
    """Other schedules, masks, mixup of features, decay: each of them is in the step."""
    spec = replace(with_training(tiny_spec, epochs=2), protocol=profile(name))
    spec = replace(spec, protocol=replace(spec.protocol, mixup_on="features", schedule_unit="step", pad_mask="clip"))
    assert run(spec, tiny_data, tmp_path / "a", graphs="on") == run(spec, tiny_data, tmp_path / "b", graphs="off")
    assert len(taped) == 1 and taped[0].plays


@pytest.mark.parametrize(
    "how", [{"micro_batch": 7}, {"micro_batch": 7, "recompute": True}, {"ahead": 2}, {"placement": "device"}], ids=str
)
def test_however_the_step_is_run_a_graph_of_it_has_its_bits(how, tiny_spec, tiny_data, tmp_path, taped):
    spec = with_training(tiny_spec, epochs=2, precision="bf16")
    found = run(spec, tiny_data, tmp_path / "a", graphs="on", **how)
    assert found == run(spec, tiny_data, tmp_path / "b", graphs="off", **how)
    assert [one.plays for one in taped] == [6]


@pytest.mark.parametrize("first", ["on", "off"])
def test_a_trial_goes_on_with_a_graph_or_without_as_if_it_had_never_stopped(
    first, tiny_spec, tiny_data, tmp_path, taped
):
    steps: list[int] = []
    how: dict[str, Any] = {"on_step": steps.append, "stop_now": lambda: len(steps) == 4}
    with pytest.raises(StoppedError):
        run(tiny_spec, tiny_data, tmp_path / "a", graphs=first, **how)
    second = "off" if first == "on" else "on"
    found = run(tiny_spec, tiny_data, tmp_path / "a", graphs=second)
    assert found == run(tiny_spec, tiny_data, tmp_path / "b", graphs="off")
    assert len(taped) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_a_trial_that_is_rolled_back_is_recorded_again(saved, tiny_spec, tiny_data, tmp_path, taped, monkeypatch):
    """Its moments lie elsewhere then, and where nothing was saved its weights too."""
    real = trainer.train_step
    left = {"on": 1, "off": 1}

    def once_spoiled(*arguments: Any, **options: Any) -> Found:
        loss, norm, hits = real(*arguments, **options)
        at, way = arguments[-1], "off" if options["replay"] is None else "on"
        if (at.epoch, at.step) == (1, 1) and left[way]:
            left[way] -= 1
            loss = loss * torch.inf
        return loss, norm, hits

    monkeypatch.setattr(trainer, "train_step", once_spoiled)
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, divergence="rollback"))
    calls: list[int] = []
    # Saved after the steps of the first epoch, or never before the divergence.
    how: dict[str, Any] = {"on_step": calls.append, "save_every_s": 1e9}
    how["save_now"] = lambda: saved and calls[-1] == 2
    found = run(spec, tiny_data, tmp_path / "a", graphs="on", **how)
    assert found == run(spec, tiny_data, tmp_path / "b", graphs="off", **how)
    assert found[-1] == [5] and len(taped) == 2 and all(one.plays for one in taped)


# A recording that is wrong


def nothing(_device, _run, _recorded) -> Callable[[], None]:
    """A graph that holds no work."""
    return lambda: None


def forgetful(device, run, recorded) -> Callable[[], None]:
    """A graph that reads inputs of its own, as one would that was recorded on copies of them."""
    one = run.__self__
    held = one._inputs
    one._inputs = Inputs(**{name: tensor.clone() for name, tensor in vars(held).items()})
    try:
        return tape(device, run, recorded)
    finally:
        one._inputs = held


def without_update(device, run, recorded) -> Callable[[], None]:
    """A graph that ends before the optimiser."""
    play, calls = tape(device, run, recorded), TAPES[-1].calls
    last = next(n for n, call in enumerate(calls) if "_fused_adamw" in str(call[0]))
    del calls[last:]
    return play


def unrecorded(_device, run, _recorded) -> Callable[[], None]:
    run()
    raise RuntimeError("operation not permitted when stream is capturing\n(and more lines)")


class OutOfResources(Exception):  # noqa: N818
    """As Triton's, which is no RuntimeError."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(""), "RuntimeError"),
        (
            OutOfResources("out of resource: shared memory, Required: 262144\nReduce"),
            "out of resource: shared memory, Re",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (AssertionError(), "AssertionError"),
    ],
    ids=repr,
)
def test_whatever_a_recording_raises_the_training_goes_on_without_a_graph(error, said, caplog):
    def capture(_device, run, _recorded) -> Callable[[], None]:
        run()
        raise error

    toy, twin = Toy(capture), Toy(nothing)
    for seed in range(3):
        twin.optimizer.zero_grad()
        given = toy_inputs(8, seed)
        assert [found.item() for found in toy.step(given)] == [found.item() for found in twin.take(given)]
    assert torch.equal(toy.model.weight, twin.model.weight) and not toy.step.replays
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"goes on without: it could not be recorded: {said}" in message and "\n" not in message


def test_who_interrupts_a_recording_ends_the_training():
    def capture(_device, run, _recorded) -> Callable[[], None]:
        run()
        raise KeyboardInterrupt

    toy = Toy(capture)
    before = toy.model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        toy.step(toy_inputs(8, 0))
    assert torch.equal(toy.model.weight, before)


@pytest.mark.parametrize("capture", [nothing, forgetful, without_update, unrecorded])
def test_a_wrong_recording_is_found_out_and_changes_no_bit(
    capture, tiny_spec, tiny_data, tmp_path, taped, monkeypatch, caplog
):
    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    found = run(tiny_spec, tiny_data, tmp_path / "a", graphs="on")
    assert "no CUDA graph, the training goes on without" in caplog.text
    assert found == run(tiny_spec, tiny_data, tmp_path / "b", graphs="off")


def test_a_number_that_was_recorded_as_a_constant_is_found_out(tiny_spec, tiny_data, tmp_path, monkeypatch, caplog):
    """Here the rate, which falls with each step and is no tensor: the first replay is right and the second is not."""
    monkeypatch.setitem(graphs.CAPTURES, "cpu", tape)
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, schedule_unit="step"))
    found = run(spec, tiny_data, tmp_path / "a", graphs="on")
    assert "of the step away from the step, which is 0.0e+00 from itself" in caplog.text
    assert TAPES[-1].plays == 2
    assert found == run(spec, tiny_data, tmp_path / "b", graphs="off")


def test_without_memory_for_the_first_checks_the_training_goes_on_without_a_graph(
    tiny_spec, tiny_data, tmp_path, taped, monkeypatch, caplog
):
    """Memory runs out in the middle of a step: its weights are changed and what it found is not there yet."""
    real, steps, emptied = Graphed._run, [], []

    def short_of_memory(one: Graphed) -> None:
        real(one)
        steps.append(one)
        if len(steps) == graphs.WARM_UP + 2:  # the recording runs it once
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Graphed, "_run", short_of_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(steps)))
    found = run(tiny_spec, tiny_data, tmp_path / "a", graphs="on")
    assert "goes on without: there is no memory for it beside a step that is not one" in caplog.text
    assert taped[0].plays == 0 and len(emptied) == 1
    assert found == run(tiny_spec, tiny_data, tmp_path / "b", graphs="off")


def test_trouble_that_is_not_of_memory_ends_the_step():
    def broken(_device, run, _recorded) -> Callable[[], None]:
        def replay() -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        return replay

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        Toy(broken).step(toy_inputs(8, 0))


def test_memory_of_the_steps_without_a_graph_is_given_back_once_the_checks_are_done(monkeypatch):
    toy, emptied = Toy(tape), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(step))
    for step in range(5):
        toy.step(toy_inputs(8, step))
    assert emptied == [graphs.CHECKED - 1]


class Toy:
    """A linear model that is fitted to inputs, with noise in its gradient where that is asked for."""

    def __init__(self, capture: graphs.Capture, *, noise: float = 0.0):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        rate = torch.tensor(1e-2, dtype=torch.float64)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, fused=True)
        self.noise = noise
        self.step = Graphed(self.take, self.model, self.optimizer, capture)

    def take(self, inputs: Inputs) -> Found:
        y_B = self.model(inputs.wave_BT).squeeze(1)
        loss = (inputs.weight * (y_B - inputs.label_B) ** 2).sum()
        (loss * (1 + self.noise * torch.randn(()))).backward()
        self.optimizer.step()
        return loss.detach().double(), loss.detach().double(), loss.detach().double()


def toy_inputs(clips: int, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    return Inputs(
        wave_BT=torch.randn(clips, 4, generator=random),
        label_B=torch.randint(3, (clips,), generator=random),
        samples_B=torch.full((clips,), 4),
        partner_B=torch.arange(clips),
        weight=torch.rand((), generator=random),
        partner_weight=torch.zeros(()),
    )


def rough(times: float) -> graphs.Capture:
    """A graph whose result differs from the step's by so many times its own noise."""

    def capture(_device, run, _recorded) -> Callable[[], None]:
        toy = run.__self__.take.__self__

        def replay() -> None:
            before, toy.noise = toy.noise, times * toy.noise
            run()
            toy.noise = before

        return replay

    return capture


@pytest.mark.parametrize(("times", "kept"), [(1.0, True), (1e5, False)])
def test_where_two_steps_differ_a_replay_may_too_and_not_by_much_more(times, kept):
    toy = Toy(rough(times), noise=1e-6)
    for seed in range(4):
        toy.step(toy_inputs(8, seed))
    assert toy.step.replays == kept


def test_a_batch_of_another_size_is_taken_without_the_graph():
    toy, twin = Toy(tape), Toy(nothing)
    TAPES.clear()
    for seed, clips in enumerate((8, 8, 8, 5, 8)):
        twin.optimizer.zero_grad()
        toy.optimizer.zero_grad()
        given = toy_inputs(clips, seed)
        assert [found.item() for found in toy.step(given)] == [found.item() for found in twin.take(given)]
    assert TAPES[-1].plays == 4
    assert torch.equal(toy.model.weight, twin.model.weight)


def test_what_a_replay_found_is_not_overwritten_by_the_next():
    toy = Toy(tape)
    found = [toy.step(toy_inputs(8, seed))[0] for seed in range(5)]
    assert len({loss.item() for loss in found}) == 5


# torch's side of a recording


class Allocator:
    """torch's, as far as recordings go: what it holds, in the words of its source, and where it gives up."""

    def __init__(self) -> None:
        self.captures_underway: list[tuple[int, int]] = []
        self.use_count: dict[tuple[int, int], int] = {}
        self.handles = 0

    def handle(self) -> tuple[int, int]:
        self.handles += 1
        return 0, self.handles

    def begin(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 1
        self.use_count[pool] = self.use_count.get(pool, 0) + 1
        self.captures_underway.append(pool)

    def end(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 1
        if pool not in self.captures_underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures_underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert device == 1
        self.use_count[pool] -= 1
        assert self.use_count[pool] >= 0, "INTERNAL ASSERT FAILED"

    def empty_cache(self) -> None:
        assert not self.captures_underway, "captures_underway.empty() INTERNAL ASSERT FAILED"


class Context:
    """`torch.cuda.device` and `torch.cuda.stream`, of which there are none here."""

    def __init__(self, _value: object):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass


class Stream:
    def wait_stream(self, _other: "Stream") -> None:
        pass


@pytest.fixture
def allocator(monkeypatch) -> Allocator:
    """torch.cuda without a GPU: its recording as in torch 2.13, with a `recorded` that says what became of it."""
    made = Allocator()

    class CudaGraph:
        """One that is invalid cannot be ended, and releases its pool only where it was."""

        pool: tuple[int, int] | None = None
        valid = True

        def replay(self) -> None:
            pass

        def __del__(self) -> None:
            if self.pool:
                made.release(1, self.pool)

    class Recording:
        def __init__(self, graph: CudaGraph, *, pool: tuple[int, int], capture_error_mode: str):
            assert capture_error_mode == "thread_local"
            self.graph, self.pool = graph, pool

        def __enter__(self) -> None:
            made.begin(1, self.pool)

        def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
            if kind is torch.AcceleratorError:
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
            made.end(1, self.pool)
            self.graph.pool = self.pool

    for name, stand_in in {
        "device": Context,
        "stream": Context,
        "Stream": Stream,
        "current_stream": Stream,
        "current_device": lambda: 1,
        "CUDAGraph": CudaGraph,
        "graph": Recording,
        "graph_pool_handle": made.handle,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", made.release)
    monkeypatch.setattr(graphs, "_UNENDED", [])
    return made


def recorded_as(error: Exception | None) -> Callable[[], None]:
    def recorded() -> None:
        if error is not None:
            raise error

    return recorded


def test_a_recording_that_cuda_calls_invalid_leaves_no_pool_open_in_the_allocator(allocator):
    invalid = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        graphs.cuda_graph(torch.device("cuda:1"), lambda: None, recorded_as(invalid))
    allocator.empty_cache()
    assert allocator.use_count == {(0, 1): 0}
    assert len(graphs._UNENDED) == 1, "the allocator of pinned memory asks it again"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("of ours")], ids=str)
def test_a_recording_that_ends_in_another_error_is_left_to_torch(error, allocator):
    with pytest.raises(type(error)):
        graphs.cuda_graph(torch.device("cuda:1"), lambda: None, recorded_as(error))
    error.__traceback__ = None  # its frames hold the graph
    allocator.empty_cache()
    assert allocator.use_count == {(0, 1): 0} and not graphs._UNENDED


def test_a_graph_has_its_pool_for_as_long_as_it_can_be_replayed(allocator):
    replay = graphs.cuda_graph(torch.device("cuda:1"), lambda: None, recorded_as(None))
    allocator.empty_cache()
    assert allocator.use_count == {(0, 1): 1}
    del replay
    assert allocator.use_count == {(0, 1): 0} and not graphs._UNENDED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_a_recording_that_fails_leaves_a_process_that_can_go_on():
    """What waits for the device makes it invalid; the allocator has to give memory back and to record after it."""
    device, held = torch.device("cuda"), torch.zeros(1 << 20, device="cuda")

    def adds() -> None:
        held.add_(1)

    def waits() -> None:
        adds()
        torch.cuda.synchronize()

    for _ in range(2):
        with pytest.raises(RuntimeError):
            graphs.cuda_graph(device, adds, waits)
        torch.cuda.empty_cache()
        assert torch.ones(1 << 10).pin_memory().is_pinned() and torch.rand(2, device=device).isfinite().all()
        replay, before = graphs.cuda_graph(device, adds, adds), held[0].item()
        replay()
        assert held[0].item() == before + 1


# Where there is one


@pytest.mark.parametrize(
    ("choice", "device", "ranks", "tokens", "reason"),
    [
        ("auto", "cuda", 1, 16_000, None),
        ("auto", "cuda:1", 1, 80, None),
        ("auto", "cuda", 1, 96_000, "96,000 tokens in flight keep the device busy"),
        ("on", "cuda", 1, 96_000, None),
        ("off", "cuda", 1, 80, "graphs are switched off"),
        ("auto", "cpu", 1, 80, "a device of type cpu has none"),
        ("on", "cpu", 1, 80, "a device of type cpu has none"),
        ("on", "cuda", 2, 80, "2 ranks meet within each step"),
    ],
)
def test_there_is_a_graph_where_launches_take_longer_than_the_work(choice, device, ranks, tokens, reason):
    found = graphs.why_not(choice, device, ranks=ranks, tokens=tokens)
    assert found == reason if reason is None else found is not None and found.startswith(reason)


def test_the_environment_has_its_say_where_nobody_else_has(monkeypatch):
    monkeypatch.setenv("HELIX_GRAPHS", "off")
    assert graphs.why_not("auto", "cuda", ranks=1, tokens=80) == "graphs are switched off"
    assert graphs.why_not("on", "cuda", ranks=1, tokens=80) is None
    monkeypatch.setenv("HELIX_GRAPHS", "maybe")
    with pytest.raises(ValueError, match="HELIX_GRAPHS is 'maybe'; wanted auto, on or off"):
        graphs.asked("auto")


def test_a_graph_that_was_asked_for_and_cannot_be_is_a_warning(tiny_spec, tiny_data, storage, caplog):
    fit(with_training(tiny_spec, epochs=1), tiny_data, Fit(storage=storage, graphs="on"))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "no CUDA graph: a device of type cpu has none"
    ]


@pytest.fixture(scope="module")
def deterministic() -> Iterator[ProcessPoolExecutor]:
    """A process that is told before CUDA starts, as a worker is by --deterministic. It may be too late in this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=ask_for_the_same_bits) as process:
        yield process


def with_a_graph_and_without(
    spec: TrialSpec, data: Recordings, folder: Path, **how: Any
) -> tuple[list[Any], list[str]]:
    """The science of both, and what was said of graphs meanwhile, each line with its level before it."""
    torch.set_num_threads(1)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")
    graphs.logger.setLevel(logging.INFO)
    graphs.logger.addHandler(handler)
    try:
        return [run(spec, data, folder / on, graphs=on, **how) for on in ("on", "off")], said
    finally:
        graphs.logger.removeHandler(handler)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_on_a_gpu_a_graph_has_the_bits_of_the_steps_without_one(
    variant, precision, tiny_spec, tiny_data, tmp_path, deterministic
):
    """By deterministic kernels alone: torch's attention and cuDNN else add in whatever order parts arrive."""
    model = replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4])
    spec = replace(with_training(tiny_spec, batch_size=8, precision=precision), model=model)
    for name, how in (("whole", {}), ("in parts", {"micro_batch": 3, "recompute": True})):
        how["device"] = "cuda"
        asked = deterministic.submit(with_a_graph_and_without, spec, tiny_data, tmp_path / name, **how)
        (found, wanted), said = asked.result()
        assert found == wanted
        assert any("a replayed step is 0.0e+00 of it from the step" in line for line in said)
        assert not [line for line in said if not line.startswith("INFO")]
