"""The training step of a trial on one batch that lies on the device already: what a step takes without any loader.

It is helix.training.step.train_step, which the trainer calls, on noise. B batch, T samples.
"""

from functools import partial

import torch
from torch import Tensor

from helix.data.loader import Batch
from helix.models.classifier import build_classifier, cost
from helix.spec import TrialSpec, resolve
from helix.training.graphs import Choice, graphed
from helix.training.optim import build_optimizer
from helix.training.precision import precision_of
from helix.training.step import Position, take, train_step

#: The paper's, by the names that it has for them, in small letters.
BACKBONES = ("mamba", "helix", "attention")


class ResidentStep:
    """A model with drawn weights, its optimiser and a batch of `spec.training.batch_size` clips of noise on `device`.

    Calling it is one optimiser step; it returns the loss, left on the device, so that nothing waits for it. `batch`
    may be replaced. `graphs`: whether it is replayed as a CUDA graph, as the trainer would have it with "auto".
    Raises ValueError where the device cannot compute with the precision of the spec.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        samples: int,
        classes: int,
        device: torch.device | str = "cpu",
        micro_batch: int | None = None,
        recompute: bool = False,
        graphs: Choice = "off",
    ):
        self.spec, self.micro_batch, self.device = resolve(spec), micro_batch, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build_classifier(self.spec.model, self.spec.protocol, classes=classes).to(device).train()
        self.model.recompute = recompute
        self.optimizer = build_optimizer(self.model, self.spec.training, self.spec.protocol)
        self.batch = noise(spec.training.batch_size, samples, classes=classes, device=device)
        tokens = cost(self.spec.model, self.spec.protocol, classes=classes, samples=samples).tokens
        self.replay = graphed(
            partial(take, self.model, self.optimizer, spec=self.spec, micro_batch=micro_batch),
            self.model,
            self.optimizer,
            choice=graphs,
            device=device,
            ranks=1,
            tokens=(micro_batch or spec.training.batch_size) * tokens,
        )

    def __call__(self) -> Tensor:
        at = Position(epoch=0, step=0, steps_per_epoch=1)
        how = {"micro_batch": self.micro_batch, "replay": self.replay}
        with precision_of(self.spec.training.precision, self.device):
            return train_step(self.model, self.optimizer, self.batch, self.spec, at, **how)[0]


def noise(clips: int, samples: int, *, classes: int, device: torch.device | str = "cpu") -> Batch:
    """So many clips of noise with drawn labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    wave_BT = 0.1 * torch.randn(clips, samples, generator=generator)
    return Batch(
        wave_BT=wave_BT,
        label_B=torch.randint(classes, (clips,), generator=generator),
        clip_B=torch.arange(clips),
        samples_B=torch.full((clips,), samples),
    ).to(device)


def pattern_of(backbone: str, layers: int) -> tuple[str, ...]:
    """Pure patterns, or for helix Mamba with attention at the middle, which is layer 3 of 6 (from 0)."""
    if backbone == "helix":
        return tuple("attention" if layer == layers // 2 else "mamba" for layer in range(layers))
    return (backbone,) * layers
