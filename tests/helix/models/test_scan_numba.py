"""The kernels of the CPU equal their references, equal themselves on any number of threads, and suit their hosts."""

import hashlib
import logging
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import helix.models.scan as scan
from helix.models import agreement
from helix.models.agreement import CONV_NAMES, SCAN_NAMES, conv_inputs, relative_errors, run, scan_inputs
from helix.models.blocks.mamba import BiMambaLayer
from helix.models.scan import conv_silu, depthwise_conv, scan_backend, selective_scan

scan_numba = pytest.importorskip("helix.models.scan_numba")

ROOT = Path(__file__).resolve().parents[3]


def scanned(backend: str, *, reverse: bool = False) -> Callable[..., Tensor]:
    return agreement.scanned(partial(selective_scan, backend=backend), reverse=reverse)


def convolved(*, reverse: bool = False) -> Callable[..., Tensor]:
    return lambda *x: conv_silu(*x, reverse=reverse)


def convolved_by_torch(*, reverse: bool = False) -> Callable[..., Tensor]:
    return lambda *x: torch.nn.functional.silu(depthwise_conv(*x, reverse=reverse))


def within(given: list[Tensor], wanted: list[Tensor], names: tuple[str, ...], bound: float = 5e-7) -> None:
    found = relative_errors(given, wanted, names)
    assert max(found.values()) <= bound, found


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def threads_at_once(monkeypatch):
    """Threads for as little work as a test has."""
    monkeypatch.setattr(scan_numba, "GRAIN", 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [1, 4, 6, 16, 32])
@pytest.mark.parametrize("tokens", [1, 7, 100, 517])
def test_the_scan_equals_its_reference_with_all_gradients(tokens, state, reverse):
    for channels in (8, 24, 128, 512):
        # A handful of numbers may be sums that nearly vanish; of a hundred tokens the norm is not.
        tensors = scan_inputs(max(2, 100 // tokens), tokens, channels, state)
        wanted = run(scanned("reference", reverse=reverse), tensors, dtype=torch.float64)
        given = run(scanned("numba", reverse=reverse), tensors)
        within(given, wanted, SCAN_NAMES)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_stays_within_5e_7_over_30000_tokens(reverse):
    tensors = scan_inputs(1, 30000, 64, 8)
    wanted = run(scanned("reference", reverse=reverse), tensors, dtype=torch.float64)
    given = run(scanned("numba", reverse=reverse), tensors)
    within(given, wanted, SCAN_NAMES)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4, 20])
@pytest.mark.parametrize("tokens", [1, 3, 16, 117])
def test_the_convolution_equals_its_reference_with_all_gradients(tokens, taps, reverse):
    for channels in (8, 128, 200):
        tensors = conv_inputs(max(2, 100 // tokens), tokens, channels, taps)
        wanted = run(convolved_by_torch(reverse=reverse), tensors, dtype=torch.float64)
        given = run(convolved(reverse=reverse), tensors)
        within(given, wanted, CONV_NAMES)


def test_the_convolution_stays_within_5e_7_over_30000_tokens():
    tensors = conv_inputs(1, 30000, 16, 4)
    wanted = run(convolved_by_torch(), tensors, dtype=torch.float64)
    within(run(convolved(), tensors), wanted, CONV_NAMES)


def test_a_layer_is_the_same_on_both_backends(monkeypatch):
    torch.manual_seed(0)
    layer, x_BLD = BiMambaLayer(16, 40, 4, 4), torch.randn(3, 50, 16)
    names = ("y", *(name for name, _ in layer.named_parameters()))
    results = {}
    for backend in ("reference", "numba"):
        monkeypatch.setenv("HELIX_SCAN", backend)
        y_BLD = layer(x_BLD)
        results[backend] = [y_BLD.detach(), *torch.autograd.grad(y_BLD.square().sum(), list(layer.parameters()))]
    within(results["numba"], results["reference"], names, 2e-6)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [(scanned("numba"), scan_inputs(3, 200, 300, 6)), (convolved(), conv_inputs(3, 200, 300, 4))],
    ids=["scan", "conv"],
)
def test_no_bit_depends_on_the_number_of_threads(function, tensors, threads_at_once):
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(function, tensors))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_little_work_wakes_no_thread(monkeypatch):
    monkeypatch.setattr(scan_numba, "_threads", lambda count: pytest.fail(f"{count} threads for 20 tokens"))
    torch.set_num_threads(4)
    run(scanned("numba"), scan_inputs(4, 20, 128, 4))


def test_many_threads_may_scan_at_once(threads_at_once):
    """As Ray, a thread pool or autograd may call; numba's 'workqueue' layer would abort the process here."""
    torch.set_num_threads(3)
    tensors = scan_inputs(3, 100, 300, 6)
    wanted = run(scanned("numba"), tensors)
    given: list[list[Tensor]] = []
    callers = [
        threading.Thread(target=lambda: given.extend(run(scanned("numba"), tensors) for _ in range(5)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(given) == 20
    assert all(equal(result, wanted) for result in given)


def test_another_thread_may_run_the_backward(threads_at_once):
    torch.set_num_threads(2)
    tensors = [x.detach().requires_grad_() for x in scan_inputs(2, 50, 140, 4)]
    wanted = torch.autograd.grad(scanned("numba")(*tensors).sum(), tensors)
    y_BLE, given = scanned("numba")(*tensors), []
    caller = threading.Thread(target=lambda: given.extend(torch.autograd.grad(y_BLE.sum(), tensors)))
    caller.start()
    caller.join()
    assert equal(given, list(wanted))


def scan_and_send(tensors: list[Tensor], results: Any) -> None:
    results.put([x.numpy() for x in scan_ones(tensors)])


def scan_ones(tensors: list[Tensor]) -> list[Tensor]:
    y_BLE = scanned("numba")(*tensors)
    return [y_BLE.detach(), *torch.autograd.grad(y_BLE, tensors, torch.ones_like(y_BLE))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_scans_after_its_parent_did(threads_at_once):
    """As the workers of multiprocessing do; numba's 'omp' layer would abort the child, and torch's may stand still."""
    tensors = [x.detach().requires_grad_() for x in scan_inputs(2, 50, 140, 4)]
    torch.set_num_threads(2)
    wanted = scan_ones(tensors)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=scan_and_send, args=(tensors, results), daemon=True)
    child.start()
    given = [torch.from_numpy(x) for x in results.get(timeout=60)]
    child.join(timeout=60)
    assert child.exitcode == 0
    assert equal(given, wanted)


@pytest.mark.parametrize("wanted", range(8))
def test_inputs_that_want_no_gradient_get_none(wanted):
    tensors = scan_inputs(2, 20, 24, 4)
    leaves = [x.detach().requires_grad_() for x in tensors]
    everything = torch.autograd.grad(scanned("numba")(*leaves).sum(), leaves)
    tensors = [x.detach().requires_grad_(k == wanted) for k, x in enumerate(tensors)]
    scanned("numba")(*tensors).sum().backward()
    assert [x.grad is not None for x in tensors] == [k == wanted for k in range(8)]
    assert torch.equal(tensors[wanted].grad, everything[wanted])


def test_the_states_are_kept_for_a_backward_only():
    tensors = scan_inputs(1, 40, 24, 4)
    assert scan_numba.selective_scan_forward(*tensors, reverse=False, keep=False)[1].numel() == 0
    assert scanned("numba")(*tensors).grad_fn is None


def test_how_tensors_lie_in_memory_does_not_matter():
    tensors = scan_inputs(2, 20, 24, 4)
    wanted = run(scanned("numba"), tensors)
    for spread in (
        [x.repeat_interleave(2, dim=-1)[..., ::2] for x in tensors],
        [x.mT.contiguous().mT if x.ndim > 1 else x for x in tensors],
        [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in tensors],
    ):
        assert equal(run(scanned("numba"), spread), wanted)


def test_a_gradient_may_be_one_number_seen_everywhere():
    tensors = [x.detach().requires_grad_() for x in scan_inputs(2, 20, 24, 4)]
    y_BLE = scanned("numba")(*tensors)
    ones = torch.autograd.grad(y_BLE, tensors, torch.ones_like(y_BLE), retain_graph=True)
    assert equal(list(torch.autograd.grad(y_BLE.sum(), tensors)), list(ones))


EXTREMES = [
    *[("dt", value) for value in (40.0, 1e9, -200.0, -1e11)],
    *[("z", value) for value in (-300.0, 300.0, -1e11, 1e13)],
    *[("A", value) for value in (-1e-9, -1e4, -1e6)],
]


@pytest.mark.parametrize(("name", "value"), EXTREMES)
def test_extreme_values_are_what_they_are_in_the_reference(name, value):
    tensors = scan_inputs(2, 20, 24, 4)
    tensors[SCAN_NAMES.index(name) - 1] = torch.full_like(tensors[SCAN_NAMES.index(name) - 1], value)
    wanted = run(scanned("reference"), tensors, dtype=torch.float64)
    given = run(scanned("numba"), tensors)
    errors = relative_errors(given, wanted, SCAN_NAMES)  # inf of what is not finite
    for single, double, error in zip(given, wanted, errors.values(), strict=True):
        # An exponent of -40 is rounded by 40 x 2**-24, and what is left of a state by as much.
        assert error <= 5e-6 or float((single - double).abs().max()) < 1e-17, errors


@pytest.mark.parametrize("rate", [-1e7, -1e15, -math.inf])
def test_rates_that_it_cannot_take_give_no_numbers(rate):
    """The reference takes some of them; a kernel that was silently wrong would hide that a model has diverged."""
    tensors = scan_inputs(1, 5, 24, 4)
    tensors[2][3, 1] = rate
    assert scanned("numba")(*tensors).isnan().all()


@pytest.mark.parametrize("name", SCAN_NAMES[1:])
def test_a_nan_reaches_the_output(name):
    tensors = [x.clone() for x in scan_inputs(1, 5, 24, 4)]
    tensors[SCAN_NAMES.index(name) - 1].view(-1)[0] = torch.nan
    assert scanned("numba")(*tensors).isnan().any()


def test_what_fades_is_flushed_in_the_kernels_and_nowhere_else():
    """On x86 numbers below 2**-126 are ten times slower, and a state behind the last input would be one for long."""
    tensors = scan_inputs(1, 3000, 24, 4)
    tensors[0][:, 10:] = 0
    y_BLE = scanned("numba")(*tensors)
    if platform.machine() in ("x86_64", "AMD64"):
        assert not ((y_BLE != 0) & (y_BLE.abs() < 2.0**-126)).any()
    assert float(torch.tensor(1e-20) * torch.tensor(1e-20)) > 0


def test_an_empty_batch_gives_an_empty_output():
    y_BLE, *gradients = run(scanned("numba"), [x[:0] if x.ndim == 3 else x for x in scan_inputs(1, 5, 24, 4)])
    assert y_BLE.shape == (0, 5, 24)
    assert not gradients[2].any()


def test_shapes_that_disagree_are_refused():
    tensors = scan_inputs(1, 5, 24, 4)
    tensors[3] = tensors[3][:, :4]
    with pytest.raises(ValueError, match=r"\[1, 4, 4\]"):
        scanned("numba")(*tensors)


def test_the_operators_keep_what_they_promise_to_torch():
    tensors = scan_inputs(2, 20, 24, 4)
    conv = [x.squeeze() for x in conv_inputs(2, 20, 24, 4)]
    y_BLE, starts = scan_numba.selective_scan_forward(*tensors, reverse=False, keep=True)
    tests = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (scan_numba.selective_scan_forward, (*tensors, False, True)),
        (scan_numba.selective_scan_forward, (*tensors, False, False)),
        (scan_numba.selective_scan_backward, (y_BLE, starts, *tensors, True)),
        (scan_numba.conv_silu_forward, (*conv, True)),
        (scan_numba.conv_silu_backward, (y_BLE, *conv, False)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_torch_compile_takes_a_layer_as_one_graph():
    torch.manual_seed(0)
    layer, x_BLD = BiMambaLayer(16, 24, 4, 4), torch.randn(2, 20, 16)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y_BLD = function(x_BLD)
        results.append([y_BLD.detach(), *torch.autograd.grad(y_BLD.sum(), list(layer.parameters()))])
    for given, wanted in zip(*results, strict=True):
        assert torch.allclose(given, wanted, rtol=1e-5, atol=1e-6)


def test_the_backend_is_chosen_by_device_dtype_environment_and_caller(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    assert scan_backend(cpu, torch.float32) == "numba"
    assert scan_backend(cpu, torch.float64) == "reference"
    assert scan_backend(cuda, torch.float64) == "reference"
    assert scan_backend(cpu, torch.float32, backend="reference") == "reference"
    monkeypatch.setenv("HELIX_SCAN", "reference")
    assert scan_backend(cpu, torch.float32) == "reference"
    assert scan_backend(cpu, torch.float32, backend="numba") == "numba"
    monkeypatch.setenv("HELIX_SCAN", "numba")
    with pytest.raises(ValueError, match=r"possible: auto, reference$"):
        scan_backend(cpu, torch.float64)
    with pytest.raises(ValueError, match=r"'triton'.* possible: auto, reference, numba$"):
        scan_backend(cpu, torch.float32, backend="triton")


def test_without_numba_the_reference_scans_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "helix.models.scan_numba", None)
    monkeypatch.setattr(scan, "_kernels", {})
    scan._import.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert scan_backend(torch.device("cpu"), torch.float32) == "reference"
        assert caplog.text.count("numba cannot be imported") == 1
        tensors = scan_inputs(1, 5, 8, 2)
        assert equal(run(scanned("auto"), tensors), run(scanned("reference"), tensors))
        with pytest.raises(ValueError, match=r"possible: auto, reference$"):
            scan_backend(torch.device("cpu"), torch.float32, backend="numba")
    finally:
        scan._import.cache_clear()


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_the_scan_imports_no_numba():
    process = python("import sys, helix.models.scan; print('numba' in sys.modules)")
    assert process.communicate(timeout=120)[0].strip() == "False"


def test_numba_that_may_not_compile_is_as_good_as_none():
    code = "import torch; from helix.models.scan import scan_backend as f; print(f(torch.device('cpu'), torch.float32))"
    assert python(code, NUMBA_DISABLE_JIT="1").communicate(timeout=120)[0].strip() == "reference"


DIGEST = """
import hashlib, torch
from helix.models.scan import selective_scan
x = torch.linspace(-1, 1, 2 * 30 * 20).view(2, 30, 20)
y = selective_scan(x, x, -torch.ones(20, 3), x[..., :3], x[..., 3:6], torch.ones(20), x, dt_bias_E=torch.zeros(20))
print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


def test_two_processes_compile_at_once_and_a_third_not_at_all(tmp_path):
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = [process.communicate(timeout=300) for process in [python(DIGEST, **folder) for _ in range(2)]]
    third = python(DIGEST, **folder).communicate(timeout=300)
    assert len({out for out, _ in (*first, third)}) == 1
    assert len(first[0][0].strip()) == hashlib.sha256().digest_size * 2
    assert any(errors.count("compiling the CPU scan") == 1 for _, errors in first)
    assert "compiling" not in third[1]


def test_a_folder_that_cannot_be_written_costs_the_cache_only(monkeypatch, caplog):
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with caplog.at_level(logging.WARNING):
        kernel = scan_numba._compile(scan_numba._sum_parts)
    assert "cannot be kept" in caplog.text
    parts, sums = torch.randn(2, 3, 40), torch.empty(2, 40)
    kernel(parts.data_ptr(), sums.data_ptr(), 2, 3, 40)
    assert torch.allclose(sums, parts.sum(1), atol=1e-6)


def test_no_call_compiles_a_second_time():
    run(scanned("numba"), scan_inputs(1, 5, 8, 2))
    run(convolved(), conv_inputs(1, 5, 8, 2))
    kernels = [scan_numba._kernel(function) for function in scan_numba._compiled]
    assert len(kernels) == 5
    assert all(len(kernel.signatures) == 1 and not kernel._can_compile for kernel in kernels)


PEAK = """
import resource, torch
from helix.models.scan import selective_scan
torch.set_num_threads(1)
def fit(L, E=512, N=32):
    uz, dt, BC = torch.zeros(1, L, 2 * E), torch.zeros(1, L, E), torch.zeros(1, L, 2 * N)
    given = [*uz.chunk(2, -1), dt, *BC.chunk(2, -1), -torch.ones(E, N), torch.ones(E), torch.zeros(E)]
    u, z, dt, B, C, A, D, bias = [x.requires_grad_() for x in given]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y = selective_scan(u, dt, A, B, C, D, z, dt_bias_E=bias)
    torch.autograd.grad(y, (u, dt, A, B, C, D, z, bias), torch.ones_like(y))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
fit(100)
print(fit(30000))
"""


def test_30000_tokens_train_in_550_mebibytes():
    """The issue: no tensor [B, L, E, N], which alone would be 1875 MiB."""
    process = python(PEAK)
    assert float(process.communicate(timeout=120)[0]) <= 550
