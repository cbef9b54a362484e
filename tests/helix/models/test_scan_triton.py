"""The kernels for CUDA equal their reference and themselves: on a GPU where there is one, else in Triton's interpreter.

The interpreter runs what is compiled elsewhere, an operation at a time and slowly, so shapes are small here.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import helix.models.scan as scan
from helix.models.agreement import (
    CONV_NAMES,
    SCAN_BOUNDS,
    SCAN_NAMES,
    conv_inputs,
    exact_scan,
    explicit_conv_silu,
    relative_errors,
    run,
    scan_inputs,
    scanned,
)
from helix.models.blocks.mamba import BiMambaLayer
from helix.models.scan import conv_silu, scan_backend, selective_scan, selective_scan_sequential
from helix.training.memory import Ledger

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

BOUND = SCAN_BOUNDS[DEVICE]
HALF_BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 2.5e-3}

#: States, of shapes that fill no tile and no warp.
SHAPES = ((2, 1, 5, 3), (1, 8, 33, 6), (2, 11, 6, 6), (1, 19, 3, 32))

pytestmark = [pytest.mark.gpu] if ON_GPU else []


def ours(modules: dict[str, ModuleType]) -> list[str]:
    """What has to be imported anew for the interpreter; the compiled library cannot be loaded twice."""
    names = [name for name in modules if name.partition(".")[0] == "triton" and not name.startswith("triton._C")]
    return [*names, "helix.models.scan_triton"]


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    """The module as all others have it."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    return importlib.import_module("helix.models.scan_triton")


@pytest.fixture(scope="module")
def kernels(compiled: ModuleType) -> Iterator[ModuleType]:
    """The module under test. Without a GPU a copy that is interpreted, beside a copy of Triton, until the tests end."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            for name in ours(dict(sys.modules)):
                patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module("helix.models.scan_triton")
        yield module
        if not ON_GPU:
            for name in ours(dict(sys.modules)):
                sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def taken(kernels: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module as the backend of the device of these tests."""
    monkeypatch.setitem(scan.BACKENDS, "triton", scan.Backend(device=DEVICE, load=lambda: kernels, mixed=True))
    monkeypatch.setattr(scan, "_kernels", {**scan._kernels, "triton": kernels})
    monkeypatch.setenv("HELIX_SCAN", "triton")
    scan._import.cache_clear()
    # All states at once, since an operation of the interpreter costs the same for one as for many.
    monkeypatch.setattr(kernels, "ABREAST", kernels.ABREAST if ON_GPU else 32)
    request.addfinalizer(scan._import.cache_clear)


def errors(inputs: list[Tensor], *, reverse: bool, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Of the output and all gradients, against what is right in float64, taken where the scan runs."""
    found = run(scanned(selective_scan, reverse=reverse), inputs, dtype=dtype, device=DEVICE)
    right = exact_scan(inputs, reverse=reverse, device=DEVICE)
    return relative_errors(found, right, SCAN_NAMES)


def within(found: dict[str, float], bound: float = BOUND) -> None:
    """What is summed over so few tokens may nearly vanish, and its rounding errors stay."""
    for name, error in found.items():
        assert error <= bound * (8 if name in ("A", "D", "dt_bias") else 1), found


@pytest.mark.skipif(ON_GPU, reason="here the kernels under test are the compiled ones")
def test_the_interpreted_copy_leaves_the_operators_of_the_compiled_kernels_alone(kernels, compiled):
    assert kernels is not compiled and kernels.LIBRARY != compiled.LIBRARY == "helix"
    inputs = [x.to("meta") for x in scan_inputs(2, 5, 4, 3)]
    y_BLE, starts = compiled.selective_scan_forward(*inputs, False)
    assert y_BLE.shape == inputs[0].shape and starts.shape[2:] == inputs[2].shape[::-1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_scan_equals_the_recurrence_with_all_gradients(shape, reverse):
    inputs = scan_inputs(*shape)
    if shape[1] == 1:  # of a single token nothing has decayed, and the gradient of A is zero
        inputs[2] = inputs[2].sign() * 1e-3
    found = errors(inputs, reverse=reverse)
    within({name: error for name, error in found.items() if shape[1] > 1 or name != "A"})


@pytest.mark.skipif(
    not (ON_GPU or "HELIX_LONG_SCAN" in os.environ),
    reason="Triton's interpreter takes half an hour: set HELIX_LONG_SCAN=1; BENCHMARKS.md has what it found",
)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_equals_the_reference_in_float64_over_30000_tokens(reverse):
    within(errors(scan_inputs(1, 30_000, *((64, 16) if ON_GPU else (3, 2))), reverse=reverse))


def test_a_program_may_run_over_several_tiles_one_state_after_the_other(kernels, monkeypatch):
    """As on a GPU, where there are fewer programs than tiles."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(kernels, "ABREAST", 1)
    assert kernels.segments_of(1, 27, 5) == (2, 2)
    within(errors(scan_inputs(1, 27, 5, 3), reverse=False))


class Idle:
    """A kernel that does nothing: the interpreter copies all that it is given."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_arguments, **_options: None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 200, 160, 6), (2, 27, 5, 3)], ids=str)
def test_what_an_operator_holds_besides_is_what_is_said_of_it(kernels, monkeypatch, shape, dtype):
    """For helix.training.memory, which sees shapes alone: all that is allocated while it runs, its results apart."""
    for name in ("_walk", "_join", "_read", "_backward", "_conv_backward"):
        monkeypatch.setattr(kernels, name, Idle())
    with Ledger() as ledger:
        u, dt, A, B, C, D, z, dt_bias = (x.float() + 0 for x in scan_inputs(*shape))
        u, dt, B, C, z = (x.to(dtype) for x in (u, dt, B, C, z))
        inputs = (u, dt, A, B, C, D, z, dt_bias, False)
        dy, weight_EK, bias_E = torch.ones_like(u), torch.ones(shape[2], 4), torch.zeros(shape[2])
        starts = kernels.selective_scan_forward._init_fn(*inputs)[1]
        for operator, given in {
            kernels.selective_scan_forward: inputs,
            kernels.selective_scan_backward: (dy, starts, *inputs),
            kernels.conv_silu_backward: (dy, u, weight_EK, bias_E, False),
        }.items():
            before = ledger.live.total()
            ledger.forget_peak()
            results = operator._init_fn(*given)
            held = ledger.peak.total() - before
            said = sum(x.nbytes for x in results) + kernels.WORKSPACE_BYTES[operator._qualname](*given)
            assert 0.9 * said <= held <= 1.05 * said, operator
            del results


def test_without_segments_to_join_it_is_the_same_scan(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    assert kernels.segments_of(1, 19, 6) == (1, 3)
    within(errors(scan_inputs(1, 19, 6, 6), reverse=True))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(2, 10), channels=st.integers(1, 70), state=st.integers(1, 9), reverse=st.booleans())
def test_any_shape_will_do(tokens, channels, state, reverse):
    found = errors(scan_inputs(1, tokens, channels, state), reverse=reverse)
    within(found, 4 * BOUND)


@pytest.mark.parametrize(("shift", "bound"), [(40.0, BOUND), (-12.0, 4 * BOUND)], ids=["strong", "tiny"])
def test_decays_of_any_strength_lose_nothing(shift, bound):
    """Strong ones underflow, and a scan that divided by their products would return nan; tiny ones forget nothing."""
    inputs = scan_inputs(1, 11, 6, 6)
    inputs[1] = inputs[1] + shift
    found = errors(inputs, reverse=False)
    if shift > 0:  # what is left of a state is below 1e-17, and so is the gradient of its decay
        assert found.pop("A") <= 1e-3
    within(found, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_that_of_the_activations_alone(dtype):
    """States and sums are float32, so errors are those of rounding what goes in and out."""
    inputs = scan_inputs(1, 11, 6, 6)
    halves = [x.to(dtype) if x.ndim == 3 else x for x in inputs]
    leaves = [x.to(DEVICE).requires_grad_() for x in halves]
    y_BLE = scanned(selective_scan, reverse=True)(*leaves)
    assert y_BLE.dtype == dtype
    weights = torch.ones_like(y_BLE)
    given = [y_BLE.detach(), *torch.autograd.grad(y_BLE, leaves, weights)]
    assert [x.dtype for x in given[1:]] == [x.dtype for x in halves]
    exact = [x.double().detach().requires_grad_() for x in halves]
    right = scanned(selective_scan_sequential, reverse=True)(*exact)
    wanted = [right.detach(), *torch.autograd.grad(right, exact, torch.ones_like(right))]
    found = relative_errors(given, wanted, SCAN_NAMES)
    within(found, HALF_BOUNDS[dtype] / 4)
    within({name: found[name] for name in ("A", "D")}, BOUND)  # sums that stay in float32 all the way


def test_under_autocast_a_layer_trains_in_half_precision_with_float32_parameters():
    torch.manual_seed(0)
    layer, x_BLD = BiMambaLayer(8, 6, 3, 4).to(DEVICE), torch.randn(1, 5, 8, device=DEVICE)
    wanted = layer(x_BLD)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y_BLD = layer(x_BLD)
        y_BLD.float().square().sum().backward()
    assert relative_errors([y_BLD], [wanted], ["y"])["y"] < 1e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_twice_gives_the_same_bits():
    inputs = scan_inputs(1, 9, 34, 3)
    first, second = (run(scanned(selective_scan), inputs, dtype=torch.float32, device=DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_number_of_segments_follows_from_the_shapes(kernels):
    assert kernels.segments_of(32, 500, 512) == (4, 16)  # 2,048 programs of the 2,112 that an H200 holds
    assert kernels.segments_of(1, 30_000, 512) == (130, 29)
    assert kernels.segments_of(256, 500, 512) == (1, 63)
    assert kernels.segments_of(1, 1, 1) == (1, 1)


def test_no_token_sees_those_to_come():
    tensors = [x.to(DEVICE) for x in scan_inputs(1, 15, 3, 2)]
    with torch.no_grad():
        before = scanned(selective_scan)(*tensors)
        for x_BLX in (tensors[0], tensors[1], tensors[3], tensors[4], tensors[6]):
            x_BLX[:, 13:] += 1
        after = scanned(selective_scan)(*tensors)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "channels", "taps"), [(2, 1, 5, 4), (1, 70, 6, 4), (2, 19, 130, 2)])
def test_the_convolution_equals_its_definition_with_all_gradients(batch, tokens, channels, taps, reverse):
    inputs = conv_inputs(batch, tokens, channels, taps)
    given = run(lambda *x: conv_silu(*x, reverse=reverse), inputs, dtype=torch.float32, device=DEVICE)
    wanted = run(lambda *x: explicit_conv_silu(*x, reverse=reverse), inputs, dtype=torch.float64)
    within(relative_errors(given, wanted, CONV_NAMES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_convolution_of_half_precision_keeps_its_parameters_whole(dtype):
    u_BLE, weight_E1K, bias_E = (x.to(DEVICE) for x in conv_inputs(1, 19, 6, 4))
    leaves = [u_BLE.to(dtype).requires_grad_(), weight_E1K.requires_grad_(), bias_E.requires_grad_()]
    y_BLE = conv_silu(*leaves)
    assert y_BLE.dtype == dtype
    grads = torch.autograd.grad(y_BLE, leaves, torch.ones_like(y_BLE))
    assert [x.dtype for x in grads] == [dtype, torch.float32, torch.float32]
    wanted = explicit_conv_silu(leaves[0].float(), weight_E1K, bias_E, reverse=False)
    assert relative_errors([y_BLE], [wanted], ["y"])["y"] < HALF_BOUNDS[dtype] / 4


def test_how_tensors_lie_in_memory_does_not_matter():
    plain = [x.to(DEVICE).contiguous() for x in scan_inputs(2, 9, 3, 2)]
    spread = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in plain]
    with torch.no_grad():
        assert torch.equal(scanned(selective_scan)(*plain), scanned(selective_scan)(*spread))


def test_shapes_that_disagree_and_parameters_in_half_precision_are_refused(kernels):
    u, dt, A, B, C, D, z, dt_bias = (x.to(DEVICE) for x in scan_inputs(2, 9, 3, 2))
    with pytest.raises(ValueError, match=r"sizes so far: \{'B': 2, 'L': 9, 'E': 3\}"):
        kernels.selective_scan(u, dt[:, :8], A, B, C, D, z, dt_bias, False)
    with pytest.raises(ValueError, match="float16"):
        kernels.selective_scan(u, dt, A, B, C, D.half(), z, dt_bias, False)
    with pytest.raises(ValueError, match="32 bits"):
        long = torch.empty(1, 2**24, 128, device="meta")
        kernels.conv_silu(long, torch.empty(128, 4), torch.empty(128), False)


def test_the_operators_keep_what_they_promise_to_torch(kernels):
    tensors = [x.to(DEVICE) for x in scan_inputs(1, 3, 2, 2)]
    y, starts = kernels.selective_scan_forward(*tensors, True)
    u, weight, bias = (x.to(DEVICE) for x in conv_inputs(1, 3, 2, 4))
    for operator, arguments in (
        (kernels.selective_scan_forward, (*tensors, True)),
        (kernels.selective_scan_backward, (y, starts, *tensors, True)),
        (kernels.conv_silu_forward, (u, weight[:, 0], bias, True)),
        (kernels.conv_silu_backward, (u, u, weight[:, 0], bias, True)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_kernels_are_launched_on_the_device_of_their_tensors(kernels, monkeypatch):
    """Triton launches on the current one, so that has to be theirs, and nobody else's afterwards."""
    launches: list[tuple[str, Tensor | None]] = []
    current: list[Tensor] = []

    class DeviceOf:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

        def __enter__(self) -> None:
            current.append(self.tensor)

        def __exit__(self, *_error: object) -> None:
            current.pop()

    class Kernel:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append((self.name, current[-1] if current else None))
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    for name in ("_walk", "_join", "_read", "_backward", "_conv_forward", "_conv_backward"):
        monkeypatch.setattr(kernels, name, Kernel(name))
    tensors = [x.to(DEVICE) for x in scan_inputs(1, 20, 2, 2)]
    y, starts = kernels.selective_scan_forward(*tensors, False)
    kernels.selective_scan_backward(y, starts, *tensors, False)
    u, weight, bias = (x.to(DEVICE) for x in conv_inputs(1, 3, 2, 4))
    kernels.conv_silu_backward(kernels.conv_silu_forward(u, weight[:, 0], bias, True), u, weight[:, 0], bias, True)
    assert {name for name, _ in launches} == {"_walk", "_join", "_read", "_backward", "_conv_forward", "_conv_backward"}
    assert all(tensor is not None and tensor.device == u.device for _, tensor in launches) and not current


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_on_the_second_gpu_the_numbers_are_those_of_the_first():
    tensors = scan_inputs(1, 20, 4, 2)
    first, second = (run(scanned(selective_scan), tensors, dtype=torch.float32, device=d) for d in ("cuda:0", "cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def test_torch_compile_takes_a_scan_as_one_graph():
    tensors = [x.to(DEVICE).requires_grad_() for x in scan_inputs(1, 3, 3, 2)]
    results = []
    for function in (
        scanned(selective_scan),
        torch.compile(scanned(selective_scan), backend="aot_eager", fullgraph=True),
    ):
        y_BLE = function(*tensors)
        results.append([y_BLE.detach(), *torch.autograd.grad(y_BLE.sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Which scan is taken.


@pytest.fixture
def with_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both scans for CUDA as if they could be imported; nothing is run."""
    monkeypatch.delenv("HELIX_SCAN")
    monkeypatch.setattr(scan, "_kernels", {})
    for name in ("triton", "mamba_ssm"):
        backend = replace(scan.BACKENDS[name], device="cuda", load=lambda: sys)  # any module
        monkeypatch.setitem(scan.BACKENDS, name, backend)
    scan._import.cache_clear()
    yield
    torch.use_deterministic_algorithms(False)


def chosen(**options: str) -> str:
    return scan_backend(torch.device("cuda"), torch.float32, **options)


def test_mamba_ssm_is_taken_unless_the_same_bits_are_asked_for(with_backends, monkeypatch):
    assert chosen() == "mamba_ssm"
    torch.use_deterministic_algorithms(True)
    assert chosen() == "triton"
    assert chosen(backend="reference") == "reference"
    monkeypatch.setenv("HELIX_SCAN", "mamba_ssm")
    with pytest.raises(ValueError, match=r"'mamba_ssm' does not give the same bits again.*--deterministic"):
        chosen()
    torch.use_deterministic_algorithms(False)
    assert chosen() == "mamba_ssm"


def test_triton_is_taken_without_a_word_where_mamba_ssm_is_not_installed(with_backends, monkeypatch, caplog):
    def load() -> ModuleType:
        raise ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm")

    monkeypatch.setitem(scan.BACKENDS, "mamba_ssm", replace(scan.BACKENDS["mamba_ssm"], load=load))
    assert chosen() == "triton"
    assert caplog.text == ""


def test_without_triton_cuda_takes_the_reference_and_says_so_and_a_cpu_never_asks(with_backends, monkeypatch, caplog):
    def load() -> ModuleType:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    for name in ("triton", "mamba_ssm"):
        monkeypatch.setitem(scan.BACKENDS, name, replace(scan.BACKENDS[name], load=load))
    assert scan_backend(torch.device("cpu"), torch.float32) in ("numba", "reference")
    assert "triton" not in caplog.text
    assert chosen() == "reference"
    assert "triton cannot be imported" in caplog.text
