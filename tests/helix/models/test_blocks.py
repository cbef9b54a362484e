"""What every block promises, for every block there is; and what Mamba and attention are."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from helix.models.block import Layer, count, natural_size
from helix.models.blocks.attention import AttentionLayer, rotate
from helix.models.blocks.mamba import BiMambaLayer, Mamba
from helix.models.scan import depthwise_conv
from helix.protocol import Protocol, profile
from helix.registry import BLOCKS

WIDTHS = (64, 256)

#: The small preset has fewer states, so that its blocks match as closely as the paper's.
OPTIONS = {64: {"mamba": {"d_state": 16}}, 256: {}}

PROTOCOLS = ("authors", "paper", "fair")


def build(name: str, *, width: int = 64, protocol: Protocol | None = None, seed: int = 0) -> Layer:
    """A block of the size of its reference."""
    protocol = protocol or Protocol()
    size = natural_size("mamba", OPTIONS[width].get("mamba"), width=width, protocol=protocol)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        member = BLOCKS.make(name, OPTIONS[width].get(name))
        return member.build(width=width, parameters=size, protocol=protocol)


def tokens(batch: int = 3, length: int = 21, width: int = 64) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BLOCKS.names())
def test_a_block_keeps_the_shape_and_reaches_every_parameter(name):
    layer, x_BLD = build(name), tokens().requires_grad_()
    y_BLD = layer(x_BLD)
    assert y_BLD.shape == x_BLD.shape
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None and bool((x_BLD.grad != 0).any())
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool((parameter.grad != 0).any()), parameter_name


@pytest.mark.parametrize("name", BLOCKS.names())
def test_a_block_is_deterministic(name):
    def gradients() -> list[Tensor]:
        layer = build(name)
        y_BLD = layer(tokens())
        return [y_BLD, *torch.autograd.grad(y_BLD.square().sum(), list(layer.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("name", BLOCKS.names())
def test_clips_do_not_see_each_other(name):
    layer, x_BLD = build(name), tokens()
    y_BLD = layer(x_BLD)
    others_BLD = x_BLD.clone()
    others_BLD[1:] = 7 * others_BLD[1:].flip(1)
    assert torch.equal(layer(others_BLD)[0], y_BLD[0])
    assert not torch.equal(layer(others_BLD)[1], y_BLD[1])


@pytest.mark.parametrize("name", BLOCKS.names())
@pytest.mark.parametrize("length", [1, 2, 16, 50])
def test_a_block_takes_any_number_of_tokens(name, length):
    assert torch.isfinite(build(name)(tokens(length=length))).all()


@pytest.mark.parametrize("name", BLOCKS.names())
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_block_has_the_size_asked_for(width, protocol, name):
    wanted = natural_size("mamba", OPTIONS[width].get("mamba"), width=width, protocol=profile(protocol))
    given = count(build(name, width=width, protocol=profile(protocol)))
    assert abs(given - wanted) <= 0.001 * wanted


@pytest.mark.parametrize("name", BLOCKS.names())
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_asked_for_its_natural_size_a_block_has_it(protocol, name):
    size = natural_size(name, None, width=256, protocol=profile(protocol))
    with torch.device("meta"):
        layer = BLOCKS.make(name).build(width=256, parameters=size, protocol=profile(protocol))
    assert count(layer) == size


@pytest.mark.parametrize("name", BLOCKS.names())
def test_twice_the_tokens_cost_at_least_twice_as_much(name):
    layer = build(name)
    assert layer.flops(200) >= 2 * layer.flops(100) > 0


@pytest.mark.parametrize("name", BLOCKS.names())
def test_too_few_parameters_are_refused(name):
    with pytest.raises(ValueError, match=f"block '{name}' of width 64 cannot have 1000 parameters.*larger reference"):
        BLOCKS.make(name).build(width=64, parameters=1000, protocol=Protocol())


def test_the_weights_come_from_the_global_generator_alone():
    for name in BLOCKS.names():
        first, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_second_half_of_bimamba_is_mamba_on_flipped_tokens():
    backward, x_BLD = build("mamba").get_submodule("mamba_backward"), tokens()
    forward = Mamba(64, 128, 16, 4, reverse=False)
    forward.load_state_dict(backward.state_dict())
    torch.testing.assert_close(backward(x_BLD), forward(x_BLD.flip(1)).flip(1), rtol=1e-5, atol=1e-6)


def test_bimamba_joins_both_directions_and_adds_them_to_its_input():
    layer, x_BLD = build("mamba"), tokens()
    assert isinstance(layer, BiMambaLayer)
    h_BLD = layer.norm(x_BLD)
    both = torch.cat([layer.mamba_forward(h_BLD), layer.mamba_backward(h_BLD)], dim=-1)
    assert torch.equal(layer(x_BLD), x_BLD + layer.out_proj(both))


def test_a_mamba_layer_has_the_names_and_shapes_of_mamba_ssm():
    shapes = {name: tuple(x.shape) for name, x in Mamba(256, 512, 32, 4, reverse=False).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (1024, 256),
        "conv1d.weight": (512, 1, 4),
        "conv1d.bias": (512,),
        "x_proj.weight": (80, 512),
        "dt_proj.weight": (512, 16),
        "dt_proj.bias": (512,),
        "A_log": (512, 32),
        "D": (512,),
        "out_proj.weight": (256, 512),
    }


def test_mamba_starts_with_the_step_sizes_and_decays_of_its_paper():
    layer = Mamba(64, 4096, 16, 4, reverse=False)
    steps_E = nn.functional.softplus(layer.dt_proj.bias.detach())
    assert 1e-3 * 0.999 <= float(steps_E.min()) < 1.1e-3
    assert 0.9e-1 < float(steps_E.max()) <= 1e-1 * 1.001
    assert float(steps_E.log10().mean()) == pytest.approx(-2, abs=0.05)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(4096, 16))
    assert bool((layer.D == 1).all())
    assert float(layer.dt_proj.weight.detach().abs().max()) <= 4**-0.5
    assert [name for name, x in layer.named_parameters() if getattr(x, "_no_weight_decay", False)] == ["A_log", "D"]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_the_depthwise_convolution_sees_the_past_only(length, reverse):
    conv = nn.Conv1d(6, 6, 4, groups=6, padding=3)
    u_BLE = tokens(2, length, 6)
    past_BLE = u_BLE.flip(1) if reverse else u_BLE
    wanted_BLE = conv(past_BLE.mT)[..., :length].mT
    given_BLE = depthwise_conv(u_BLE, conv.weight, conv.bias, reverse=reverse)
    torch.testing.assert_close(given_BLE, wanted_BLE.flip(1) if reverse else wanted_BLE)


@pytest.mark.parametrize("attn_impl", ["weights", "sdpa"])
def test_attention_is_that_of_torch_with_the_same_parameters(attn_impl):
    layer = build("attention", protocol=Protocol(attn_impl=attn_impl))
    assert isinstance(layer, AttentionLayer)
    twin = nn.MultiheadAttention(64, 4, batch_first=True)
    twin.load_state_dict(layer.attn.state_dict())
    x_BLD = tokens()
    torch.testing.assert_close(layer.attn(x_BLD), twin(x_BLD, x_BLD, x_BLD)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ffn_match", "ffn_width"), [("eq10", 1544), ("code", 1543)])
def test_the_ffn_takes_up_what_the_reference_leaves(ffn_match, ffn_width):
    with torch.device("meta"):
        layer = build("attention", width=256, protocol=Protocol(ffn_match=ffn_match))
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items() if "weight" in name}
    assert shapes == {
        "norm1.weight": (256,),
        "attn.in_proj_weight": (768, 256),
        "attn.out_proj.weight": (256, 256),
        "norm2.weight": (256,),
        "ffn.0.weight": (ffn_width, 256),
        "ffn.2.weight": (256, ffn_width),
    }


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="width 66 does not divide into 4 heads"):
        BLOCKS.make("attention").build(width=66, parameters=None, protocol=Protocol())


@pytest.mark.parametrize("attn_impl", ["sdpa", "weights"])
@pytest.mark.parametrize("name", BLOCKS.names())
def test_padding_leaves_no_trace_in_the_tokens_before_it(name, attn_impl):
    """A masked clip gives what the shorter clip alone gives, in both directions and whatever the padding holds."""
    layer, x_BLD = build(name, protocol=replace(Protocol(), attn_impl=attn_impl)), tokens(length=21)
    mask_BL = torch.arange(21)[None, :] < torch.tensor([13, 21, 1])[:, None]
    given = layer(x_BLD, mask_BL)
    for b, length in enumerate((13, 21, 1)):
        assert torch.allclose(given[b, :length], layer(x_BLD[b : b + 1, :length])[0], atol=2e-6), b
    changed = torch.where(mask_BL[:, :, None], x_BLD, 100 * x_BLD)
    assert torch.equal(layer(changed, mask_BL)[mask_BL], given[mask_BL])


def test_without_a_mask_the_backward_direction_does_start_in_the_padding():
    layer, x_BLD = build("mamba"), tokens(length=21)
    silent = torch.cat([x_BLD[:, :13], torch.zeros(3, 8, 64)], dim=1)
    assert not torch.allclose(layer(silent)[:, :13], layer(x_BLD[:, :13]), atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS.names())
def test_a_mask_of_everything_changes_nothing(name):
    layer, x_BLD = build(name), tokens()
    assert torch.allclose(layer(x_BLD, torch.ones(3, 21, dtype=torch.bool)), layer(x_BLD), atol=1e-6)


def test_rotary_positions_see_distances_and_not_places():
    x_BHLK = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 12, -1)
    turned = rotate(x_BHLK)[0, 0]
    products_LL = turned @ turned.T
    for distance in range(12):
        along = products_LL.diagonal(distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-5), distance
    assert torch.allclose(turned.norm(dim=-1), x_BHLK[0, 0].norm(dim=-1))
    assert products_LL[0].unique().numel() == 12


def test_rotary_attention_hears_order_and_plain_attention_does_not():
    x_BLD = tokens()
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    for pos, same in (("none", True), ("rope", False)):
        layer = build("attention", protocol=replace(Protocol(), pos=pos))
        assert torch.allclose(layer(x_BLD[:, order]), layer(x_BLD)[:, order], atol=1e-5) == same, pos


def test_an_odd_head_cannot_be_turned_in_pairs():
    with pytest.raises(ValueError, match="pos=rope turns pairs of channels, and a head has 15"):
        BLOCKS.make("attention", {}).build(width=60, parameters=None, protocol=replace(Protocol(), pos="rope"))
