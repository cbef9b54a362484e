"""Memory: what is predicted from shapes is what a process then holds, and a batch is cut to fit or refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helix.protocol import profile
from helix.spec import ModelSpec, TrainingSpec, TrialSpec
from helix.training import memory
from helix.training.feasibility import Cell, Measurement, MeasurementError, measure, table
from helix.training.graphs import CAPTURES
from helix.training.memory import BOUNDS, Ledger, Placement, Prediction, choose, needed_bytes, predict
from helix.training.resident import ResidentStep
from orchestration.grid import BACKBONES

CLASSES = 50
MIB = 2**20

#: Lengths in tokens; attention takes quadratic time, so the last one is its longest that a test can wait for.
LENGTHS = (500, 2_000, 4_000)


def spec_of(backbone: str, *, batch: int = 1, width: int = 64, **protocol) -> TrialSpec:
    return TrialSpec(
        model=ModelSpec(pattern=BACKBONES[backbone], width=width, options={"mamba": {"d_state": 6}}),
        training=TrainingSpec(batch_size=batch),
        protocol=replace(profile("paper"), **protocol),
    )


def sizes(tokens: int, **options) -> dict:
    return {"samples": 160 * tokens, "classes": CLASSES, **options}


@pytest.mark.parametrize(("tokens", "recompute"), [*((tokens, False) for tokens in LENGTHS), (LENGTHS[-1], True)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_process_holds_what_was_predicted(backbone, tokens, recompute):
    spec = spec_of(backbone)
    predicted = predict(spec, **sizes(tokens, recompute=recompute))
    found = measure(spec, **sizes(tokens, recompute=recompute), compact=True, steps=2, threads=1)
    assert found.peak_bytes <= predicted.upper_bytes("compact")
    # Only libraries and page tables come on top, so less than predicted would be a tensor that is not there.
    assert found.peak_bytes >= predicted.peak_bytes * (1 - BOUNDS["compact"].relative)


def test_on_a_heap_it_stays_within_the_bound_of_heaps_and_in_micro_batches_too():
    spec = spec_of("helix", batch=8)
    for micro_batch in (None, 3):
        predicted = predict(spec, **sizes(500, micro_batch=micro_batch))
        found = measure(spec, **sizes(500, micro_batch=micro_batch), compact=False, steps=3, threads=1)
        assert predicted.peak_bytes * 0.9 <= found.peak_bytes <= predicted.upper_bytes("heap")


def test_a_prediction_allocates_nothing_and_draws_nothing():
    before = torch.get_rng_state()
    # A petabyte of clips would not go unnoticed.
    predicted = predict(spec_of("attention", batch=4, attn_impl="weights"), **sizes(3_000_000))
    assert predicted.peak_bytes > 2**50
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_and_moments_are_counted_exactly():
    parts = predict(spec_of("mamba"), **sizes(500))
    again = predict(spec_of("mamba"), **sizes(3_000))
    # Four bytes each, two moments and a step counter for every tensor.
    assert 2 * parts.parameters <= parts.optimizer <= 2 * parts.parameters + 4 * 200
    assert (parts.parameters, parts.optimizer) == (again.parameters, again.optimizer)


def test_memory_is_linear_in_tokens_unless_attention_keeps_its_weights():
    def growth(attn_impl: str) -> float:
        spec = spec_of("attention", attn_impl=attn_impl)
        return predict(spec, **sizes(20_000)).activations / predict(spec, **sizes(10_000)).activations

    assert growth("sdpa") == pytest.approx(2, rel=0.01)
    assert growth("weights") > 3.8


def test_a_ledger_sees_storages_come_and_go():
    with Ledger() as ledger:
        kept = torch.zeros(1000)
        view = kept[10:]
        gone = torch.ones(5000)
        del gone
        assert ledger.live.total() == 4 * 1000
    assert ledger.peak.total() == 4 * 6000
    assert view.untyped_storage().nbytes() == 4000


def test_any_number_of_passes_is_told_from_a_few():
    spec = spec_of("helix", batch=12, width=32)
    told = predict(spec, **sizes(400, micro_batch=2))
    counted = memory._simulate(memory.resolve(spec), **sizes(400, micro_batch=2, recompute=False), passes=6)
    assert told.peak_bytes == pytest.approx(counted.peak_bytes, rel=1e-3)


def test_where_the_batch_itself_is_the_most_it_is_what_counts():
    tiny = replace(spec_of("attention", batch=64, width=8), model=ModelSpec(pattern=("attention",), width=8))
    told = predict(tiny, **sizes(1_000, micro_batch=1))
    counted = memory._simulate(memory.resolve(tiny), **sizes(1_000, micro_batch=1, recompute=False), passes=64)
    assert told.peak_bytes == pytest.approx(counted.peak_bytes, rel=1e-3)
    assert told.peak_bytes > 5 * 64 * 160 * 1_000 * 4


def test_the_reference_scan_is_told_from_short_clips(monkeypatch):
    monkeypatch.setenv("HELIX_SCAN", "reference")
    spec = replace(spec_of("mamba", width=32), model=ModelSpec(pattern=("mamba",), width=32))
    told = predict(spec, **sizes(800))
    counted = memory._simulate(memory.resolve(spec), **sizes(800, micro_batch=1, recompute=False))
    assert told.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.04)


# What differs on a GPU.


def half(backbone: str, **protocol) -> TrialSpec:
    spec = spec_of(backbone, **protocol)
    return replace(spec, training=replace(spec.training, precision="bf16"))


def test_on_a_gpu_a_softmax_is_in_float32_whatever_the_precision():
    """There the weights of attention are kept as they are and as the product takes them: 4 bytes and 2 more."""
    tokens, layers, heads = 600, 6, 4

    def of_weights(device: str) -> float:
        """The bytes of each weight that are kept."""
        kept, none = (
            predict(half("attention", attn_impl=path), **sizes(tokens, device_type=device)).activations
            for path in ("weights", "sdpa")
        )
        return (kept - none) / (layers * heads * tokens**2)

    assert of_weights("cpu") == pytest.approx(2, rel=0.2)
    assert of_weights("cuda") == pytest.approx(6, rel=0.2)


def test_recomputing_on_a_gpu_is_by_its_rules_too():
    spec = half("attention", attn_impl="weights")
    more = {"device_type": "cuda", "recompute": True, "graphs": "off"}
    on_cpu, on_gpu = predict(spec, **sizes(3_000, recompute=True)), predict(spec, **sizes(3_000, **more))
    assert 1.4 * on_cpu.peak_bytes < on_gpu.peak_bytes < 2.1 * on_cpu.peak_bytes


def test_on_a_gpu_the_scan_keeps_halves_of_what_is_in_bf16():
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    spec, alone = half("mamba"), {"device_type": "cuda", "graphs": "off"}
    on_cpu, on_gpu = predict(spec, **sizes(10_000)), predict(spec, **sizes(10_000, **alone))
    assert on_gpu.activations < 0.65 * on_cpu.activations
    assert on_gpu.peak_bytes < 0.75 * on_cpu.peak_bytes
    # What was told of one device is not told of the other.
    assert predict(spec, **sizes(10_000)) == on_cpu


def test_what_the_backward_of_the_scan_holds_on_a_gpu_is_counted():
    """A state of every eighth token, N / 8 float32 tensors of the inner width."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    tokens, state = 10_000, 32
    spec = replace(half("mamba"), model=ModelSpec(pattern=("mamba",), width=64))
    found = predict(spec, **sizes(tokens, device_type="cuda"))
    assert found.transient > state // 8 * tokens * 2 * 64 * 4


def test_without_triton_the_operators_of_the_cpu_stand_in_and_triton_is_not_asked_for(monkeypatch):
    found, loaded = importlib.util.find_spec, memory.kernels
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    monkeypatch.setattr(memory, "kernels", lambda name: pytest.fail("loaded") if name == "triton" else loaded(name))
    on_gpu = predict(half("mamba"), **sizes(2_000, device_type="cuda", graphs="off"))
    assert on_gpu.activations >= predict(half("mamba"), **sizes(2_000)).activations


def test_a_graph_takes_a_step_more_where_one_will_be_recorded(monkeypatch):
    spec = spec_of("mamba", batch=8)

    def graph(tokens: int, **options) -> int:
        return predict(spec, **sizes(tokens, **{"device_type": "cuda", **options})).graph

    with_graph = predict(spec, **sizes(500, device_type="cuda"))
    without = predict(spec, **sizes(500, device_type="cuda", graphs="off"))
    step = without.gradients + without.activations + without.transient
    assert replace(with_graph, graph=0) == without
    assert with_graph.graph == step + 2 * (without.parameters + without.optimizer)
    assert with_graph.peak_bytes == without.peak_bytes + with_graph.graph
    # Not on a CPU, among several ranks, or for so many tokens in flight that a step needs none; fewer clips at a time
    # are fewer tokens.
    assert graph(500, device_type="cpu") == graph(500, ranks=2) == graph(3_000) == 0
    assert graph(3_000, graphs="on") > graph(3_000, micro_batch=1) > 0
    monkeypatch.setenv("HELIX_GRAPHS", "off")
    assert graph(500) == 0


def test_checking_a_recording_holds_what_is_told_of_it(monkeypatch):
    """By a capture that keeps no memory of its own: all but the step that a graph keeps has to be there."""
    monkeypatch.setitem(CAPTURES, "cpu", lambda _device, run, _recorded: run)
    spec, size = spec_of("mamba", batch=4, width=32), {"samples": 160 * 200, "classes": CLASSES}
    told = predict(spec, **size)
    assert told.graph > 0
    with Ledger("numba") as ledger:
        step = ResidentStep(spec, **size, graphs="on")
        for _ in range(2):
            step()
    kept = told.gradients + told.activations + told.transient
    assert ledger.peak.total() == pytest.approx(told.peak_bytes - kept, rel=0.1)


def test_where_no_graph_fits_the_step_alone_has_to(monkeypatch):
    spec = spec_of("mamba", batch=1)
    graph, alone = (predict(spec, **sizes(500, device_type="cuda", graphs=graphs)) for graphs in ("auto", "off"))
    room = {"limit_bytes": needed_bytes(alone, "cuda", compact=False), "device_type": "cuda"}
    assert choose(spec, **sizes(500), **room).predicted == alone
    room["limit_bytes"] = needed_bytes(graph, "cuda", compact=False)
    assert choose(spec, **sizes(500), **room).predicted == graph
    # The choice follows the environment, and is not remembered from another.
    monkeypatch.setenv("HELIX_GRAPHS", "off")
    assert choose(spec, **sizes(500), **room).predicted == alone


def test_a_step_with_its_graph_is_cut_before_the_graph_is_given_up():
    spec = spec_of("mamba", batch=16)
    whole = predict(spec, **sizes(500, device_type="cuda"))
    limit_bytes = needed_bytes(replace(whole, graph=whole.graph // 2), "cuda", compact=False)
    found = choose(spec, **sizes(500), limit_bytes=limit_bytes, device_type="cuda")
    assert found.predicted.graph > 0
    assert found.micro_batch is not None or found.recompute


# Choosing: a table of what was asked, with predictions that are made up.


@pytest.fixture
def made_up(monkeypatch):
    """Each clip keeps 100 MiB, or 10 where blocks are recomputed, over 50 MiB that are always there."""

    def predicted(spec: TrialSpec, *, samples: int, micro_batch: int, recompute: bool, **_: object) -> Prediction:
        each = (10 if recompute else 100) * MIB * samples // 80_000
        return Prediction(
            parameters=10 * MIB, gradients=10 * MIB, optimizer=20 * MIB, activations=micro_batch * each, transient=0
        )

    monkeypatch.setattr(memory, "predict", predicted)
    memory._choose.cache_clear()
    yield
    memory._choose.cache_clear()


def chosen(limit_mib: int, *, batch: int = 32, device="cpu") -> tuple[int | None, bool, bool]:
    limit_bytes = limit_mib * MIB + memory.PROCESS_BYTES[device]
    found: Placement = choose(spec_of("mamba", batch=batch), **sizes(500), limit_bytes=limit_bytes, device_type=device)
    assert found.needed_bytes <= limit_bytes
    return found.micro_batch, found.recompute, found.compact


@pytest.mark.parametrize(
    ("limit_mib", "batch", "device", "wanted"),
    [
        (10_000, 32, "cpu", (None, False, False)),  # all of it fits
        (4_000, 32, "cpu", (16, False, False)),  # a core is busy with 16 clips as well
        (2_000, 32, "cpu", (11, False, False)),  # 11 + 11 + 10, and not 12 + 12 + 8
        (2_000, 30, "cpu", (10, False, False)),
        (270, 32, "cpu", (1, False, False)),
        (220, 32, "cpu", (1, False, True)),  # the heap would not do
        (130, 32, "cpu", (3, True, True)),  # not one clip that keeps everything
        (2_600, 32, "cuda", (None, True, False)),  # 16 clips of 500 tokens leave a GPU idle
        (10_000, 32, "cuda", (None, False, False)),
    ],
)
def test_a_batch_is_cut_as_little_and_as_cheaply_as_fits(made_up, limit_mib, batch, device, wanted):
    assert chosen(limit_mib, batch=batch, device=device) == wanted


def test_without_a_limit_nothing_is_cut(made_up):
    found = choose(spec_of("mamba", batch=32), **sizes(500), limit_bytes=None)
    assert (found.micro_batch, found.recompute, found.compact) == (None, False, False)


def test_what_cannot_fit_is_refused_with_what_would():
    spec = spec_of("helix", attn_impl="weights")
    limit_bytes = memory.PROCESS_BYTES["cpu"] + 600 * MIB
    with pytest.raises(ValueError, match="does not fit") as refused:
        choose(spec, **sizes(12_000), limit_bytes=limit_bytes)
    said = str(refused.value)
    assert "protocol.attn_impl=sdpa" in said
    assert "a limit of" in said
    tokens = int(said.partition("clips of ")[2].partition(" tokens")[0].replace(",", ""))
    assert 0 < tokens < 12_000
    fitting = choose(spec, **sizes(tokens), limit_bytes=limit_bytes)
    assert fitting.needed_bytes <= limit_bytes


def test_the_limit_that_a_refusal_names_is_enough():
    spec = spec_of("mamba", batch=2)
    needed = needed_bytes(predict(spec, **sizes(3_000, micro_batch=1, recompute=True)), "cpu", compact=True)
    assert choose(spec, **sizes(3_000), limit_bytes=needed).recompute
    with pytest.raises(ValueError, match="does not fit"):
        choose(spec, **sizes(3_000), limit_bytes=needed - 1)


def test_a_container_may_have_less_than_its_machine(tmp_path: Path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert memory._cgroup_bytes(tmp_path) == [450]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_bytes(tmp_path) == []
    assert memory._cgroup_bytes(tmp_path / "elsewhere") == []


def test_a_process_that_fails_to_measure_says_why():
    with pytest.raises(MeasurementError, match="width"):
        measure(replace(spec_of("mamba"), model=ModelSpec(width=66, pattern=("attention",))), **sizes(500))


def test_the_table_has_its_figures_of_a_cpu_also_where_a_scan_of_a_gpu_is_asked_for(monkeypatch):
    def cells() -> list[Cell]:
        return table({"mamba": ("mamba",)}, tokens=(500,), width=32, recomputing=(False,))

    wanted = cells()
    monkeypatch.setenv("HELIX_SCAN", "mamba_ssm")
    assert cells() == wanted


def test_the_table_of_the_paper_says_where_memory_is_quadratic():
    cells = {(cell.backbone, cell.attn_impl, cell.recompute): cell for cell in table(dict(BACKBONES), tokens=(30_000,))}
    gpu = 48 * 10**9
    assert cells["attention", "weights", False].verdict(gpu) == "no"
    assert cells["attention", "sdpa", False].verdict(gpu) == "fits"
    assert cells["attention", "weights", False].paper == "OOM"
    assert ("mamba", "weights", False) not in cells
    for backbone in BACKBONES:
        kept, recomputed = (cells[backbone, "sdpa", recompute].predicted.peak_bytes for recompute in (False, True))
        # The targets, less half a gigabyte of process.
        assert kept <= (4.5e9 if backbone == "attention" else 6.5e9) - 0.37e9
        assert recomputed <= 2.2e9 - 0.5e9


def test_recomputing_and_micro_batches_change_no_gradient():
    spec = memory.resolve(spec_of("helix", batch=5, width=32))

    def weights(**options) -> list[Tensor]:
        torch.manual_seed(0)
        rehearsal = memory.Rehearsal(spec, **sizes(60), **options)
        rehearsal.step()
        return [parameter.grad for parameter in rehearsal.model.parameters() if parameter.grad is not None]

    whole = weights()
    for options in ({"recompute": True}, {"micro_batch": 2}, {"micro_batch": 2, "recompute": True}):
        for one, other in zip(whole, weights(**options), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_measurement_is_one_step_of_a_process_of_its_own():
    found = measure(spec_of("mamba", width=32), **sizes(100), steps=1, threads=1)
    assert isinstance(found, Measurement)
    assert found.process_bytes > 100 * MIB
    assert found.step_seconds > 0


def test_a_backend_that_is_forced_on_a_gpu_does_not_keep_it_from_being_planned(monkeypatch):
    spec = spec_of("helix")
    plain = choose(spec, samples=8000, classes=5, limit_bytes=None, device_type="cuda")
    monkeypatch.setenv("HELIX_SCAN", "mamba_ssm")
    assert choose(spec, samples=8000, classes=5, limit_bytes=None, device_type="cuda") == plain
    with pytest.raises(ValueError, match="'mamba_ssm' cannot scan"):
        predict(spec, samples=8001, classes=5)


def test_a_rank_needs_room_for_its_part_of_the_batch(tmp_path):
    """Half the clips, and what is mixed with them, beside all of the weights."""
    spec = spec_of("mamba", batch=32)
    one, two = (predict(spec, **sizes(500), ranks=ranks) for ranks in (1, 2))
    half = predict(spec_of("mamba", batch=16), **sizes(500))
    assert half.activations <= two.activations < 0.6 * one.activations
    assert two.parameters == one.parameters and two.optimizer == one.optimizer
    limit_bytes = needed_bytes(two, "cpu", compact=False)
    assert choose(spec, **sizes(500), limit_bytes=limit_bytes, ranks=2).micro_batch is None
    assert choose(spec, **sizes(500), limit_bytes=limit_bytes).micro_batch is not None
