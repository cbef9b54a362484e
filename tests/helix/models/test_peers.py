"""Mamba as others wrote it: given our weights, Hugging Face's transformers and mambapy compute what we compute.

The measure is the relative distance in the Euclidean norm, |ours - theirs| / |theirs|, of the output and of each
gradient as a whole, both in float32; the bound is 1e-5. "Reversed" is the peer on the flipped tokens, its output
flipped back.
"""

import math
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from helix.models.blocks.mamba import BiMambaLayer, Mamba
from helix.models.scan import scan_backend, selective_scan

BOUND = 1e-5
#: More channels than one task of the kernel has, and not a whole number of its vectors.
WIDTH, INNER, STATE, TAPS, BATCH = 72, 144, 16, 4, 2
LENGTHS = (1, 7, 100, 517)
PEERS = ("transformers", "mambapy", "mambapy one token at a time")
NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")

Numbers = dict[str, Tensor]


def library(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed; the extra 'peers' brings it")


@pytest.fixture(params=["reference", "numba"])
def backend(request, monkeypatch) -> str:
    """Every backend that scans on a CPU, forced for models as well as for the scan itself."""
    try:
        scan_backend(torch.device("cpu"), torch.float32, backend=request.param)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("HELIX_SCAN", request.param)
    return request.param


def mixer(peer: str) -> nn.Module:
    """Their layer of our shape; how it is initialised does not matter."""
    if peer == "transformers":
        modeling = library("transformers.models.mamba.modeling_mamba")
        config = modeling.MambaConfig(
            hidden_size=WIDTH, state_size=STATE, expand=INNER // WIDTH, conv_kernel=TAPS, num_hidden_layers=1
        )
        return modeling.MambaMixer(config, layer_idx=0)
    modeling = library("mambapy.mamba")
    shape = {"d_model": WIDTH, "n_layers": 1, "d_state": STATE, "expand_factor": INNER // WIDTH, "d_conv": TAPS}
    return modeling.MambaBlock(modeling.MambaConfig(**shape, pscan=peer == "mambapy"))


def stirred(layer: nn.Module) -> nn.Module:
    """A layer whose weights are all different, away from the regular ones of its initialisation."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def ours(*, reverse: bool) -> Mamba:
    torch.manual_seed(7)
    layer = stirred(Mamba(WIDTH, INNER, STATE, TAPS, reverse=reverse))
    assert isinstance(layer, Mamba)
    return layer


def tokens(length: int, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, length, width, generator=torch.Generator().manual_seed(length))


def numbers(layer: nn.Module, run: Callable[[Tensor], Tensor], x_BLD: Tensor) -> Numbers:
    """The output of `run`, and the gradients of its input and of every parameter of `layer`."""
    x_BLD = x_BLD.clone().requires_grad_()
    y_BLD = run(x_BLD)
    weights_BLD = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(1)).to(y_BLD)
    layer.zero_grad()
    y_BLD.backward(weights_BLD)
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert x_BLD.grad is not None
    found = {"output": y_BLD.detach(), "input": x_BLD.grad}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        found[name] = gradient.clone()
    return found


@cache
def theirs(peer: str, length: int, *, reverse: bool) -> Numbers:
    layer = mixer(peer)
    layer.load_state_dict(ours(reverse=reverse).state_dict())
    run = (lambda x_BLD: layer(x_BLD.flip(1)).flip(1)) if reverse else layer
    return numbers(layer, run, tokens(length))


def distance(given: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm. Of one token nothing depends on A: there the wanted gradient is zero."""
    gap, size = (given.double() - wanted.double()).norm().item(), wanted.double().norm().item()
    return gap / size if size else math.inf if gap else 0.0


def assert_near(given: Numbers, wanted: Numbers) -> None:
    assert given.keys() == wanted.keys()
    found = {name: distance(given[name], wanted[name]) for name in wanted}
    assert {name: value for name, value in found.items() if not value < BOUND} == {}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("peer", PEERS)
def test_a_mamba_layer_is_the_peers(peer, length, reverse, backend):
    layer = ours(reverse=reverse)
    assert_near(numbers(layer, layer, tokens(length)), theirs(peer, length, reverse=reverse))


def our_block() -> BiMambaLayer:
    torch.manual_seed(8)
    block = stirred(BiMambaLayer(WIDTH, INNER, STATE, TAPS))
    assert isinstance(block, BiMambaLayer)
    return block


@cache
def their_block(peer: str, length: int) -> Numbers:
    """Two of their layers as the paper's eq. 3 to 6 join them."""
    layers = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(WIDTH),
            "mamba_forward": mixer(peer),
            "mamba_backward": mixer(peer),
            "out_proj": nn.Linear(2 * WIDTH, WIDTH),
        }
    )
    layers.load_state_dict(our_block().state_dict())

    def run(x_BLD: Tensor) -> Tensor:
        h_BLD = layers["norm"](x_BLD)
        both = [layers["mamba_forward"](h_BLD), layers["mamba_backward"](h_BLD.flip(1)).flip(1)]
        return x_BLD + layers["out_proj"](torch.cat(both, dim=-1))

    return numbers(layers, run, tokens(length))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("peer", ["transformers", "mambapy"])
def test_the_block_of_both_directions_is_made_of_two_of_the_peers(peer, length, backend):
    block = our_block()
    assert_near(numbers(block, block, tokens(length)), their_block(peer, length))


class Inputs(nn.Module):
    """What a scan is given, as parameters, so that a scan is a layer like any other here."""

    def __init__(self, length: int):
        super().__init__()
        draw = torch.Generator().manual_seed(length)
        normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
        drawn = (
            normal(BATCH, length, INNER),
            0.5 * normal(BATCH, length, INNER),
            -torch.arange(1.0, STATE + 1) * torch.exp(0.1 * normal(INNER, STATE)),
            normal(BATCH, length, STATE),
            normal(BATCH, length, STATE),
            normal(INNER),
            normal(BATCH, length, INNER),
            normal(INNER) - 3,
        )
        for name, value in zip(NAMES, drawn, strict=True):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self) -> list[Tensor]:
        return list(self.parameters())


def scan_of(peer: str) -> Callable[..., Tensor]:
    """Their selective scan with our arguments; mambapy's leaves softplus and the gate to its caller."""
    if peer == "transformers":
        scan = library("transformers.models.mamba.modeling_mamba").mamba_selective_scan

        def run(u, dt, A, B, C, D, z, dt_bias):
            u, dt, B, C, z = (x.mT for x in (u, dt, B, C, z))
            return scan(u, dt, A, B, C, D=D, z=z, delta_bias=dt_bias, delta_softplus=True).mT

        return run
    block = mixer(peer)
    scan = block.selective_scan if peer == "mambapy" else block.selective_scan_seq

    def run(u, dt, A, B, C, D, z, dt_bias):
        return scan(u, nn.functional.softplus(dt + dt_bias), A, B, C, D) * nn.functional.silu(z)

    return run


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("peer", PEERS)
def test_the_scan_alone_is_the_peers(peer, length, reverse, backend):
    scan, inputs = scan_of(peer), Inputs(length)

    def their_run(x_BLE: Tensor) -> Tensor:
        u, dt, A, B, C, D, z, dt_bias = inputs()
        given = [u + x_BLE, dt, B, C, z]
        u, dt, B, C, z = (value.flip(1) for value in given) if reverse else given
        y_BLE = scan(u, dt, A, B, C, D, z, dt_bias)
        return y_BLE.flip(1) if reverse else y_BLE

    def our_run(x_BLE: Tensor) -> Tensor:
        u, *others, dt_bias = inputs()
        return selective_scan(u + x_BLE, *others, dt_bias_E=dt_bias, reverse=reverse, backend=backend)

    nothing_BLE = torch.zeros(BATCH, length, INNER)
    assert_near(numbers(inputs, our_run, nothing_BLE), numbers(inputs, their_run, nothing_BLE))
