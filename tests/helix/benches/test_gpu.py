"""`helix bench gpu` at toy sizes on a CPU: chosen sections in one run, and one clear line where there is no GPU."""

import math
import re
from pathlib import Path

import pytest
import torch

from helix import bench
from helix.bench import Conditions
from helix.benches import gpu as module
from helix.benches.gpu import SECTIONS, GpuBench, limited, usable
from helix.gpu.section import Part, Stage
from helix.gpu.steps import write_noise
from helix.registry import BENCHES
from helix.training_peers import MODULES

TINY = {
    "device": "cpu",
    "precisions": ("fp32",),
    "tokens": (6,),
    "in_flight": 6,
    "channels": 4,
    "state": 3,
    "error_channels": 2,
    "batch": 2,
    "samples": 1600,
    "width": 16,
    "layers": 2,
    "frontends": ("raw",),
    "clips": 10,
    "epochs": 1,
    "backbones": ("helix",),
    "table_tokens": (16,),
    "table_precisions": ("fp32",),
    "most_batch": 2,
}
QUICK = Conditions(repeats=1)


def test_all_sections_come_in_one_run_and_the_roofline_knows_what_was_timed():
    outcome = GpuBench(**TINY).run(QUICK)
    titles = [table.title for table in outcome.tables]
    for start in ("device", "scan, forward", "one training step", "an epoch", "Table 1", "what the device", "achieved"):
        assert any(title.startswith(start) for title in titles), start
    for table in outcome.tables:
        for row in table.rows:
            assert len(row.values) == len(table.columns), row
            assert all(value is None or math.isfinite(value) for value in row.values), row
    achieved = {row.name for row in outcome.tables[-1].rows}
    assert {"step of pure Mamba on raw, B=2, fp32", "step of helix, SDPA, L=16, fp32, B=1"} <= achieved
    assert any(name.startswith("scan, forward+backward, L=6") for name in achieved)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_can_be_had_alone(section: str):
    small = TINY | {"sections": (section,), "epochs": 0, "most_batch": 0}
    outcome = GpuBench(**small).run(QUICK)
    assert len(outcome.tables) >= 2
    if section == "roofline":
        assert [table.title for table in outcome.tables] == ["device", "what the device can do, measured in this run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused_in_one_line(capsys: pytest.CaptureFixture):
    assert bench.main(["gpu"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "needs a CUDA device" in said and "device=cpu" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sections=scans"], "known: scan, step, table1, roofline"),
        (["sections="], "sections has nothing"),
        (["precisions=fp8"], "known: fp32"),
        (["device=cpu", "backbones=hyena"], "known: mamba, helix, attention"),
        (["device=tpu"], "wanted cuda"),
        (["device=cuda:one"], "wanted cuda"),
        (["device=cpu", "memory_gib=48"], "leave it out"),
        (["device=cpu", "section_s=0"], "section_s is 0"),
        (["device=cpu", "table_s=0"], "table_s is 0"),
        (["device=cpu", "batch=0"], "1 or more"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture):
    assert bench.main(["gpu", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("section", "option"), [("table1", "table_s"), ("scan", "section_s")])
def test_table_1_has_a_time_of_its_own(section: str, option: str):
    outcome = GpuBench(**TINY | {"sections": (section,), option: 1e-9}).run(QUICK)
    assert f"{option}=... gives it more" in outcome.tables[1].rows[0].note


def test_a_section_that_fails_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fails(stage: Stage, shapes: object) -> Part:
        raise ValueError("no such thing\nat all")

    monkeypatch.setattr(module.scans, "scans", fails)
    small = TINY | {"sections": ("scan", "table1", "roofline"), "most_batch": 0}
    options = [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in small.items()]
    assert bench.main(["gpu", *options, "--repeats", "1"]) == bench.PARTS_FAILED
    said = capsys.readouterr()
    assert "ValueError: no such thing" in said.out and "failed: section scan" in said.err
    assert "Table 1 of the paper" in said.out and "achieved over the limit" in said.out


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("source", "there is no meta/esc50.csv in it"),
        ("authors", "has no model.py"),
        ("scratch", "a folder that is"),
    ],
)
def test_a_wrong_folder_is_refused_before_anything_is_measured(
    option: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert bench.main(["gpu", "device=cpu", f"{option}={tmp_path / 'none'}"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def bench_commands() -> list[str]:
    text = (Path(__file__).parents[3] / "BENCHMARKS.md").read_text().partition("## On a GPU")[2].partition("\n## ")[0]
    return re.findall(r"^    helix bench (.*)$|`helix bench ([^`]*=[^`]*)`", text, flags=re.MULTILINE)


@pytest.mark.parametrize("command", [block or cell for block, cell in bench_commands()])
def test_the_commands_of_the_benchmarks_are_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "ESC-50-master", 5)
    for name in MODULES:
        (tmp_path / "authors" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "authors" / f"{name}.py").touch()
    name, *options = [word for word in command.split() if not word.startswith("--")]
    assert BENCHES.make(name, bench.read_options(name, options)).device == "cuda"


def test_the_benchmarks_have_a_command_for_every_section():
    words = {word for block, cell in bench_commands() for word in (block or cell).split()}
    assert {"sections=scan", "sections=step", "sections=table1", "memory_gib=44", "pack"} <= words


class Gpu:
    total_memory = 80 * 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """The shares that each of two GPUs of 80 GiB was given. The second is current; only the driver is a stand-in."""
    shares: dict[int, list[float]] = {0: [], 1: []}
    current = [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device.index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    # torch's own function, which refuses a device without an index.
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    hand_out = "_cuda_setMemoryFraction"
    monkeypatch.setattr(torch._C, hand_out, lambda share, index: shares[index].append(share), raising=False)
    return shares


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_smaller_gpu_can_be_asked_for_and_a_larger_one_not(gpus: dict[int, list[float]], name: str, index: int):
    device = usable(name)
    with limited(device, 48):
        assert gpus[index] == [0.6]
    assert gpus == {index: [0.6, 1.0], 1 - index: []}, "it is whole again, and the other was left alone"
    with pytest.raises(ValueError, match=r"this GPU has 80\.0"), limited(device, 81):
        pass


@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_named_with_its_index_and_is_the_current_one():
    assert usable("cuda") == torch.device("cuda:1")
    assert usable("cuda:0") == torch.device("cuda:0") and torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="finds 2 GPUs, from cuda:0"):
        usable("cuda:2")


def test_the_cpu_is_usable():
    assert usable("cpu") == torch.device("cpu")
