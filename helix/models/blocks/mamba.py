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
from helix.models.scan import conv_silu, selective_scan
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

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        # Both read the same tokens, so their input projections are one matrix product.
        in_proj = torch.cat([self.mamba_forward.in_proj.weight, self.mamba_backward.in_proj.weight])
        u1_BLE, z1_BLE, u2_BLE, z2_BLE = nn.functional.linear(self.norm(x_BLD), in_proj).chunk(4, dim=-1)
        y1_BLD = self.mamba_forward.mix(u1_BLE, z1_BLE, mask_BL)
        y2_BLD = self.mamba_backward.mix(u2_BLE, z2_BLE, mask_BL)
        return x_BLD + self.out_proj(torch.cat([y1_BLD, y2_BLD], dim=-1))

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

    def forward(self, h_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        u_BLE, z_BLE = self.in_proj(h_BLD).chunk(2, dim=-1)
        return self.mix(u_BLE, z_BLE, mask_BL)

    def mix(self, u_BLE: Tensor, z_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The layer after its input projection. What is not in the mask leaves no trace in any state.

        So the direction that meets the padding first starts at the last sounding token, as if nothing came after it.
        """
        u_BLE = conv_silu(_keep(u_BLE, mask_BL), self.conv1d.weight, _bias(self.conv1d), reverse=self.reverse)
        u_BLE = _keep(u_BLE, mask_BL)
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


def _keep(x_BLE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Zero outside of the mask."""
    return x_BLE if mask_BL is None else x_BLE * mask_BL[:, :, None]


def _bias(layer: nn.Conv1d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
