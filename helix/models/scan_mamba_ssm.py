"""The selective scan and the convolution before it by mamba-ssm and causal-conv1d, the CUDA kernels of Mamba's authors.

Gu and Dao 2023, arXiv:2312.00752. They scan forward only and have the channels before the tokens, so the reverse
direction is flipped going in and coming out. The backward adds with atomics: two runs differ in their last bits.

Legend: B batch, L tokens, E channels, N state, K taps of the convolution.
"""

from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]
from torch import Tensor


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    dt_bias_E: Tensor,
    reverse: bool,
) -> Tensor:
    """y_BLE. The parameters are float32; the activations are of one dtype, and states are float32 whichever it is."""
    u, dt, B, C, z = (_channels_first(x.to(u_BLE.dtype), reverse) for x in (u_BLE, dt_BLE, B_BLN, C_BLN, z_BLE))
    y_BEL = selective_scan_fn(u, dt, A_EN, B, C, D_E, z=z, delta_bias=dt_bias_E, delta_softplus=True)
    return y_BEL.flip(-1).mT if reverse else y_BEL.mT


def conv_silu(u_BLE: Tensor, weight_EK: Tensor, bias_E: Tensor, reverse: bool) -> Tensor:
    """silu of each channel's convolution over its own past tokens, or with `reverse` over those to come."""
    y_BEL = causal_conv1d_fn(_channels_first(u_BLE, reverse), weight_EK, bias_E, activation="silu")
    return y_BEL.flip(-1).mT if reverse else y_BEL.mT


def _channels_first(x_BLX: Tensor, reverse: bool) -> Tensor:
    # A flip keeps the layout of what it flips, and the kernels want the tokens side by side.
    x_BXL = x_BLX.mT.contiguous()
    return x_BXL.flip(-1) if reverse else x_BXL
