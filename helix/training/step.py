"""One training step: what is random in it is drawn first, then it is computed from tensors alone.

That second half, `take`, holds no number that differs from step to step, so it can be recorded once and replayed
(helix.training.graphs). Neither half waits for the device. B batch, T samples, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from helix.data.augment import augment, mixup, pairing
from helix.data.dataset import Dataset
from helix.data.loader import Batch, uploaded
from helix.models.classifier import Classifier
from helix.spec import TrialSpec
from helix.training.optim import learning_rate, set_learning_rate
from helix.training.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a step stands: `epoch` and `step` from 0."""

    epoch: int
    step: int
    steps_per_epoch: int
    rate_hz: int = Dataset.rate_hz


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a step is computed from: augmented waves, their labels and sounding samples, and how mixup pairs them.

    `partner_B` is as long as the clips that are this rank's own, which come first (helix.data.loader.Batch). Clip and
    partner weigh `weight` and `partner_weight`, float32 scalars that add up to 1.
    """

    wave_BT: Tensor  # noqa: N815
    label_B: Tensor  # noqa: N815
    samples_B: Tensor  # noqa: N815
    partner_B: Tensor  # noqa: N815
    weight: Tensor
    partner_weight: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


#: Tokens in flight from which a larger micro-batch makes a step no faster, by the type of device. A core is busy with
#: one short clip; a GPU needs about these many to hide its launches behind its work.
FILLED_TOKENS = {"cpu": 256, "cuda": 16_384}

#: The loss, the norm of the gradient before it is clipped, and the number of correct predictions, each a float64 scalar
#: on the device, all of the whole batch.
Found = tuple[Tensor, Tensor, Tensor]


def train_step(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    spec: TrialSpec,
    at: Position,
    *,
    micro_batch: int | None = None,
    ranks: Ranks | None = None,
    replay: Callable[[Inputs], Found] | None = None,
) -> Found:
    """One optimiser step on a batch that is on the model's device, or on the part of it that this rank has.

    `spec` is resolved. `replay` stands in for `take`, whose recording it is; it then knows how to cut the batch.
    helix.training.memory runs this same function on shapes alone, so what it predicts follows every change of it.
    """
    training, protocol = spec.training, spec.protocol
    rate = learning_rate(training, protocol, epoch=at.epoch, step=at.step, steps_per_epoch=at.steps_per_epoch)
    set_learning_rate(optimizer, rate)
    # Before the forward, so that the gradients of the last step are not kept through it.
    optimizer.zero_grad(set_to_none=True)
    inputs = drawn(model, batch, spec, at)
    if replay is not None:
        return replay(inputs)
    return take(model, optimizer, inputs, spec, micro_batch=micro_batch, whole=batch.whole, ranks=ranks)


def drawn(model: Classifier, batch: Batch, spec: TrialSpec, at: Position) -> Inputs:
    """A batch with all that is random in its step drawn."""
    wave_BT, device = batch.wave_BT, batch.wave_BT.device
    if model.frontend.augmented:
        wave_BT = augment(
            wave_BT,
            batch.clip_B,
            spec.augment,
            seed=spec.seed,
            epoch=at.epoch,
            rate_hz=at.rate_hz,
            samples_B=batch.samples_B if spec.protocol.pad_mask == "clip" else None,
            parts=batch.parts,
        )
    partner_B, lam = pairing(len(wave_BT), at.epoch, at.step, alpha=spec.augment.mixup_alpha, seed=spec.seed)
    return Inputs(
        wave_BT=wave_BT,
        label_B=batch.label_B,
        samples_B=batch.samples_B,
        partner_B=uploaded(partner_B, device) if batch.partner_B is None else batch.partner_B,
        weight=torch.full((), lam, device=device),
        partner_weight=torch.full((), 1 - lam, device=device),
    )


def take(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    spec: TrialSpec,
    *,
    micro_batch: int | None = None,
    whole: int | None = None,
    ranks: Ranks | None = None,
) -> Found:
    """Forward, backward and update, at the rate that the optimiser has; its gradients are None.

    `whole`: the clips of the whole batch where this rank has a part of it.
    """
    label_B, partner_B = inputs.label_B, inputs.partner_B
    own = len(partner_B)

    def mixed(x: Tensor) -> Tensor:
        return mixup(x, partner_B, inputs.weight) if spec.augment.mixup_alpha else x[:own]

    if spec.protocol.mixup_on == "waveform":
        features = model.features(mixed(inputs.wave_BT))
    else:
        features = mixed(model.features(inputs.wave_BT))
    # A mixed clip sounds as long as the longer of its two. Behind a rank's own clips may be partners of them.
    samples_B = torch.maximum(inputs.samples_B[:own], inputs.samples_B[partner_B])
    label_B, other_B = label_B[:own], label_B[partner_B]
    total, hits = (torch.zeros((), dtype=torch.float64, device=label_B.device) for _ in range(2))
    size = micro_batch or own
    for first in range(0, own, size):
        part = slice(first, first + size)
        logits_BC = logits_of(model, features[part], samples_B[part], spec)
        # Sums over the clips divided by the size of the whole batch: a last part that is smaller weighs less.
        a, b = (F.cross_entropy(logits_BC, wanted_B[part], reduction="sum") for wanted_B in (label_B, other_B))
        loss = (inputs.weight * a + inputs.partner_weight * b) / (whole or own)
        loss.backward()
        with torch.no_grad():
            guess_B = logits_BC.argmax(dim=1)
            a, b = ((guess_B == wanted_B[part]).sum() for wanted_B in (label_B, other_B))
            hits += inputs.weight * a + inputs.partner_weight * b
            total += loss.detach()
    if ranks is not None:
        ranks.add([p.grad for p in model.parameters() if p.grad is not None], [total, hits])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.training.clip_norm)
    optimizer.step()
    return total, norm.double(), hits


def logits_of(model: Classifier, features: Tensor, samples_B: Tensor, spec: TrialSpec) -> Tensor:
    """float32 logits [B, C], the matrix products at the precision of the spec (helix.training.precision sets TF32)."""
    half = spec.training.precision == "bf16"
    with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=half):
        return model.logits(features, samples_B).float()
