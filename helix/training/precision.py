"""What `training.precision` asks of torch's own settings, and of which devices it can be asked.

bf16 is autocast and needs no setting (helix.training.step.logits_of). float32 does: unless it is told not to, torch
lets convolutions on CUDA round their factors to TF32. The settings are of the whole process.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def require(precision: str, device_type: str) -> None:
    """ValueError where devices of that type cannot compute with this precision."""
    if precision == "tf32" and device_type != "cuda":
        raise ValueError(
            f"training.precision is tf32, which only CUDA GPUs compute, and the device is {device_type}; choose "
            "--device cuda, or training.precision=fp32 or bf16, which make other trials"
        )


@contextmanager
def precision_of(precision: str, device: torch.device | str) -> Iterator[None]:
    """Matrix products and convolutions of float32 on CUDA are those of this precision until the end of the block.

    Raises ValueError where this device cannot compute with it.
    """
    require(precision, torch.device(device).type)
    if precision == "tf32" and not torch.cuda.is_tf32_supported():
        raise ValueError(
            f"training.precision is tf32, and this GPU ({torch.cuda.get_device_name(device)}) has no TF32, which came "
            "with compute capability 8.0; choose training.precision=fp32 or bf16, which make other trials"
        )
    # The general setting torch.backends.fp32_precision does not reach convolutions, which have a default of their own.
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
