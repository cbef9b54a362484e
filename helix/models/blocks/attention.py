"""Self-attention with a feed-forward network, pre-norm. Vaswani et al. 2017, arXiv:1706.03762; HELIX paper eq. 7 to 10.

There are no positions, as in the paper and its authors' code: a stack of these alone does not see the order of tokens.

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
        return AttentionLayer(width, ffn_width, self.heads, materialise=protocol.attn_impl == "weights")


class AttentionLayer(Layer):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, width: int, ffn_width: int, heads: int, *, materialise: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads, materialise=materialise)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.width, self.ffn_width = width, ffn_width

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        return x_BLD + self.ffn(self.norm2(x_BLD))

    def flops(self, tokens: int) -> int:
        projections = 2 * tokens * 4 * self.width**2
        products = 2 * 2 * tokens**2 * self.width
        return projections + products + 2 * tokens * 2 * self.width * self.ffn_width


class MultiHeadAttention(nn.Module):
    """Self-attention with the parameters, their names and their initialisation as in torch's nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, materialise: bool):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.materialise = heads, materialise
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        qkv_BLD = nn.functional.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.materialise:
            weights_BHLL = torch.softmax(q_BHLK @ k_BHLK.mT / math.sqrt(q_BHLK.shape[-1]), dim=-1)
            y_BHLK = weights_BHLL @ v_BHLK
        else:
            y_BHLK = nn.functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK)
        return self.out_proj(y_BHLK.transpose(1, 2).flatten(2))
