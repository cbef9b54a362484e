"""The shapes of the tensors that the scan's kernels are given, and the check that they are those.

Legend: B batch, L tokens, E channels, N state, K taps of the convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

#: The tensors that kernels are given, by their letters: those without tokens are parameters.
SCAN_SHAPES = ("BLE", "BLE", "EN", "BLN", "BLN", "E", "BLE", "E")
CONV_SHAPES = ("BLE", "EK", "E")


def require_agreement(tensors: Sequence[Tensor], shapes: Sequence[str], *, mixed: bool = False) -> dict[str, int]:
    """The size of each letter. Kernels believe every shape that they are told, so shapes that disagree end here.

    ValueError for those, and for another dtype than float32, which with `mixed` activations may have.
    """
    sizes: dict[str, int] = {}
    for x, letters in zip(tensors, shapes, strict=True):
        given = tuple(x.shape)
        wanted = tuple(sizes.setdefault(letter, size) for letter, size in zip(letters, given, strict=False))
        single = x.dtype == torch.float32 or (mixed and "L" in letters)
        if len(given) != len(letters) or given != wanted or not single:
            raise ValueError(f"a tensor [{', '.join(letters)}] is {list(given)} in {x.dtype}; sizes so far: {sizes}")
    return sizes
