"""The kernels of Mamba's authors are called as their documentation asks; on a GPU they agree with the reference."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import helix.models.scan as scan
from helix.checks.scan import why_not
from helix.models.scan import conv_silu, scan_backend, selective_scan, selective_scan_sequential
from tests.helix.models.test_scan import NAMES, distance, inputs, run


def documented_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What the documentation of mamba_ssm.ops.selective_scan_interface.selective_scan_fn says, channels first."""
    assert delta_softplus and not return_last_state
    for x in (u, delta, B, C, z):
        assert x.dtype == u.dtype and x.stride(-1) == 1
    for parameter in (A, D, delta_bias):
        assert parameter.dtype == torch.float32
    y_BLE = selective_scan_sequential(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, dt_bias_E=delta_bias)
    return y_BLE.mT.to(u.dtype)


def documented_conv(x, weight, bias=None, activation=None):
    """causal_conv1d.causal_conv1d_fn: x [B, E, L], weight [E, K]."""
    assert activation == "silu" and weight.ndim == 2
    past = weight.shape[1] - 1
    y = nn.functional.conv1d(nn.functional.pad(x, (past, 0)), weight[:, None].to(x.dtype), bias, groups=len(weight))
    return nn.functional.silu(y)


@pytest.fixture
def stand_ins(monkeypatch):
    """mamba-ssm and causal-conv1d as they are documented, on a CPU and slowly; the adaptor over them is ours."""
    interface, conv = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    interface.selective_scan_fn = documented_scan  # type: ignore[attr-defined]
    conv.causal_conv1d_fn = documented_conv  # type: ignore[attr-defined]
    modules = {"mamba_ssm": ModuleType("mamba_ssm"), "mamba_ssm.ops": ModuleType("mamba_ssm.ops")}
    for name, module in {**modules, interface.__name__: interface, "causal_conv1d": conv}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "helix.models.scan_mamba_ssm", raising=False)

    def load() -> ModuleType:
        return importlib.import_module("helix.models.scan_mamba_ssm")

    monkeypatch.setitem(scan.BACKENDS, "mamba_ssm", scan.Backend(device="cpu", load=load, mixed=True))
    monkeypatch.setattr(scan, "_kernels", {})
    scan._import.cache_clear()
    yield
    scan._import.cache_clear()
    sys.modules.pop("helix.models.scan_mamba_ssm", None)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_given_channels_first_and_flipped_where_the_scan_runs_backwards(stand_ins, reverse):
    assert scan_backend(torch.device("cpu"), torch.float32) == "mamba_ssm"
    wanted = run(selective_scan_sequential, inputs(2, 23, 6, 4), reverse=reverse)
    given = run(selective_scan, inputs(2, 23, 6, 4, dtype=torch.float32), reverse=reverse)
    for name, single, double in zip(NAMES, given, wanted, strict=True):
        assert distance(single, double) <= 2e-6, name


@pytest.mark.parametrize("reverse", [False, True])
def test_its_convolution_is_the_references(stand_ins, reverse):
    generator = torch.Generator().manual_seed(0)
    u_BLE, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 23, 6), (6, 1, 4), (6,)))
    given = conv_silu(u_BLE, weight, bias, reverse=reverse)
    assert torch.allclose(given, conv_silu(u_BLE, weight, bias, reverse=reverse, backend="reference"), atol=1e-6)


def test_half_precision_reaches_the_kernel_as_it_is(stand_ins):
    u, dt, A, B, C, D, z, dt_bias = inputs(1, 9, 4, 3, dtype=torch.float32)
    half = [x.to(torch.bfloat16) for x in (u, dt, B, C, z)]
    y_BLE = selective_scan(half[0], half[1], A, half[2], half[3], D, half[4], dt_bias_E=dt_bias)
    assert y_BLE.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "error",
    [
        ImportError("selective_scan_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab"),
        OSError("libcudart.so.13: cannot open shared object file: No such file or directory"),
        RuntimeError("Failed to find C compiler"),
        AttributeError("module 'triton' has no attribute 'jit'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_library_that_does_not_load_is_as_good_as_none(error, monkeypatch, caplog):
    def load() -> ModuleType:
        raise error

    monkeypatch.setitem(scan.BACKENDS, "mamba_ssm", scan.Backend(device="cpu", load=load, mixed=True))
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    scan._import.cache_clear()
    try:
        assert scan_backend(torch.device("cpu"), torch.float32) not in ("mamba_ssm", "reference")
        assert repr(error) in caplog.text and "helix doctor" in caplog.text
    finally:
        scan._import.cache_clear()


def test_on_cuda_triton_scans_where_a_library_of_mamba_ssm_is_missing(monkeypatch, tmp_path):
    """The import itself, of a package whose library is not there, as of one that was built for another CUDA."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    package.joinpath("__init__.py").write_text("import ctypes\nctypes.CDLL('libcudart.so.7')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("causal_conv1d", "helix.models.scan_mamba_ssm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    monkeypatch.setattr(scan, "_kernels", {})
    scan._import.cache_clear()
    try:
        with pytest.raises(OSError, match="libcudart"):
            scan.BACKENDS["mamba_ssm"].load()
        assert scan_backend(torch.device("cuda"), torch.float32) == "triton"
        said = why_not("mamba_ssm", "cuda")
        assert said is not None and said.status == "absent"
    finally:
        scan._import.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu_it_agrees_with_the_reference(reverse):
    pytest.importorskip("mamba_ssm")
    pytest.importorskip("causal_conv1d")
    wanted = run(selective_scan_sequential, inputs(2, 517, 64, 16), reverse=reverse)
    tensors: list[Tensor] = [x.detach().cuda().requires_grad_() for x in inputs(2, 517, 64, 16, dtype=torch.float32)]
    y_BLE = selective_scan(*tensors[:-1], dt_bias_E=tensors[-1], reverse=reverse, backend="mamba_ssm")
    weights = torch.randn(y_BLE.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = [y_BLE.detach(), *torch.autograd.grad(y_BLE, tensors, weights.to(y_BLE))]
    for name, single, double in zip(NAMES, given, wanted, strict=True):
        assert distance(single.cpu(), double) <= 1e-5, name
