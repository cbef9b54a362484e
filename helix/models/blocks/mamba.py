"""The bidirectional Mamba block (BiMamba). Gu and Dao 2023, arXiv:2312.00752; HELIX paper eq. 3 to 6.

Two independent Mamba layers read the normalised tokens, one from the first to the last and one from the last to the
first. The second does not flip anything: its convolution is anti-causal and its scan runs backwards, which is the same.
Parameters have the names and the initialisation of mamba-ssm's `Mamba`.

Legend: B batch, L tokens, D width, E inner width, N state, K taps of the convolution.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helix.models.block import Layer
from helix.models.scan import numba_kernels, scan_backend, selective_scan
from helix.protocol import Protocol
from helix.registry import BLOCKS

#: The step sizes that softplus(dt_proj.bias) is drawn from, log-uniformly.
DT_LOW, DT_HIGH = 1e-3, 1e-1


@BLOCKS.register("mamba")
@dataclass(frozen=True, kw_only=True)
class BiMamba:
    """Mamba in both directions. Asked for a parameter count, it chooses the nearest inner width."""

    d_state: int = 32
    d_conv: int = 4
    expand: int = 2

    def build(self, *, width: int, parameters: int | None, protocol: Protocol) -> Layer:  # noqa: ARG002  (the contract's)
        inner = self.expand * width
        if parameters is not None:
            rank = math.ceil(width / 16)
            fixed = 2 * width + 2 * width**2 + width
            per_channel = 2 * (3 * width + self.d_conv + 3 + 2 * rank + 3 * self.d_state)
            inner = round((parameters - fixed) / per_channel)
            if inner < 1:
                raise ValueError(
                    f"block 'mamba' of width {width} cannot have {parameters} parameters: the smallest has "
                    f"{fixed + per_channel}; choose a larger reference block"
                )
        return BiMambaLayer(width, inner, self.d_state, self.d_conv)


class BiMambaLayer(Layer):
    """x + out_proj([forward(norm(x)); backward(norm(x))])."""

    def __init__(self, width: int, inner: int, d_state: int, d_conv: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mamba_forward = Mamba(width, inner, d_state, d_conv, reverse=False)
        self.mamba_backward = Mamba(width, inner, d_state, d_conv, reverse=True)
        self.out_proj = nn.Linear(2 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        h_BLD = self.norm(x_BLD)
        return x_BLD + self.out_proj(torch.cat([self.mamba_forward(h_BLD), self.mamba_backward(h_BLD)], dim=-1))

    def flops(self, tokens: int) -> int:
        return 2 * self.mamba_forward.flops(tokens) + 2 * tokens * self.out_proj.weight.numel()


class Mamba(nn.Module):
    """One selective state-space layer, from the first token to the last, or from the last to the first."""

    def __init__(self, width: int, inner: int, d_state: int, d_conv: int, *, reverse: bool):
        super().__init__()
        rank = math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.splits, self.reverse = (rank, d_state, d_state), reverse
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        dt_E = torch.exp(torch.empty(inner).uniform_(math.log(DT_LOW), math.log(DT_HIGH)))
        with torch.no_grad():
            # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
            self.dt_proj.bias.copy_(dt_E + torch.log(-torch.expm1(-dt_E)))

    def forward(self, h_BLD: Tensor) -> Tensor:
        u_BLE, z_BLE = self.in_proj(h_BLD).chunk(2, dim=-1)
        u_BLE = conv_silu(u_BLE, self.conv1d.weight, self.conv1d.bias, reverse=self.reverse)
        dt_BLR, B_BLN, C_BLN = self.x_proj(u_BLE).split(self.splits, dim=-1)
        y_BLE = selective_scan(
            u_BLE,
            nn.functional.linear(dt_BLR, self.dt_proj.weight),
            -torch.exp(self.A_log),
            B_BLN,
            C_BLN,
            self.D,
            z_BLE,
            dt_bias_E=self.dt_proj.bias,
            reverse=self.reverse,
        )
        return self.out_proj(y_BLE)

    def flops(self, tokens: int) -> int:
        """The matrix products and the convolution, two for each weight; and nine for each number of the states."""
        weights = (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        return tokens * (2 * sum(layer.weight.numel() for layer in weights) + 9 * self.A_log.numel())


def conv_silu(u_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor | None, *, reverse: bool) -> Tensor:
    """silu(depthwise_conv(...)), by the same backend as the scan where that can do it."""
    kernels = numba_kernels() if scan_backend(u_BLE.device, weight_E1K.dtype) == "numba" else None
    if kernels is None or bias_E is None:
        return nn.functional.silu(depthwise_conv(u_BLE, weight_E1K, bias_E, reverse=reverse))
    y_BLE = kernels.conv_silu(u_BLE.to(weight_E1K.dtype), weight_E1K.squeeze(1), bias_E, reverse)
    return y_BLE.to(u_BLE.dtype)


def depthwise_conv(u_BLE: Tensor, weight_E1K: Tensor, bias_E: Tensor | None, *, reverse: bool) -> Tensor:
    """Each channel's convolution over its own past tokens, or with `reverse` over those to come.

    As a two-dimensional convolution with the channels last, which is how the tokens already lie in memory.
    """
    past = weight_E1K.shape[-1] - 1
    padded_BLE = nn.functional.pad(u_BLE, (0, 0, 0, past) if reverse else (0, 0, past, 0))
    if reverse:
        weight_E1K = weight_E1K.flip(-1)
    y_BE1L = nn.functional.conv2d(padded_BLE.mT.unsqueeze(2), weight_E1K.unsqueeze(2), bias_E, groups=len(weight_E1K))
    return y_BE1L.squeeze(2).mT
