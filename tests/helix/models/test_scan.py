"""The selective scan is its recurrence: equal to the slow twin, in both directions, with all gradients."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import helix.models.scan as scan
from helix.models.scan import selective_scan, selective_scan_sequential

NAMES = ("y", "u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def inputs(batch: int, tokens: int, channels: int, state: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, dt, A, B, C, D, z, dt_bias as in a Mamba layer near its initialisation."""
    generator = torch.Generator().manual_seed(batch + tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A_EN = -torch.arange(1.0, state + 1, dtype=torch.float64) * torch.exp(0.1 * draw(channels, state))
    wide, narrow = (batch, tokens, channels), (batch, tokens, state)
    tensors = [draw(*wide), 0.5 * draw(*wide), A_EN, draw(*narrow), draw(*narrow), draw(channels), draw(*wide)]
    return [x.to(dtype).requires_grad_() for x in (*tensors, draw(channels) - 3)]


def run(function, tensors: list[Tensor], *, reverse: bool = False) -> list[Tensor]:
    """The output and the gradients, in the order of NAMES."""
    y_BLE = function(*tensors[:-1], dt_bias_E=tensors[-1], reverse=reverse)
    weights = torch.randn(y_BLE.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y_BLE.detach(), *torch.autograd.grad(y_BLE, tensors, weights.to(y_BLE.dtype))]


def distance(given: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    with torch.no_grad():
        return float((given.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the reference, also where a kernel would be taken."""
    monkeypatch.setenv("HELIX_SCAN", "reference")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 100, 517])
def test_it_equals_its_slow_twin_with_all_gradients(tokens, reverse, monkeypatch):
    monkeypatch.setattr(scan, "CPU_STATES", 2 * 6 * 4)  # two of the five batch entries at a time
    tensors = inputs(5, tokens, 6, 4)
    fast = run(selective_scan, tensors, reverse=reverse)
    slow = run(selective_scan_sequential, tensors, reverse=reverse)
    for name, given, wanted in zip(NAMES, fast, slow, strict=True):
        assert distance(given, wanted) < 1e-12 or float(given.abs().max()) < 1e-15, name


@pytest.mark.parametrize("reverse", [False, True])
def test_its_gradients_pass_a_numerical_check(reverse, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 3)

    def function(*tensors: Tensor) -> Tensor:
        return selective_scan(*tensors[:-1], dt_bias_E=tensors[-1], reverse=reverse)

    assert torch.autograd.gradcheck(function, inputs(2, 8, 3, 2), fast_mode=False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 100), (1, 517)])
def test_single_precision_stays_within_5e_7(batch, tokens, reverse):
    wanted = run(selective_scan_sequential, inputs(batch, tokens, 64, 16), reverse=reverse)
    given = run(selective_scan, inputs(batch, tokens, 64, 16, dtype=torch.float32), reverse=reverse)
    for name, single, double in zip(NAMES, given, wanted, strict=True):
        assert distance(single, double) <= 5e-7, name


def test_single_precision_stays_within_5e_7_over_30_000_tokens():
    wanted = run(selective_scan, inputs(1, 30_000, 16, 4))
    given = run(selective_scan, inputs(1, 30_000, 16, 4, dtype=torch.float32))
    for name, single, double in zip(NAMES, given, wanted, strict=True):
        assert distance(single, double) <= 5e-7, name


def test_strong_decays_lose_nothing():
    """Decays that underflow make the state forget; a scan that divided by their products would return nan."""
    tensors = inputs(2, 100, 8, 4)
    with torch.no_grad():
        tensors[1] += 40
    for name, given, wanted in zip(
        NAMES, run(selective_scan, tensors), run(selective_scan_sequential, tensors), strict=True
    ):
        assert torch.isfinite(given).all(), name
        assert torch.allclose(given, wanted, rtol=1e-10, atol=1e-12), name


def test_backwards_is_forwards_on_flipped_tokens():
    tensors = inputs(2, 37, 6, 4)
    flipped = [x.flip(1) if x.ndim == 3 else x for x in tensors]
    backwards = run(selective_scan, tensors, reverse=True)[0]
    forwards = selective_scan(*flipped[:-1], dt_bias_E=flipped[-1]).flip(1)
    assert distance(backwards, forwards) < 1e-14


def test_no_token_sees_those_to_come():
    tensors = inputs(1, 40, 6, 4)
    with torch.no_grad():
        before = selective_scan(*tensors[:-1], dt_bias_E=tensors[-1])
        for x_BLX in (tensors[0], tensors[1], tensors[3], tensors[4], tensors[6]):
            x_BLX[:, 25:] += 1
        after = selective_scan(*tensors[:-1], dt_bias_E=tensors[-1])
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_it_is_deterministic():
    first, second = (run(selective_scan, inputs(3, 70, 32, 8, dtype=torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_slices_of_wider_tensors_will_do():
    """In a Mamba layer z, B and C are slices; the result must not depend on how they lie in memory."""
    plain = inputs(2, 20, 6, 4)
    sliced = [x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for x in plain]
    assert not sliced[0].is_contiguous()
    for name, given, wanted in zip(NAMES, run(selective_scan, sliced), run(selective_scan, plain), strict=True):
        assert distance(given, wanted) < 1e-14, name


def test_under_autocast_it_computes_in_the_dtype_of_its_parameters():
    tensors = inputs(2, 20, 6, 4, dtype=torch.float32)
    half = [x.detach().bfloat16() if x.ndim == 3 else x.detach() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = selective_scan(*half[:-1], dt_bias_E=half[-1])
    wanted = selective_scan(*(x.float() for x in half[:-1]), dt_bias_E=half[-1])
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, wanted.bfloat16())


def test_a_backward_under_autocast_is_the_same():
    wanted = run(selective_scan, inputs(2, 20, 6, 4, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = run(selective_scan, inputs(2, 20, 6, 4, dtype=torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_memory_never_holds_all_states_of_all_tokens():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    batch, tokens, channels, state = 2, 320, 32, 16
    with Watch():
        run(selective_scan, inputs(batch, tokens, channels, state))
    assert largest <= batch * tokens * channels * state // scan.CHUNK


def test_the_compiler_is_imported_by_those_who_compile_and_its_first_call_may_import_the_kernels():
    code = """
import sys, torch
from helix.models.scan import kernels
assert "torch._dynamo" not in sys.modules and "numba" not in sys.modules
names = torch.compile(lambda x: x + (kernels("numba") is not None), backend="aot_eager", fullgraph=True)
assert names(torch.zeros(1)).item() == 1 and "numba" in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
