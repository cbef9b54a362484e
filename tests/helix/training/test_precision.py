"""fp32 is float32 throughout and tf32 is what it says, or it is refused before anything is spent."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helix.training.feasibility import CLASSES, measured, table
from helix.training.memory import predict
from helix.training.precision import precision_of, require
from helix.training.trainer import Fit, fit
from orchestration.grid import VARIANTS, Trial
from orchestration.plan import place
from tests.conftest import with_training


def settings() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


@pytest.mark.parametrize(
    ("precision", "device", "wanted"),
    [("fp32", "cpu", "ieee"), ("bf16", "cpu", "ieee"), ("fp32", "cuda", "ieee"), ("tf32", "cuda", "tf32")],
)
def test_the_settings_are_those_of_the_precision_and_go_back(precision, device, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    before = settings()
    assert before[1] == "tf32", "what torch does unasked is why this exists"
    with precision_of(precision, device):
        assert settings() == (wanted, wanted)
    assert settings() == before
    with pytest.raises(KeyError), precision_of(precision, device):
        raise KeyError
    assert settings() == before


def test_tf32_is_refused_where_no_device_has_it(tiny_spec, tiny_data, storage):
    require("tf32", "cuda")
    spec = with_training(tiny_spec, precision="tf32")
    with pytest.raises(ValueError, match="tf32, which only CUDA GPUs compute, and the device is cpu; choose"):
        fit(spec, tiny_data, Fit(storage=storage))
    assert not storage.children("trials"), "nothing was spent"


def test_a_gpu_without_tf32_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    with pytest.raises(ValueError, match=r"this GPU \(Tesla V100\) has no TF32"), precision_of("tf32", "cuda"):
        pass


def test_a_plan_with_tf32_is_refused_for_cpus_and_made_for_gpus(tiny_spec):
    trial = Trial(variant=VARIANTS[0], spec=with_training(tiny_spec, precision="tf32"))
    with pytest.raises(ValueError, match="only CUDA GPUs compute"):
        place(trial, limit_bytes=None, device="cpu")
    assert place(trial, limit_bytes=None, device="cuda").needed_bytes > 0


def test_tf32_needs_the_memory_of_fp32_and_is_not_measured_on_a_cpu(tiny_spec):
    how = {"samples": 8_000, "classes": CLASSES}
    found = [predict(with_training(tiny_spec, precision=precision), **how) for precision in ("fp32", "tf32")]
    assert found[0] == found[1]
    cell = table({"mamba": ("mamba",)}, tokens=(4,), width=16, precision="tf32", recomputing=(False,))[0]
    cell = measured(replace(cell))
    assert cell.measured is None and "only CUDA GPUs compute" in cell.why_not


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_fp32_has_24_bits_and_tf32_has_11():
    torch.manual_seed(0)
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    x, w = torch.randn(8, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    for precision, low, high in (("fp32", 0.0, 1e-5), ("tf32", 1e-5, 1e-2)):
        with precision_of(precision, "cuda"):
            for found, wanted in (
                (a @ b, a.double() @ b.double()),
                (torch.conv2d(x, w), torch.conv2d(x.double(), w.double())),
            ):
                error = ((found - wanted).norm() / wanted.norm()).item()
                assert low <= error <= high, (precision, error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_every_precision_trains_to_nearly_the_same_losses(tiny_spec, tiny_data, storage: Path):
    losses = {}
    for precision in ("fp32", "tf32", "bf16"):
        spec = with_training(tiny_spec, precision=precision)
        losses[precision] = fit(spec, tiny_data, Fit(storage=storage, device="cuda"))["rows"][0]["train_losses"]
    assert losses["tf32"] != losses["fp32"] != losses["bf16"]
    assert losses["tf32"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=5e-2)
