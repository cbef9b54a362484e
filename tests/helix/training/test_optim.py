"""The rate is a pure function of the position, and weight decay reaches what the protocol says it reaches."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helix.models.classifier import build_classifier
from helix.protocol import Protocol
from helix.spec import ModelSpec, TrainingSpec
from helix.training.checkpoint import become, replica
from helix.training.optim import build_optimizer, learning_rate, set_learning_rate

EPOCH, STEP = Protocol(schedule_unit="epoch"), Protocol(schedule_unit="step")


def rates(training: TrainingSpec, protocol: Protocol, steps_per_epoch: int) -> list[float]:
    """The rate of every step of a trial."""
    return [
        learning_rate(training, protocol, epoch=epoch, step=step, steps_per_epoch=steps_per_epoch)
        for epoch in range(training.epochs)
        for step in range(steps_per_epoch)
    ]


# The schedule


@pytest.mark.parametrize(
    "training", [TrainingSpec(), TrainingSpec(epochs=12, lr=0.002), TrainingSpec(epochs=1), TrainingSpec(lr_min=3e-4)]
)
def test_the_rate_of_an_epoch_is_that_of_torchs_cosine_annealing(training: TrainingSpec):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=training.epochs, eta_min=training.lr_min)
    for epoch in range(training.epochs):
        rate = learning_rate(training, EPOCH, epoch=epoch, step=0, steps_per_epoch=7)
        assert rate == pytest.approx(schedule._get_closed_form_lr()[0], abs=1e-12, rel=0)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12, rel=0)
        optimizer.step()
        schedule.step()


def test_the_papers_schedule_by_hand():
    at = {epoch: learning_rate(TrainingSpec(), EPOCH, epoch=epoch, step=0, steps_per_epoch=50) for epoch in (0, 50, 99)}
    assert at[0] == 3e-4
    assert at[50] == pytest.approx((3e-4 + 1e-6) / 2, rel=1e-12)
    assert 1e-6 < at[99] < 1.1e-6


@given(
    epochs=st.integers(1, 40),
    steps=st.integers(1, 9),
    lr=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    protocol=st.sampled_from([EPOCH, STEP]),
)
def test_the_rate_falls_from_lr_and_never_below_lr_min(
    epochs: int, steps: int, lr: float, share: float, protocol: Protocol
):
    training = TrainingSpec(epochs=epochs, lr=lr, lr_min=lr * share)
    found = rates(training, protocol, steps)
    assert found[0] == pytest.approx(lr, rel=1e-12)
    assert all(before >= after * (1 - 1e-12) for before, after in pairwise(found))
    assert found[-1] >= training.lr_min * (1 - 1e-12)


def test_by_epoch_the_rate_stands_still_within_one_and_by_step_it_does_not():
    training, steps = TrainingSpec(epochs=5), 8
    by_epoch, by_step = rates(training, EPOCH, steps), rates(training, STEP, steps)
    assert len(set(by_epoch)) == 5
    assert len(set(by_step)) == 40
    assert by_epoch[::steps] == by_step[::steps]


def test_by_step_the_schedule_is_that_of_as_many_epochs_of_one_step():
    assert rates(TrainingSpec(epochs=5), STEP, 8) == rates(TrainingSpec(epochs=40), EPOCH, 1)


# Weight decay

MODELS = {
    "mamba-raw": ModelSpec(pattern=("mamba",), width=16),
    "helix-mel": ModelSpec(frontend="mel", pattern=("mamba", "attention"), width=16),
    "attention-raw": ModelSpec(pattern=("attention",), width=16),
}


def build(name: str) -> nn.Module:
    small = dataclasses.replace(MODELS[name], options={"mamba": {"d_state": 4}})
    return build_classifier(small, Protocol(), classes=3)


def exempt_by_kind(model: nn.Module) -> set[str]:
    """What Mamba's authors exempt, read off the modules: A_log, D, norms and biases."""
    names = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            if name in ("A_log", "D") or name.endswith("bias") or isinstance(module, nn.LayerNorm):
                names.add(f"{path}.{name}")
    return names


def decayed(model: nn.Module, protocol: Protocol) -> set[str]:
    """The parameters that weight decay alone moves: a step with gradients of zero."""
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, TrainingSpec(lr=0.1, weight_decay=0.5), protocol).step()
    moved = {name for name, parameter in model.named_parameters() if not bool((parameter == 1).all())}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, torch.tensor(1 - 0.1 * 0.5 if name in moved else 1.0))
    return moved


@pytest.mark.parametrize("name", MODELS)
def test_mamba_groups_exempt_exactly_a_log_d_norms_and_biases(name: str):
    model = build(name)
    names = {path for path, _ in model.named_parameters()}
    exempt = exempt_by_kind(model)
    assert exempt
    assert exempt < names
    assert decayed(model, Protocol(decay="mamba_groups")) == names - exempt


@pytest.mark.parametrize("name", MODELS)
def test_the_paper_decays_everything(name: str):
    model = build(name)
    assert decayed(model, Protocol(decay="all")) == {path for path, _ in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decay", ["all", "mamba_groups"])
def test_every_parameter_is_trained_once_and_at_the_rate_asked_for(name: str, decay: str):
    model = build(name)
    optimizer = build_optimizer(model, TrainingSpec(lr=0.123), Protocol(decay=decay))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.123}


# Where the rate and the moments are


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, torch.Tensor]:
    """The weights after these steps, each at a rate of its own and with gradients that follow from its number."""
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.device)
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.step()
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def test_a_rate_in_memory_is_the_rate_and_stays_where_it_is():
    weights = []
    for in_memory in (False, True):
        torch.manual_seed(0)
        model = build("helix-mel")
        optimizer = build_optimizer(model, TrainingSpec(), Protocol(decay="mamba_groups"))
        assert optimizer.defaults["fused"]
        for group in optimizer.param_groups if in_memory else ():
            group["lr"] = torch.tensor(0.5, dtype=torch.float64)
        rates = [group["lr"] for group in optimizer.param_groups]
        weights.append(trained(model, optimizer, range(4)))
        after = [group["lr"] for group in optimizer.param_groups]
        assert not in_memory or all(now is before for now, before in zip(after, rates, strict=True))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_it_is_one_kernel_whose_rate_and_moments_lie_there_wherever_they_came_from():
    """A CPU's checkpoint goes on there, and nothing in a step has to be fetched from the host."""
    torch.manual_seed(0)
    model = build("helix-mel")
    optimizer = build_optimizer(model, TrainingSpec(), Protocol())
    trained(model, optimizer, range(3))
    there = build("helix-mel").cuda()
    goes_on = build_optimizer(there, TrainingSpec(), Protocol())
    become(there, goes_on, replica(model, optimizer))
    assert goes_on.defaults["fused"]
    assert {group["lr"].device.type for group in goes_on.param_groups} == {"cuda"}
    wanted, found = trained(model, optimizer, range(3, 6)), trained(there, goes_on, range(3, 6))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parameter in there.parameters():
            parameter.grad = torch.ones_like(parameter)
        set_learning_rate(goes_on, 1e-3)
        goes_on.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {value.device.type for state in goes_on.state.values() for value in state.values()} == {"cuda"}
