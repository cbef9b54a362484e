"""CUDA's autocast, played on the tensors of a CPU, whose own keeps fewer operators in float32.

For helix.training.memory: what a step on a GPU keeps is told here without one. Matrix products and attention without a
matrix of weights are in bf16 on both; a softmax and a norm only on a CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm
    native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
    margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
"""
_FLOAT32_RESULT = "prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum norm"

#: Functions that CUDA's autocast gives their inputs in float32: AT_FORALL_FP32 of torch 2.13's ATen/autocast_mode.h,
#: less its resizing of images; the notes on torch.amp list the same.
FLOAT32 = frozenset(_FLOAT32.split())

#: Those that it asks for a float32 result, where the caller names none: AT_FORALL_FP32_SET_OPT_DTYPE, and norms.
FLOAT32_RESULT = frozenset(_FLOAT32_RESULT.split())

#: What Python calls them besides.
OPERATORS = {"__pow__": "pow", "__rpow__": "pow"}

HALVES = (torch.bfloat16, torch.float16)


class CudaAutocast(TorchFunctionMode):
    """While this mode is on, the autocast of a CPU computes in float32 what CUDA's does.

    It sees the functions that are called here, and not those that one of torch's own calls in turn: what a backward
    recomputes has to turn it on again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = OPERATORS.get(name, name)
        if torch.is_autocast_enabled("cpu") and kwargs.get("out") is None:
            if name in FLOAT32:
                args, kwargs = tree_map_only(Tensor, _float32, (args, kwargs))
            elif name in FLOAT32_RESULT and kwargs.get("dtype") is None:
                first = args[0] if args else kwargs.get("input")
                if isinstance(first, Tensor) and first.dtype in HALVES:
                    kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x
