"""Which scan backends run here, and whether they are right: each against the float64 recurrence, with all gradients."""

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helix.doctor import Asked, Check
from helix.errors import in_one_line
from helix.models.agreement import (
    CONV_NAMES,
    SCAN_BOUNDS,
    SCAN_NAMES,
    conv_inputs,
    explicit_conv_silu,
    relative_errors,
    run,
    scan_inputs,
    scanned,
)
from helix.models.scan import (
    BACKENDS,
    conv_silu,
    forced,
    require_usable,
    scan_backend,
    selective_scan,
    selective_scan_sequential,
)
from helix.models.scan_error import UnusableScanError
from helix.registry import CHECKS

#: Each backend, and the type of device that it is for ("" any).
SUITS = {"reference": "", **{name: backend.device for name, backend in BACKENDS.items()}}

#: The relative error, in the Euclidean norm, that an output or a gradient may have on a CPU.
BOUNDS = {torch.float64: 1e-12, torch.float32: SCAN_BOUNDS["cpu"]}

#: The same for the convolution, whose bias torch sums over all tokens in one go.
CONV_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}

#: What a backend for CUDA is made of.
MISSING = {"triton": "triton", "mamba_ssm": "mamba-ssm or causal-conv1d"}

#: Shapes that fill no chunk and no vector: batch, tokens, channels, state; and the taps of the convolution.
RAGGED = (2, 517, 37, 32)
TAPS = 4

#: Large enough that the kernels use several threads.
THREADED = (2, 517, 300, 16)

WRONG = (
    "the numbers are wrong: do not train with it. Take another with HELIX_SCAN=reference and report this with the rows "
    "of `helix doctor --json`"
)
RAISED = (
    "it cannot scan here, and no number of it is known to be wrong. Take another with HELIX_SCAN=reference, which is "
    "slow, and report this with the rows of `helix doctor --json`"
)
WRONG_ON_CUDA = (
    "on a GPU that is newer than the package, build mamba-ssm and causal-conv1d again, with nvcc and an -arch of this "
    "GPU (see `import mamba_ssm` above)"
)


@CHECKS.register("scan")
def scan(_: Asked) -> Iterable[Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    choices = {device: judge_choice(device) for device in devices}
    yield from choices.values()
    # The recurrence is many small operations, which several threads on a busy machine make slower, up to minutes.
    with torch_threads(1):
        for device in devices:
            for backend, suits in SUITS.items():
                if suits in ("", device):
                    yield from self_tests(backend, device)
    yield from (judge_determinism(device) for device in devices if choices[device].status != "fail")


def judge_choice(device: str) -> Check:
    """The backend that models take on this device in float32."""
    name = f"scan on {device}: choice"
    try:
        chosen = scan_backend(torch.device(device), torch.float32)
    except ValueError as error:
        advice = "unset HELIX_SCAN, or set it to auto"
        # A backend of another device may be asked for on purpose; a name that nobody has is a mistake.
        mistaken = os.environ["HELIX_SCAN"] not in SUITS
        return Check(name=name, status="fail", found=str(error), advice=advice, needed=device == "cpu" and mistaken)
    if why_not_usable(chosen, device) is not None:
        found, advice = f"{chosen}, which cannot run here", f"see the row {row_of(chosen, device)!r}"
        return Check(name=name, status="fail", found=found, advice=advice)
    named = os.environ.get("HELIX_SCAN") or "auto"
    said = "" if named == "auto" else f", as HELIX_SCAN={named} asks"
    if chosen == "reference" and named == "auto":
        return Check(name=name, status="warn", found=chosen, advice="works, but slowly; the rows below say why")
    return Check(name=name, status="ok", found=f"{chosen}{said}")


def self_tests(backend: str, device: str) -> Iterable[Check]:
    """The scan and the convolution of one backend, in every dtype that it can do, forward and reversed."""
    missing = why_not(backend, device) or why_not_usable(backend, device)
    if missing is not None:
        yield missing
        return
    for dtype in (torch.float32, torch.float64):
        if not can_scan(backend, device, dtype):
            continue
        said = f"{backend} on {device}, {str(dtype).removeprefix('torch.')}"
        fast = suits_cuda(backend)
        with forced(backend):
            for what, errors, bounds in (("scan", scan_errors, BOUNDS), ("conv", conv_errors, CONV_BOUNDS)):
                bound = SCAN_BOUNDS["cuda"] if fast else bounds[dtype]
                yield judge_errors(f"{what} {said}", functools.partial(errors, device, dtype), bound, device)


def suits_cuda(backend: str) -> bool:
    return SUITS[backend] == "cuda"


def can_scan(backend: str, device: str, dtype: torch.dtype) -> bool:
    try:
        return scan_backend(torch.device(device), dtype, backend=backend) == backend
    except ValueError:
        return False


def why_not(backend: str, device: str) -> Check | None:
    """None where the backend scans float32 on the device, else a row that says what is in the way."""
    if can_scan(backend, device, torch.float32):
        return None
    name = row_of(backend, device)
    if suits_cuda(backend):
        found = f"{MISSING[backend]} cannot be imported"
        return Check(name=name, status="absent", found=found, advice="see the rows `import ...` for why, and the cure")
    try:
        importlib.import_module("helix.models.scan_numba")
    except Exception as error:  # as where the scan imports it
        return Check(name=name, status="fail", found=f"cannot be imported: {error}", advice=cure_of_numba(str(error)))
    return Check(name=name, status="fail", found="refused", advice="report this with the rows of `helix doctor --json`")


def why_not_usable(backend: str, device: str) -> Check | None:
    """None where nothing of this machine is in the way of a backend that can be imported, else a row that says what."""
    try:
        require_usable(backend)
    except UnusableScanError as error:
        return Check(name=row_of(backend, device), status="fail", found=error.found, advice=error.advice)
    except OSError as error:  # what makes it ready writes to a disk, which may be full
        return Check(name=row_of(backend, device), status="fail", found=in_one_line(error), advice=RAISED)
    return None


def row_of(backend: str, device: str) -> str:
    return f"scan {backend} on {device}"


def cure_of_numba(error: str) -> str:
    if "NUMBA_DISABLE_JIT" in error:
        return "unset NUMBA_DISABLE_JIT; until then the CPU scan takes the reference, about ten times slower"
    return (
        "pip install -c constraints.txt --force-reinstall numba llvmlite (a numba that is older than the numpy here "
        "refuses it); until then the CPU scan takes the reference, about ten times slower"
    )


def scan_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The larger relative error of both directions for the output and each gradient."""
    inputs = scan_inputs(*RAGGED)
    return _both_ways(
        lambda reverse: scanned(selective_scan, reverse=reverse),
        lambda reverse: scanned(selective_scan_sequential, reverse=reverse),
        inputs,
        SCAN_NAMES,
        device=device,
        dtype=dtype,
    )


def conv_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    batch, tokens, channels, _ = RAGGED
    return _both_ways(
        lambda reverse: lambda *x: conv_silu(*x, reverse=reverse),
        lambda reverse: lambda *x: explicit_conv_silu(*x, reverse=reverse),
        conv_inputs(batch, tokens, channels, TAPS),
        CONV_NAMES,
        device=device,
        dtype=dtype,
    )


def judge_errors(name: str, errors_of: Callable[[], dict[str, float]], bound: float, device: str) -> Check:
    """`ok` where every error is within the bound; the row names the worst."""
    needed = name.startswith(("scan reference", "conv reference")) and device == "cpu"
    try:
        errors = errors_of()
    except Exception as error:  # a kernel can raise whatever its compiler and its driver do
        found, advice = in_one_line(error), f"{RAISED}; {WRONG_ON_CUDA}"
        return Check(name=name, status="fail", found=found, advice=advice, needed=needed)
    worst = max(errors, key=lambda key: errors[key])
    found = f"relative error {errors[worst]:.1e} ({worst}), at most {bound:.0e} is right"
    if errors[worst] <= bound:
        return Check(name=name, status="ok", found=found, needed=needed)
    advice = f"{WRONG}; {WRONG_ON_CUDA}" if device == "cuda" else WRONG
    return Check(name=name, status="fail", found=found, advice=advice, needed=needed)


def judge_determinism(device: str) -> Check:
    """Twice the same bits by the backend that models take; on a CPU also with other numbers of threads."""
    name = f"scan on {device}: same bits again"
    try:
        different, runs = differences(device)
    except Exception as error:  # as where the numbers are judged, which has a row of its own
        advice = "see the rows of the backends above; it is not known whether it gives the same bits again"
        return Check(name=name, status="fail", found=in_one_line(error), advice=advice)
    if not different:
        return Check(name=name, status="ok", found=f"equal: {', '.join(runs)}")
    advice = "a trial that is killed and resumed ends with the same bits only with the same number of --threads"
    if device == "cuda":
        advice = (
            "a trial that is killed and resumed will not end with the same bits, unless it is asked for with "
            "`--deterministic`; `helix certify --device cuda --scan mamba_ssm` measures the drift"
        )
    return Check(name=name, status="warn", found=f"different: {', '.join(different)}", advice=advice)


def differences(device: str) -> tuple[list[str], list[str]]:
    """The runs with other bits than the first, each with what differs; and all that were held against it."""
    inputs = scan_inputs(*THREADED)

    def once() -> list[Tensor]:
        return run(scanned(selective_scan), inputs, dtype=torch.float32, device=device)

    first = once()
    runs = {"a second run": once()}
    if device == "cpu":
        for threads in (1, 2, 4):
            with torch_threads(threads):
                runs[f"{threads} threads"] = once()
    different = []
    for key, again in runs.items():
        names = [name for name, a, b in zip(SCAN_NAMES, first, again, strict=True) if not torch.equal(a, b)]
        different += [f"{key} ({', '.join(names)})"] if names else []
    return different, list(runs)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _both_ways(
    given: Callable[[bool], Callable[..., Tensor]],
    wanted: Callable[[bool], Callable[..., Tensor]],
    inputs: list[Tensor],
    names: tuple[str, ...],
    *,
    device: str,
    dtype: torch.dtype,
) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys(names, 0.0)
    for reverse in (False, True):
        tried = run(given(reverse), inputs, dtype=dtype, device=device)
        right = run(wanted(reverse), inputs, dtype=torch.float64)
        for name, error in relative_errors(tried, right, names).items():
            found[name] = max(found[name], error)
    return found
