"""Self-attention with a feed-forward network, pre-norm. Vaswani et al. 2017, arXiv:1706.03762; HELIX paper eq. 7 to 10.

There are no positions, as in the paper and its authors' code: a stack of these alone does not see the order of tokens.
`protocol.pos = rope` turns queries and keys by their position (Su et al. 2021, arXiv:2104.09864).

Legend: B batch, L tokens, D width, H heads, K channels of one head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helix.models.block import Layer
from helix.protocol import Protocol
from helix.registry import BLOCKS


@BLOCKS.register("attention")
@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention and a GELU network whose inner width takes up the parameters asked for."""

    heads: int = 4

    def build(self, *, width: int, parameters: int | None, protocol: Protocol) -> Layer:
        if width % self.heads:
            raise ValueError(f"block 'attention': width {width} does not divide into {self.heads} heads")
        if parameters is None:
            ffn_width = 4 * width
        else:
            spent = 4 * width**2 + 4 * width + 4 * width
            if protocol.ffn_match == "code":
                # The bias of the second linear layer, which the paper's eq. 10 leaves out.
                spent += width
            ffn_width = (parameters - spent) // (2 * width + 1)
            if ffn_width < 1:
                raise ValueError(
                    f"block 'attention' of width {width} cannot have {parameters} parameters: attention and norms "
                    f"alone have {spent}; choose a larger reference block"
                )
        rotary = protocol.pos == "rope"
        if rotary and width // self.heads % 2:
            raise ValueError(
                f"block 'attention': protocol.pos=rope turns pairs of channels, and a head has {width // self.heads}; "
                "choose an even number with model.width or the option heads"
            )
        return AttentionLayer(width, ffn_width, self.heads, materialise=protocol.attn_impl == "weights", rotary=rotary)


class AttentionLayer(Layer):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, width: int, ffn_width: int, heads: int, *, materialise: bool, rotary: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, materialise=materialise, rotary=rotary)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.width, self.ffn_width = width, ffn_width

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD), mask_BL)
        return x_BLD + self.ffn(self.norm2(x_BLD))

    def flops(self, tokens: int) -> int:
        projections = 2 * tokens * 4 * self.width**2
        products = 2 * 2 * tokens**2 * self.width
        return projections + products + 2 * tokens * 2 * self.width * self.ffn_width


class MultiHeadAttention(nn.Module):
    """Self-attention with the parameters, their names and their initialisation as in torch's nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, materialise: bool, rotary: bool = False):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.materialise, self.rotary = heads, materialise, rotary
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        qkv_BLD = nn.functional.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q_BHLK, k_BHLK = rotate(q_BHLK), rotate(k_BHLK)
        # Every token looks at the tokens in the mask only.
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
        if self.materialise:
            scores_BHLL = q_BHLK @ k_BHLK.mT / math.sqrt(q_BHLK.shape[-1])
            if mask_B11L is not None:
                scores_BHLL = scores_BHLL.masked_fill(~mask_B11L, -torch.inf)
            y_BHLK = torch.softmax(scores_BHLL, dim=-1) @ v_BHLK
        else:
            y_BHLK = nn.functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_B11L)
        return self.out_proj(y_BHLK.transpose(1, 2).flatten(2))


def rotate(x_BHLK: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Channels i and K / 2 + i of token t turned as a pair by the angle t / base^(2 i / K)."""
    tokens, channels = x_BHLK.shape[-2:]
    rate = base ** (-torch.arange(0, channels, 2, device=x_BHLK.device, dtype=torch.float32) / channels)
    angle_LK = torch.arange(tokens, device=x_BHLK.device, dtype=torch.float32)[:, None] * rate
    cos_LK, sin_LK = angle_LK.cos().to(x_BHLK.dtype), angle_LK.sin().to(x_BHLK.dtype)
    a, b = x_BHLK.chunk(2, dim=-1)
    return torch.cat([a * cos_LK - b * sin_LK, a * sin_LK + b * cos_LK], dim=-1)
