"""Table 1 measured: cells, the search for the largest micro-batch, and out of memory as a figure."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from helix.bench import Conditions
from helix.gpu import lengths as module
from helix.gpu.lengths import FINENESS, Largest, Shapes, cells_of, largest, table1
from helix.gpu.section import Stage
from helix.training.resident import ResidentStep

SHAPES = Shapes(
    backbones={"mamba": ("mamba",), "attention": ("attention",)},
    tokens=(16,),
    precisions=("fp32",),
    width=16,
    most_batch=3,
    search_s=20,
)


def stage(seconds: float = 60) -> Stage:
    return Stage.begin(torch.device("cpu"), Conditions(repeats=1), seconds)


def always() -> bool:
    return True


@pytest.mark.parametrize("first", [1, 7, 100, 5000])
@pytest.mark.parametrize("limit", [0, 1, 2, 5, 13, 100, 999])
def test_the_largest_that_fits_is_found_to_a_sixteenth_wherever_one_begins(limit: int, first: int):
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest(fits, 4096, first=first, time_left=always)
    assert found.whole
    assert limit - max(1, limit // FINENESS) < found.clips <= limit or found.clips == limit == 0
    assert len(asked) == len(set(asked)) <= 25


def test_a_search_that_reaches_its_bound_says_that_more_might_fit():
    assert largest(lambda _: True, 10, time_left=always) == Largest(clips=10, whole=False)


def test_a_search_without_time_says_so():
    turns = iter([True, True, False])
    found = largest(lambda _: True, 1000, time_left=lambda: next(turns))
    assert found == Largest(clips=2, whole=False)


def test_every_backbone_length_attention_and_precision_is_a_cell():
    shapes = replace(
        SHAPES, backbones=SHAPES.backbones | {"helix": ("mamba", "attention")}, precisions=("fp32", "bf16")
    )
    names = [cell.name for cell in cells_of(shapes)]
    assert names == [
        *("mamba, L=16, fp32", "mamba, L=16, bf16"),
        *("attention, weights, L=16, fp32", "attention, weights, L=16, bf16"),
        *("attention, SDPA, L=16, fp32", "attention, SDPA, L=16, bf16"),
        *("helix, weights, L=16, fp32", "helix, weights, L=16, bf16"),
        *("helix, SDPA, L=16, fp32", "helix, SDPA, L=16, bf16"),
    ]


def test_the_papers_word_stands_beside_the_authors_attention_only():
    said = {cell.name: cell.paper for cell in cells_of(replace(SHAPES, tokens=(30_000,)))}
    assert said == {
        "mamba, L=30,000, fp32": "trains",
        "attention, weights, L=30,000, fp32": "OOM",
        "attention, SDPA, L=30,000, fp32": "",
    }


def test_a_cell_has_memory_foretold_and_measured_a_time_and_a_micro_batch():
    part = table1(stage(), SHAPES)
    (table,) = part.tables
    assert table.title.startswith("Table 1 of the paper")
    for row in table.rows:
        measured, taken, foretold, _, step_ms, clips = row.values
        assert measured is not None and taken is None and foretold and step_ms and clips == 3
        assert "at least" in row.note
    assert len(part.loads) == 3
    assert {target.verdict for target in part.targets} == {"not measured"}


def out_of_memory_above(most: int, error: Exception) -> Callable[..., None]:
    def steps(stage: Stage, cell: module.Cell, batch: int) -> None:
        if batch > most or (cell.attn_impl == "weights" and cell.tokens == 16):
            raise error

    return steps


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13.41 GiB.\nGPU 0 has ..."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_running_out_of_memory_fills_a_cell_and_ends_a_search(monkeypatch: pytest.MonkeyPatch, error: Exception):
    for name in ("_steps", "_try"):
        monkeypatch.setattr(module, name, out_of_memory_above(2, error))
    (table,) = table1(stage(), SHAPES).tables
    rows = {row.name: row for row in table.rows}
    full = rows["attention, weights, L=16, fp32"]
    assert full.values[0] is None and full.values[2] and full.values[-1] == 0 and full.note == "out of memory"
    assert rows["mamba, L=16, fp32"].values[-1] == 2 and rows["mamba, L=16, fp32"].note == ""


def test_an_error_that_is_not_of_memory_is_told_and_stops_no_cell(monkeypatch: pytest.MonkeyPatch):
    def steps(*_: object) -> None:
        raise RuntimeError("no kernel image")

    for name in ("_steps", "_try"):
        monkeypatch.setattr(module, name, steps)
    (table,) = table1(stage(), SHAPES).tables
    assert all("no kernel image" in row.note and row.values[0] is None for row in table.rows)


def test_a_cpu_is_not_asked_for_what_it_has_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    (table,) = table1(stage(), SHAPES).tables
    assert all("not run: needs" in row.note for row in table.rows)


def test_without_a_bound_on_clips_no_search_is_made():
    (table,) = table1(stage(), replace(SHAPES, most_batch=0)).tables
    assert {row.values[-1] for row in table.rows} == {None}


def test_a_try_is_one_step_of_so_many_clips_with_the_optimisers_state_there(monkeypatch: pytest.MonkeyPatch):
    taken = []

    class Watched(ResidentStep):
        def __call__(self) -> torch.Tensor:
            taken.append((len(self.batch.label_B), self.batch.wave_BT.shape, len(self.optimizer.state) > 0))
            return super().__call__()

    monkeypatch.setattr(module, "ResidentStep", Watched)
    (cell,) = cells_of(replace(SHAPES, backbones={"mamba": ("mamba",)}))
    module._try(stage(), cell, 5)
    assert taken == [(1, (1, cell.samples), False), (5, (5, cell.samples), True)]


@pytest.mark.parametrize(("tokens", "times"), [(3000, 1), (30_000, 3)])
def test_a_search_among_long_clips_may_take_longer(tokens: int, times: int, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def try_(*_: object) -> None:
        now[0] += 5.0

    monkeypatch.setattr(module, "_try", try_)
    monkeypatch.setattr(module, "_require_room", lambda *_: None)
    monkeypatch.setattr(module, "_guess", lambda *_: 1)
    shapes = replace(SHAPES, tokens=(tokens,), backbones={"mamba": ("mamba",)}, most_batch=2**40, search_s=10)
    there = replace(stage(), clock=lambda: now[0], until=1000.0)
    found = module._largest(there, shapes, next(cells_of(shapes)))
    assert found == Largest(clips=2 ** (2 * times - 1), whole=False)


def test_a_search_begins_at_what_this_process_may_take_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    held = {"mem_get_info": (70.0, 80.0), "get_per_process_memory_fraction": 0.5, "memory_reserved": 10}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    device = torch.device("cuda", 0)
    assert module._free_bytes(device) == 30
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert module._free_bytes(device) == 70


@pytest.mark.gpu
def test_on_a_gpu_a_step_takes_what_was_foretold():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_gpu = Stage.begin(torch.device("cuda"), Conditions(repeats=1), 60)
    shapes = replace(SHAPES, tokens=(3000,), width=256, most_batch=0)
    (table,) = table1(on_gpu, shapes).tables
    for row in table.rows:
        assert row.values[0] and row.values[2] and 0.7 < row.values[2] / row.values[0] < 1.3


def test_the_step_is_on_the_device_that_is_asked_for():
    (cell,) = cells_of(replace(SHAPES, backbones={"mamba": ("mamba",)}))
    step = module._step(stage(), cell, 2)
    assert isinstance(step, ResidentStep) and len(step.batch.label_B) == 2
