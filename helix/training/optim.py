"""AdamW and the learning rate schedule of the paper's section 3.4; the rate is a pure function of the position."""

import math

import torch
from torch import nn

from helix.models.classifier import decay_exempt
from helix.protocol import Protocol
from helix.spec import TrainingSpec


def build_optimizer(model: nn.Module, training: TrainingSpec, protocol: Protocol) -> torch.optim.AdamW:
    """AdamW over all parameters; `protocol.decay = mamba_groups` takes the exempt ones out of the weight decay."""
    exempt = decay_exempt(model) if protocol.decay == "mamba_groups" else set()
    named = list(model.named_parameters())
    groups = [
        {"params": [parameter for name, parameter in named if name not in exempt]},
        {"params": [parameter for name, parameter in named if name in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.lr,
        weight_decay=training.weight_decay,
        fused=True,
    )


def learning_rate(training: TrainingSpec, protocol: Protocol, *, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The rate at `step` of `epoch` (both from 0): cosine annealing from lr to lr_min over all epochs or all steps."""
    if protocol.schedule_unit == "epoch":
        progress = epoch / training.epochs
    else:
        progress = (epoch * steps_per_epoch + step) / (training.epochs * steps_per_epoch)
    return training.lr_min + (training.lr - training.lr_min) * (1 + math.cos(math.pi * progress)) / 2
