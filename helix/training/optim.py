"""AdamW and the learning rate schedule of the paper's section 3.4; the rate is a pure function of the position."""

import math

import torch
from torch import Tensor, nn

from helix.models.classifier import decay_exempt
from helix.protocol import Protocol
from helix.spec import TrainingSpec


def build_optimizer(model: nn.Module, training: TrainingSpec, protocol: Protocol) -> torch.optim.AdamW:
    """AdamW over all parameters; `protocol.decay = mamba_groups` takes the exempt ones out of the weight decay.

    It is one kernel for all of them. On CUDA the rate is a float32 on the device, which a CUDA graph reads anew at each
    replay, as the steps without a graph do: the same bits.
    """
    device = next(model.parameters()).device
    exempt = decay_exempt(model) if protocol.decay == "mamba_groups" else set()
    named = list(model.named_parameters())
    groups = [
        {"params": [parameter for name, parameter in named if name not in exempt]},
        {"params": [parameter for name, parameter in named if name in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=torch.full((), training.lr, device=device) if device.type == "cuda" else training.lr,
        weight_decay=training.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step. Where it is a tensor it stays that tensor, and nothing waits for its device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(training: TrainingSpec, protocol: Protocol, *, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The rate at `step` of `epoch` (both from 0): cosine annealing from lr to lr_min over all epochs or all steps."""
    if protocol.schedule_unit == "epoch":
        progress = epoch / training.epochs
    else:
        progress = (epoch * steps_per_epoch + step) / (training.epochs * steps_per_epoch)
    return training.lr_min + (training.lr - training.lr_min) * (1 + math.cos(math.pi * progress)) / 2
