"""The selective scan of Mamba (Gu and Dao 2023, arXiv:2312.00752, section 3.2), in chunks and in plain torch.

For every batch entry and channel e a state h of N numbers runs along the tokens:

    d_t = softplus(dt_t + dt_bias)      h_t = exp(d_t A) h_{t-1} + d_t u_t B_t      y_t = (h_t . C_t + D u_t) silu(z_t)

Semantics and argument names follow `selective_scan_fn` of mamba-ssm; here the tokens stand before the channels, and
`reverse` runs the recurrence from the last token to the first in place, so that no caller flips anything.

`selective_scan` and `conv_silu` choose between this reference and faster kernels: helix.models.scan_numba on a CPU, on
CUDA helix.models.scan_mamba_ssm where it is installed and the same bits again were not asked for
(torch.use_deterministic_algorithms), else helix.models.scan_triton. HELIX_SCAN in the environment overrides the choice.
Where the one that is taken lacks something of the machine, it is refused (UnusableScanError).

Legend: B batch, L tokens, E inner channels, N state, K taps of the convolution; R batch entries and Q tokens of one
chunk.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

#: Tokens per chunk. The state at the start of each is kept for the backward: N / CHUNK tensors of [B, L, E].
CHUNK = 16

#: Numbers in the states [R, N, E] of the batch entries that a CPU runs together, so that its caches hold their chunk.
CPU_STATES = 16384


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A module with the functions `selective_scan` and `conv_silu`, imported on first use: it may not be installed.

    `device` is the type that it runs on. `mixed`: it takes activations of another dtype than the parameters' float32.
    `deterministic`: it gives the same bits again. `extras`: packages whose absence needs no word, since another backend
    does the work. `ready`: makes what a first use on the device needs; raises UnusableScanError where it cannot.
    """

    device: str
    load: Callable[[], ModuleType]
    ready: Callable[[], None] = lambda: None
    mixed: bool = False
    deterministic: bool = True
    extras: tuple[str, ...] = ()


#: What may stand in for the reference; where several can, the last is taken.
BACKENDS: dict[str, Backend] = {
    "numba": Backend(device="cpu", load=lambda: importlib.import_module("helix.models.scan_numba")),
    "triton": Backend(
        device="cuda",
        load=lambda: importlib.import_module("helix.models.scan_triton"),
        ready=lambda: importlib.import_module("helix.models.scan_triton_driver").require_driver(),
        mixed=True,
    ),
    "mamba_ssm": Backend(
        device="cuda",
        load=lambda: importlib.import_module("helix.models.scan_mamba_ssm"),
        mixed=True,
        deterministic=False,
        extras=("mamba_ssm", "causal_conv1d"),
    ),
}


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    *,
    dt_bias_E: Tensor,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y_BLE, differentiable in every tensor. Every model scans through this one function.

    The same bits again: numba always, triton on one kind of GPU, the reference with one number of threads, mamba_ssm
    not in its gradients. Under torch.use_deterministic_algorithms that one is not taken, and refused where it is named.

    Computed in the dtype of `A_EN`, which under autocast is still the parameters'; returned in the dtype of `u_BLE`.
    Raises ValueError where the backend is unknown or cannot do this, UnusableScanError where this machine lacks what it
    needs.
    """
    chosen = scan_backend(u_BLE.device, A_EN.dtype, backend=backend)
    module, inputs = _usable(chosen), [u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E]
    with torch.autocast(u_BLE.device.type, enabled=False):
        if module is None or not BACKENDS[chosen].mixed:
            inputs = [x.to(A_EN.dtype) for x in inputs]
        y_BLE = (_ChunkedScan.apply if module is None else module.selective_scan)(*inputs, reverse)
    return y_BLE.to(u_BLE.dtype)


def conv_silu(
    u_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """silu of each channel's convolution over its own past tokens, or with `reverse` over those to come.

    By the same backend as the scan; a kernel keeps none of the results in between. Raises as the scan does.
    """
    chosen = scan_backend(u_BLE.device, weight_E1K.dtype, backend=backend)
    module = _usable(chosen)
    if module is None:
        return nn.functional.silu(depthwise_conv(u_BLE, weight_E1K, bias_E, reverse=reverse))
    with torch.autocast(u_BLE.device.type, enabled=False):
        given = u_BLE if BACKENDS[chosen].mixed else u_BLE.to(weight_E1K.dtype)
        return module.conv_silu(given, weight_E1K.squeeze(1), bias_E, reverse).to(u_BLE.dtype)


def depthwise_conv(u_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor, *, reverse: bool) -> Tensor:
    """Each channel's convolution over its own past tokens, or with `reverse` over those to come.

    As a two-dimensional convolution with the channels last, which is how the tokens already lie in memory.
    """
    past = weight_E1K.shape[-1] - 1
    padded_BLE = nn.functional.pad(u_BLE, (0, 0, 0, past) if reverse else (0, 0, past, 0))
    if reverse:
        weight_E1K = weight_E1K.flip(-1)
    y_BE1L = nn.functional.conv2d(padded_BLE.mT.unsqueeze(2), weight_E1K.unsqueeze(2), bias_E, groups=len(weight_E1K))
    return y_BE1L.squeeze(2).mT


def scan_backend(device: torch.device, dtype: torch.dtype, *, backend: str = "auto") -> str:
    """The backend that `selective_scan` takes: the fastest, unless the caller or else HELIX_SCAN names one.

    Under torch.use_deterministic_algorithms the fastest of those that give the same bits again. Raises ValueError where
    the one that is named is unknown or cannot do this.
    """
    if _simulated is not None:
        return _simulated
    possible = ["reference"]
    if dtype == torch.float32:
        possible += [name for name, kernels in BACKENDS.items() if kernels.device == device.type and _is_there(name)]
    drifting = [name for name in possible if drifts(name)] if torch.are_deterministic_algorithms_enabled() else []
    wanted = wanted_backend(backend)
    if wanted == "auto":
        return [name for name in possible if name not in drifting][-1]
    if wanted in drifting:
        raise ValueError(
            f"scan backend {wanted!r} does not give the same bits again, which was asked for (--deterministic, or "
            f"torch.use_deterministic_algorithms); unset HELIX_SCAN, or do not ask"
        )
    if wanted not in possible:
        raise ValueError(
            f"scan backend {wanted!r} cannot scan {dtype} on {device.type}; possible: auto, {', '.join(possible)}"
        )
    return wanted


def wanted_backend(backend: str = "auto") -> str:
    """The backend that the caller names, or else HELIX_SCAN; auto where neither does."""
    return (os.environ.get("HELIX_SCAN") or "auto") if backend == "auto" else backend


def drifts(backend: str) -> bool:
    """Whether a backend, by its name, gives other bits when it runs again."""
    return backend in BACKENDS and not BACKENDS[backend].deterministic


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Everything in this process scans and convolves by this backend, as HELIX_SCAN asks for it."""
    before = os.environ.get("HELIX_SCAN")
    os.environ["HELIX_SCAN"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["HELIX_SCAN"]
        else:
            os.environ["HELIX_SCAN"] = before


@contextmanager
def chosen_for_a_cpu() -> Iterator[None]:
    """What HELIX_SCAN asks of a GPU is set aside: for a figure of a CPU beside those of the GPU that trains."""
    wanted = wanted_backend()
    of_a_gpu = wanted in BACKENDS and BACKENDS[wanted].device != "cpu"
    with forced("auto" if of_a_gpu else wanted):
        yield


@contextmanager
def simulated(backend: str) -> Iterator[None]:
    """Everything in this process scans and convolves by this backend, on whatever device and whatever else is asked.

    For tensors that have shapes alone, which need no device; no kernel can be run so.
    """
    global _simulated
    before, _simulated = _simulated, backend
    try:
        yield
    finally:
        _simulated = before


#: The backend of `simulated`.
_simulated: str | None = None


def kernels(backend: str) -> ModuleType | None:
    """The module of a backend; None for the reference, and where it cannot be imported."""
    return _kernels[backend] if backend in BACKENDS and _is_there(backend) else None


def require_usable(backend: str) -> None:
    """Raises UnusableScanError where a backend that can be imported lacks something of this machine.

    To be asked in the process that scans and on its device, unlike `kernels`: what only counts needs no GPU.
    """
    if kernels(backend) is not None:
        _is_ready(backend)


def _usable(backend: str) -> ModuleType | None:
    if _simulated is None:
        require_usable(backend)
    return kernels(backend)


#: The modules of BACKENDS that were imported so far.
_kernels: dict[str, ModuleType] = {}


def _not_followed(function: F) -> F:
    """Where torch.compile meets the function, it takes what it returns and does not try to follow it.

    This is all that assume_constant_result of torch.compiler does, but for importing the compiler itself: a second and
    0.1 GB of every process that never compiles.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@_not_followed
def _is_there(name: str) -> bool:
    return _import(name)


@_not_followed
def _is_ready(name: str) -> bool:
    return _make_ready(name)


@cache
def _import(name: str) -> bool:
    """On first use and not before: it takes a second, and the library may be missing or built for another torch."""
    try:
        _kernels[name] = BACKENDS[name].load()
    except Exception as error:  # a library that does not load ends its import in OSError, RuntimeError or what it likes
        if isinstance(error, ModuleNotFoundError) and error.name in BACKENDS[name].extras:
            return False
        logger.warning("%s cannot be imported (%r): another scans, maybe much slower; see `helix doctor`", name, error)
    return name in _kernels


@cache
def _make_ready(name: str) -> bool:
    """On first use and not before; what fails is tried again."""
    BACKENDS[name].ready()
    return True


def selective_scan_sequential(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    *,
    dt_bias_E: Tensor,
    reverse: bool = False,
) -> Tensor:
    """The slow twin of `selective_scan`: the equations above, one token after the other, with torch's own gradients."""
    batch, tokens, channels = u_BLE.shape
    d_BLE = nn.functional.softplus(dt_BLE + dt_bias_E)
    h_BEN = u_BLE.new_zeros(batch, channels, A_EN.shape[1])
    y_BE: dict[int, Tensor] = {}
    for t in reversed(range(tokens)) if reverse else range(tokens):
        decay_BEN = torch.exp(d_BLE[:, t, :, None] * A_EN)
        h_BEN = decay_BEN * h_BEN + (d_BLE[:, t] * u_BLE[:, t])[:, :, None] * B_BLN[:, t, None, :]
        y_BE[t] = (h_BEN * C_BLN[:, t, None, :]).sum(-1) + D_E * u_BLE[:, t]
    return torch.stack([y_BE[t] for t in range(tokens)], dim=1) * nn.functional.silu(z_BLE)


class _ChunkedScan(torch.autograd.Function):
    """Chunks of CHUNK tokens in turn; in each, everything but the recurrence itself is a handful of large operations.

    The forward keeps its inputs and the state at every chunk's start. The backward walks the chunks the other way,
    recomputes the states of one chunk, runs the adjoint recurrence g_t = C_t dy_t + exp(d_{t+1} A) g_{t+1} over it and
    reduces. Nothing is divided by a cumulative decay, so strong decays lose no precision.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, reverse = inputs
        A_NE = A_EN.t().contiguous()
        d_BLE = nn.functional.softplus(dt_BLE + dt_bias_E)
        y_BLE = torch.empty_like(d_BLE)
        spans = _pieces(u_BLE.shape[1], CHUNK)
        starts = u_BLE.new_empty(len(spans), len(u_BLE), *A_NE.shape)
        for rows in _rows(u_BLE, A_NE):
            h_RNE = torch.zeros_like(starts[0, rows])
            chunks = _chunks(spans, A_NE, h_RNE, reverse)
            for c, span in _in_order(list(enumerate(spans)), reverse):
                chunk, at = chunks[c], (rows, span)
                starts[c, rows] = h_RNE
                u_RQE, d_RQE = u_BLE[at], d_BLE[at]
                h_RNE = chunk.run(d_RQE, d_RQE * u_RQE, B_BLN[at], h_RNE)
                y_RQE = chunk.read(C_BLN[at]).addcmul_(u_RQE, D_E)
                torch.mul(y_RQE, nn.functional.silu(z_BLE[at]), out=y_BLE[at])
        ctx.save_for_backward(u_BLE, d_BLE, A_NE, B_BLN, C_BLN, D_E, z_BLE, starts)
        ctx.reverse = reverse
        return y_BLE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_BLE: Tensor) -> Any:  # type: ignore[override]
        with torch.autocast(dout_BLE.device.type, enabled=False):
            return (*_gradients(ctx.saved_tensors, dout_BLE, reverse=ctx.reverse), None)


def _gradients(saved: Sequence[Tensor], dout_BLE: Tensor, *, reverse: bool) -> tuple[Tensor, ...]:
    """The gradients of u, dt, A, B, C, D, z and dt_bias, from what the forward saved and the gradient of its output."""
    u_BLE, d_BLE, A_NE, B_BLN, C_BLN, D_E, z_BLE, starts = saved
    du_BLE, ddt_BLE, dz_BLE = (torch.empty_like(d_BLE) for _ in range(3))
    dB_BLN, dC_BLN = (d_BLE.new_empty(B_BLN.shape) for _ in range(2))
    # Sums over all tokens, chunk by chunk: in the dtype of the inputs they would round once in every chunk.
    dA_NE, dD_E = (torch.zeros_like(x, dtype=torch.float64) for x in (A_NE, D_E))
    spans = _pieces(u_BLE.shape[1], CHUNK)
    for rows in _rows(u_BLE, A_NE):
        carry_RNE = torch.zeros_like(starts[0, rows])
        chunks = _chunks(spans, A_NE, carry_RNE, reverse)
        for c, span in _in_order(list(enumerate(spans)), not reverse):
            chunk, at = chunks[c], (rows, span)
            u_RQE, d_RQE, z_RQE, dout_RQE = u_BLE[at], d_BLE[at], z_BLE[at], dout_BLE[at]
            x_RQE = d_RQE * u_RQE
            chunk.run(d_RQE, x_RQE, B_BLN[at], starts[c, rows])
            y_RQE = chunk.read(C_BLN[at]).addcmul_(u_RQE, D_E)

            sigmoid_RQE = torch.sigmoid(z_RQE)
            silu_RQE = sigmoid_RQE * z_RQE
            # The slope of silu at z is s + silu(z) (1 - s), where s is sigmoid(z).
            slope_RQE = torch.addcmul(sigmoid_RQE, silu_RQE, 1 - sigmoid_RQE)
            torch.mul(y_RQE.mul_(dout_RQE), slope_RQE, out=dz_BLE[at])

            dy_RQE = silu_RQE.mul_(dout_RQE)
            carry_RNE, dA, dB_BLN[at], dC_BLN[at], dx_RQE, dd_RQE = chunk.pull(
                d_RQE, x_RQE, B_BLN[at], C_BLN[at], dy_RQE, carry_RNE
            )
            dA_NE += dA
            dD_E += (dy_RQE * u_RQE).sum((0, 1))
            # The slope of softplus, where it is d, is 1 - exp(-d).
            dd_RQE.addcmul_(dx_RQE, u_RQE)
            torch.mul(dd_RQE, torch.expm1(-d_RQE).neg_(), out=ddt_BLE[at])
            torch.addcmul(dx_RQE.mul_(d_RQE), dy_RQE, D_E, out=du_BLE[at])
    dbias_E = ddt_BLE.sum((0, 1), dtype=torch.float64)
    dA_EN, dD_E, dbias_E = (x.to(d_BLE.dtype) for x in (dA_NE.t(), dD_E, dbias_E))
    return du_BLE, ddt_BLE, dA_EN, dB_BLN, dC_BLN, dD_E, dz_BLE, dbias_E


class _Chunk:
    """The decays, states and adjoints of a chunk of Q tokens, in buffers that one chunk after the other uses."""

    def __init__(self, size: int, A_NE: Tensor, like_RNE: Tensor, reverse: bool):
        rows, state, channels = like_RNE.shape
        self.A_NE = A_NE
        self.decay_RQNE, self.state_RQNE, self.adjoint_RQNE = (
            like_RNE.new_empty(rows, size, state, channels) for _ in range(3)
        )
        self.start_RNE = torch.empty_like(like_RNE)
        # Views of single tokens, in the order in which the recurrence meets them: to make one costs as much as a step.
        decays, states, adjoints = (
            _in_order(x_RQNE.unbind(1), reverse) for x_RQNE in (self.decay_RQNE, self.state_RQNE, self.adjoint_RQNE)
        )
        self.steps = list(zip(states, (self.start_RNE, *states[:-1]), decays, strict=True))
        self.steps_back = list(zip(adjoints[:-1], adjoints[1:], decays[1:], strict=True))[::-1]
        self.first_decay, self.first_adjoint, self.last_adjoint = decays[0], adjoints[0], adjoints[-1]
        self.later, self.earlier = (slice(-1), slice(1, None)) if reverse else (slice(1, None), slice(-1))

    def run(self, d_RQE: Tensor, x_RQE: Tensor, B_RQN: Tensor, start_RNE: Tensor) -> Tensor:
        """Fill in the decays, and the states that follow `start_RNE`. Returns the last, lent until the next run."""
        self.start_RNE.copy_(start_RNE)
        torch.mul(d_RQE[:, :, None, :], self.A_NE, out=self.decay_RQNE).exp_()
        torch.mul(x_RQE[:, :, None, :], B_RQN[:, :, :, None], out=self.state_RQNE)
        for state, before, decay in self.steps:
            state.addcmul_(before, decay)
        return self.steps[-1][0]

    def read(self, C_RQN: Tensor) -> Tensor:
        """h . C, [R, Q, E]."""
        return _contract(C_RQN, self.state_RQNE)

    def pull(
        self, d_RQE: Tensor, x_RQE: Tensor, B_RQN: Tensor, C_RQN: Tensor, dy_RQE: Tensor, carry_RNE: Tensor
    ) -> tuple[Tensor, ...]:
        """After `run`, and using it up: what the chunk before this one needs; the gradients of A, B, C, x = d u, and d.

        That of d is the part that acts through the decays. `carry_RNE` is what this chunk needs from the one after it:
        the first adjoint there times the first decay there.
        """
        dC_RQN = torch.mul(self.state_RQNE, dy_RQE[:, :, None, :], out=self.adjoint_RQNE).sum(-1)
        torch.mul(dy_RQE[:, :, None, :], C_RQN[:, :, :, None], out=self.adjoint_RQNE)
        self.last_adjoint.add_(carry_RNE)
        for adjoint, later_adjoint, later_decay in self.steps_back:
            adjoint.addcmul_(later_adjoint, later_decay)
        carry_RNE = self.first_adjoint * self.first_decay
        dx_RQE = _contract(B_RQN, self.adjoint_RQNE)
        # From here on the decays hold the gradient of the exponent d A, which is decay x state before x adjoint.
        self.first_decay.mul_(self.start_RNE)
        self.decay_RQNE[:, self.later].mul_(self.state_RQNE[:, self.earlier])
        self.decay_RQNE.mul_(self.adjoint_RQNE)
        dB_RQN = self.adjoint_RQNE.mul_(x_RQE[:, :, None, :]).sum(-1)
        dd_RQE = torch.mul(self.decay_RQNE, self.A_NE, out=self.state_RQNE).sum(2)
        dA_NE = self.decay_RQNE.mul_(d_RQE[:, :, None, :]).sum((0, 1))
        return carry_RNE, dA_NE, dB_RQN, dC_RQN, dx_RQE, dd_RQE


def _contract(v_RQN: Tensor, m_RQNE: Tensor) -> Tensor:
    """The sum over N of v m, [R, Q, E], as one batch of small matrix products."""
    rows, size, state = v_RQN.shape
    return torch.bmm(v_RQN.reshape(rows * size, 1, state), m_RQNE.flatten(0, 1)).view(rows, size, -1)


def _rows(u_BLE: Tensor, A_NE: Tensor) -> list[slice]:
    """The batch entries that run together: all of them, or on a CPU as many as its caches hold."""
    size = max(1, CPU_STATES // A_NE.numel()) if u_BLE.device.type == "cpu" else len(u_BLE)
    return _pieces(len(u_BLE), size)


def _chunks(spans: list[slice], A_NE: Tensor, like_RNE: Tensor, reverse: bool) -> list[_Chunk]:
    """The buffers for each span; spans of one size share theirs."""
    sizes = [span.stop - span.start for span in spans]
    of_size = {size: _Chunk(size, A_NE, like_RNE, reverse) for size in set(sizes)}
    return [of_size[size] for size in sizes]


def _pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _in_order(items: Sequence[Any], reverse: bool) -> Sequence[Any]:
    return items[::-1] if reverse else items
