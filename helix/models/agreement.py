"""How near an implementation is to a wanted one: inputs as a layer makes them, outputs and all gradients, one number.

Tensors are drawn and rounded in float32 and then taken to the dtype of the implementation, so that every one of them
starts from the same numbers, also the float64 that says what is right.

Legend: B batch, L tokens, E channels, N state, K taps, H heads.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from helix.models.scan import selective_scan, selective_scan_sequential

#: What `run` returns for a scan, a convolution and an attention, in this order: the output, then gradients.
SCAN_NAMES = ("y", "u", "dt", "A", "B", "C", "D", "z", "dt_bias")
CONV_NAMES = ("y", "u", "weight", "bias")
ATTENTION_NAMES = ("y", "q", "k", "v")

#: The relative error in the Euclidean norm that a scan in float32 may have in its output and each gradient, by the type
#: of its device. A GPU's exponential is an approximation.
SCAN_BOUNDS = {"cpu": 5e-7, "cuda": 1e-5}

#: The most tokens for which the recurrence itself, one token after the other, says what is right: the time of its
#: gradients grows with the square of their number. For more it is the chunked reference in float64, which tests hold to
#: the recurrence within 1e-12.
SEQUENTIAL_TOKENS = 1000


def scan_inputs(batch: int, tokens: int, channels: int, state: int, *, seed: int = 0) -> list[Tensor]:
    """u, dt, A, B, C, D, z, dt_bias in float32, near the initialisation of a Mamba layer and laid out as there.

    u, z, B and C are slices of wider tensors.
    """
    normal = _normal(seed)
    u_BLE, z_BLE = normal(batch, tokens, 2 * channels).chunk(2, dim=-1)
    B_BLN, C_BLN = normal(batch, tokens, 2 * state).chunk(2, dim=-1)
    A_EN = -torch.arange(1.0, state + 1) * torch.exp(0.1 * normal(channels, state))
    dt_BLE = 0.5 * normal(batch, tokens, channels)
    return [u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, normal(channels), z_BLE, normal(channels) - 3]


def compile_kernels() -> None:
    """Have the scan's kernels compiled, so that no figure has that in it."""
    with torch.no_grad():
        scanned(selective_scan)(*scan_inputs(1, 2, 4, 2))


def conv_inputs(batch: int, tokens: int, channels: int, taps: int, *, seed: int = 0) -> list[Tensor]:
    """u [B, L, E], weight [E, 1, K] and bias [E] in float32."""
    normal = _normal(seed)
    return [normal(batch, tokens, 2 * channels)[..., :channels], normal(channels, 1, taps), normal(channels)]


def attention_inputs(batch: int, heads: int, tokens: int, size: int, *, seed: int = 0) -> list[Tensor]:
    """q, k and v, [B, H, L, K], in float32."""
    normal = _normal(seed)
    return [normal(batch, heads, tokens, size) for _ in range(3)]


def run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The output of `function(*inputs)` and the gradients of all its inputs for one fixed gradient of the output."""
    leaves = [x.to(device, dtype).detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    weights = _normal(1)(*y.shape).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def scanned(function: Callable[..., Tensor], *, reverse: bool = False) -> Callable[..., Tensor]:
    """A scan as a function of the tensors of `scan_inputs`."""
    return lambda *tensors: function(*tensors[:-1], dt_bias_E=tensors[-1], reverse=reverse)


def by_backend(name: str) -> Callable[..., Tensor]:
    """The scan by that backend, as a function of the tensors of `scan_inputs`."""
    return partial(selective_scan, backend=name)


def exact_scan(inputs: Sequence[Tensor], *, reverse: bool = False, device: torch.device | str = "cpu") -> list[Tensor]:
    """What is right for the tensors of `scan_inputs`: the output and all gradients in float64, taken on `device`."""
    short = inputs[0].shape[1] <= SEQUENTIAL_TOKENS
    exact = selective_scan_sequential if short else by_backend("reference")
    return run(scanned(exact, reverse=reverse), inputs, dtype=torch.float64, device=device)


def explicit_attention(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with the weights written out."""
    return torch.softmax(q_BHLK @ k_BHLK.mT / q_BHLK.shape[-1] ** 0.5, dim=-1) @ v_BHLK


def explicit_conv_silu(u_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor, *, reverse: bool) -> Tensor:
    """silu of each channel's convolution over its past (or coming) tokens, one tap after the other."""
    taps, tokens = weight_E1K.shape[-1], u_BLE.shape[1]
    y_BLE = bias_E.expand_as(u_BLE)
    for past in range(min(taps, tokens)):
        shifted = u_BLE[:, past:] if reverse else u_BLE[:, : tokens - past]
        padding = (0, 0, 0, past) if reverse else (0, 0, past, 0)
        y_BLE = y_BLE + weight_E1K[:, 0, taps - 1 - past] * nn.functional.pad(shifted, padding)
    return nn.functional.silu(y_BLE)


def relative_errors(given: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str]) -> dict[str, float]:
    """|given - wanted| / |wanted| of each tensor, in the Euclidean norm of float64; inf where given is not finite."""
    return {name: _distance(g, w) for name, g, w in zip(names, given, wanted, strict=True)}


def _distance(given: Tensor, wanted: Tensor) -> float:
    given, wanted = given.detach().cpu().double(), wanted.detach().cpu().double()
    if not bool(given.isfinite().all()):
        return float("inf")
    return float((given - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _normal(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)
