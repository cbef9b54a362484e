"""The contract of a block: one residual layer [B, L, D] -> [B, L, D] that can size itself to a parameter count.

A member is a frozen dataclass in its own file under blocks/, registered in BLOCKS; its fields are its options.

Legend: B batch, L tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from typing import Protocol as Interface

from torch import Tensor, device, nn

from helix.protocol import Protocol
from helix.registry import BLOCKS

__all__ = ["BLOCKS", "Block", "Layer", "count", "natural_size"]


class Layer(nn.Module, ABC):
    """What a block builds. The residual connection and the normalisation before it are inside."""

    @abstractmethod
    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Where there is a mask, tokens outside of it are padding: what they hold reaches no token inside."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one clip; a multiply and an add are two."""


class Block(Interface):
    """A member of BLOCKS."""

    def build(self, *, width: int, parameters: int | None, protocol: Protocol) -> Layer:
        """The layer, as near to `parameters` as its shapes allow, or of its natural size where that is None.

        Weights are drawn from torch's global generator. Raises ValueError where no shape comes near.
        """
        ...


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def natural_size(name: str, options: Mapping[str, Any] | None, *, width: int, protocol: Protocol) -> int:
    """The parameters of block `name` at its natural size, counted on the meta device: nothing is allocated or drawn."""
    with device("meta"):
        return count(BLOCKS.make(name, options).build(width=width, parameters=None, protocol=protocol))
