"""A step on a batch that lies there is the trainer's step, and waits for nothing."""

import torch

from helix.spec import TrialSpec, resolve
from helix.training.optim import build_optimizer
from helix.training.resident import ResidentStep, noise, pattern_of
from helix.training.step import Position, train_step
from tests.conftest import with_training


def test_it_computes_what_the_trainers_step_computes(tiny_spec: TrialSpec):
    spec = with_training(tiny_spec, batch_size=4)
    step = ResidentStep(spec, samples=16_000, classes=3)
    twin = ResidentStep(spec, samples=16_000, classes=3)
    resolved = resolve(spec)
    optimizer = build_optimizer(twin.model, resolved.training, resolved.protocol)
    at = Position(epoch=0, step=0, steps_per_epoch=1)
    for _ in range(2):
        wanted, *_ = train_step(twin.model, optimizer, twin.batch, resolved, at)
        loss = step()
        assert isinstance(loss, torch.Tensor) and torch.equal(loss, wanted)
    for a, b in zip(step.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_noise_is_the_same_every_time_and_no_two_clips_of_it_are():
    one, other = (noise(3, 500, classes=7) for _ in range(2))
    assert torch.equal(one.wave_BT, other.wave_BT) and torch.equal(one.label_B, other.label_B)
    assert not torch.equal(one.wave_BT[0], one.wave_BT[1])
    assert one.samples_B.tolist() == [500] * 3 and int(one.label_B.max()) < 7


def test_helix_has_attention_where_the_paper_has_it():
    assert pattern_of("helix", 6) == ("mamba", "mamba", "mamba", "attention", "mamba", "mamba")
    assert pattern_of("attention", 2) == ("attention", "attention")
