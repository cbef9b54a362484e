"""The benches run at toy sizes, with what there is of peers, and what they report can be read. No time is judged."""

import math
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from helix.bench import Conditions, Outcome, Row
from helix.benches import step as step_module
from helix.benches.scan import ScanBench
from helix.benches.step import StepBench, another_scan
from helix.models.agreement import SCAN_NAMES, relative_errors, run, scan_inputs, scanned
from helix.models.blocks import mamba
from helix.models.scan import selective_scan, selective_scan_sequential
from helix.peers import MissingPeerError, load_mamba_ssm_reference, load_mambapy, load_transformers, peers

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux only")
QUICK = Conditions(repeats=2)

#: As in mamba-ssm's file: the imports that are not there without CUDA, and a reference with its layout and arguments.
INTERFACE = """
import torch
import torch.nn.functional as F
from mamba_ssm.utils.torch import custom_bwd, custom_fwd
from einops import rearrange, repeat
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.cpp_functions import causal_conv1d_fwd_function, causal_conv1d_bwd_function
from mamba_ssm.ops.triton.layer_norm import _layer_norm_fwd
import selective_scan_cuda

class Fused:
    @staticmethod
    @custom_fwd
    def forward(ctx):
        return selective_scan_cuda.fwd()

def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    delta = F.softplus(delta + delta_bias[..., None])
    x, ys = 0, []
    for i in range(u.shape[2]):
        x = torch.exp(delta[:, :, i, None] * A) * x + (delta[:, :, i] * u[:, :, i])[..., None] * B[:, None, :, i]
        ys.append((x * C[:, None, :, i]).sum(-1))
    return (torch.stack(ys, dim=2) + u * rearrange(D, "d -> d 1")) * F.silu(z)
"""


@pytest.fixture
def mamba_ssm(tmp_path: Path) -> str:
    """A folder with a source tree that looks like mamba-ssm's."""
    folder = tmp_path / "mamba_ssm-9.9" / "mamba_ssm" / "ops"
    folder.mkdir(parents=True)
    (folder / "selective_scan_interface.py").write_text(INTERFACE)
    return str(tmp_path)


def rows(outcome: Outcome, title: str) -> dict[str, Row]:
    return {row.name: row for table in outcome.tables if table.title.startswith(title) for row in table.rows}


def sane(outcome: Outcome) -> None:
    """Every row has a value for each column, positive and finite, or says why not."""
    for table in outcome.tables:
        assert table.rows
        for row in table.rows:
            assert len(row.values) == len(table.columns), row
            assert all(value is None or (value >= 0 and math.isfinite(value)) for value in row.values), row
            assert row.note or None not in row.values, row


@linux
def test_the_scan_is_timed_weighed_and_judged_at_toy_sizes(mamba_ssm: str):
    bench = ScanBench(
        channels=8,
        state=4,
        tokens=(20,),
        memory_tokens=(40,),
        error_tokens=(30, 1100),
        error_channels=4,
        mamba_ssm=mamba_ssm,
    )
    outcome = bench.run(QUICK)
    sane(outcome)
    times = rows(outcome, "forward+backward, B=1, L=20")
    assert {"reference", "mamba-ssm selective_scan_ref", "transformers loop", "mambapy pscan"} <= set(times)
    assert None not in times["mamba-ssm selective_scan_ref"].values
    errors = rows(outcome, "error")
    for name in ("reference, L=30", "reference, L=1,100", "mamba-ssm selective_scan_ref, L=30"):
        assert max(value for value in errors[name].values if value is not None) < 2e-6
    judged = {target.name: target.verdict for target in outcome.targets}
    assert judged.pop("relative error of reference, output and all gradients, L=1,100") == "met"
    assert sum(verdict == "not measured" for verdict in judged.values()) >= 6, "the targets are of another shape"


def test_a_peer_that_would_take_too_long_is_a_row_with_the_reason(mamba_ssm: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("helix.benches.scan.peers", lambda folder: peers(folder)[:1])
    bench = ScanBench(channels=1, state=1, tokens=(501,), memory_tokens=(), error_tokens=(), mamba_ssm=mamba_ssm)
    outcome = bench.run(Conditions(repeats=1))
    assert rows(outcome, "forward, ")["mamba-ssm selective_scan_ref"].values[0] is not None
    skipped = rows(outcome, "forward+backward, ")["mamba-ssm selective_scan_ref"]
    assert skipped.values == (None,) * 4
    assert "quadratic" in skipped.note


def test_peers_that_are_not_installed_are_rows_that_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch):
    for name in ("mambapy.mamba", "transformers.models.mamba.modeling_mamba"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = ScanBench(channels=2, state=2, tokens=(9,), memory_tokens=(), error_tokens=()).run(QUICK)
    found = rows(outcome, "forward, ")
    assert "pip install -c constraints.txt mambapy" in found["mambapy pscan"].note
    assert "pip install -c constraints.txt transformers" in found["transformers loop"].note
    assert "pip download" in found["mamba-ssm selective_scan_ref"].note


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["mamba_ssm", "transformers", "mambapy"])
def test_each_peer_scans_what_we_scan(name: str, reverse: bool, mamba_ssm: str):
    load = {
        "mamba_ssm": lambda: load_mamba_ssm_reference(mamba_ssm),
        "transformers": load_transformers,
        "mambapy": load_mambapy,
    }[name]
    try:
        peer = load()
    except MissingPeerError as error:
        pytest.skip(str(error))
    inputs = scan_inputs(2, 23, 6, 4)
    given = run(scanned(peer, reverse=reverse), inputs, dtype=torch.float32)
    wanted = run(scanned(selective_scan_sequential, reverse=reverse), inputs, dtype=torch.float64)
    assert max(relative_errors(given, wanted, SCAN_NAMES).values()) < 2e-6


def test_the_source_of_mamba_ssm_is_read_from_its_archive_too_and_its_stand_ins_go_again(
    mamba_ssm: str, tmp_path: Path
):
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    with tarfile.open(downloaded / "mamba_ssm-9.9.tar.gz", "w:gz") as archive:
        archive.add(Path(mamba_ssm, "mamba_ssm-9.9"), "mamba_ssm-9.9")
    assert load_mamba_ssm_reference(str(downloaded))
    assert not {"selective_scan_cuda", "mamba_ssm", "causal_conv1d"} & set(sys.modules)
    with pytest.raises(MissingPeerError, match="does not hold it"):
        load_mamba_ssm_reference(str(tmp_path / "nowhere"))


@linux
def test_a_step_is_timed_and_weighed_at_toy_sizes():
    bench = StepBench(
        batch=2, tokens=8, width=16, layers=2, growth=(4, 8), memory_tokens=16, backbones=("mamba", "helix")
    )
    outcome = bench.run(QUICK)
    sane(outcome)
    weighed = rows(outcome, "peak memory")
    assert {name.partition(",")[0] for name in weighed} == {"mamba", "helix"}
    assert all(row.values[0] and 0.05 < row.values[0] < 4 for row in weighed.values())
    grown = rows(outcome, "one training step of pure Mamba, B=1")
    assert grown["L=4"].values[2] == 1
    assert {target.verdict for target in outcome.targets} == {"not measured"}, "the targets are of another size"


def test_a_step_without_growth_and_memory_has_neither():
    outcome = StepBench(batch=1, tokens=4, width=16, layers=1, growth=(), memory_tokens=0).run(QUICK)
    assert len(outcome.tables) == 2


def test_the_mambapy_step_is_refused_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mambapy")
    monkeypatch.setattr(step_module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10})())
    outcome = StepBench(batch=1, tokens=4, width=16, layers=1, growth=(), memory_tokens=0).run(QUICK)
    assert "not run: needs about" in rows(outcome, "one training step of pure Mamba")["mambapy pscan"].note


def test_an_unknown_backbone_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="known: mamba, helix, attention"):
        StepBench(backbones=("hyena",)).run(QUICK)


def test_the_scan_of_the_model_is_another_one_only_while_it_is_asked_for():
    calls = []

    def counted(*tensors, **options):
        calls.append(1)
        return selective_scan(*tensors, **options)

    torch.manual_seed(0)
    layer = mamba.BiMamba(d_state=4).build(width=16, parameters=None, protocol=step_module.Protocol())
    x_BLD = torch.randn(1, 5, 16)
    plain = layer(x_BLD)
    with another_scan(counted):
        assert torch.equal(layer(x_BLD), plain)
    layer(x_BLD)
    assert len(calls) == 2
