"""A classifier is its spec: the counts of the paper's authors, the cost that is planned, the tokens that are pooled."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helix.models.block import count
from helix.models.classifier import build_classifier, cost, count_parameters, decay_exempt, sinusoids
from helix.protocol import PROFILES, Protocol, profile
from helix.registry import BLOCKS, FRONTENDS
from helix.spec import ModelSpec

PATTERNS = {
    "mamba": ("mamba",) * 6,
    "helix": ("mamba", "mamba", "mamba", "attention", "mamba", "mamba"),
    "attention": ("attention",) * 6,
}

VARIANTS = [(frontend, backbone) for frontend in ("raw", "mel") for backbone in PATTERNS]

#: Classes -> parameters of each variant, computed from the authors' code at commit 65a9517.
AUTHORS = {
    50: (6_394_162, 6_393_657, 6_391_132, 6_418_738, 6_418_233, 6_415_708),
    10: (6_383_882, 6_383_377, 6_380_852, 6_408_458, 6_407_953, 6_405_428),
    35: (6_390_307, 6_389_802, 6_387_277, 6_414_883, 6_414_378, 6_411_853),
    251: (6_445_819, 6_445_314, 6_442_789, 6_470_395, 6_469_890, 6_467_365),
    921: (6_618_009, 6_617_504, 6_614_979, 6_642_585, 6_642_080, 6_639_555),
    1313: (6_718_753, 6_718_248, 6_715_723, 6_743_329, 6_742_824, 6_740_299),
}

SMALL = ModelSpec(width=64, options={"mamba": {"d_state": 16}})


def spec(backbone: str, *, frontend: str = "raw", base: ModelSpec = SMALL, layers: int = 6) -> ModelSpec:
    return replace(base, frontend=frontend, pattern=PATTERNS[backbone][:layers])


def wave(samples: int = 4000, batch: int = 2) -> torch.Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("classes", AUTHORS)
def test_every_variant_has_exactly_the_authors_parameters(classes):
    given = [
        count_parameters(spec(backbone, frontend=frontend, base=ModelSpec()), profile("authors"), classes=classes)
        for frontend, backbone in VARIANTS
    ]
    assert given == list(AUTHORS[classes])


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("frontend", ["raw", "mel"])
@pytest.mark.parametrize("base", [ModelSpec(), SMALL], ids=["paper size", "small"])
def test_backbones_are_compared_within_a_tenth_of_a_percent(base, frontend, name):
    counts = [
        count_parameters(spec(backbone, frontend=frontend, base=base), profile(name), classes=10)
        for backbone in PATTERNS
    ]
    assert max(counts) - min(counts) <= 0.001 * max(counts)


def test_the_reference_block_keeps_its_natural_size_under_its_options():
    model = build_classifier(replace(SMALL, options={"mamba": {"d_state": 8, "expand": 3}}), Protocol(), classes=2)
    assert model.get_parameter("blocks.0.mamba_forward.A_log").shape == (3 * 64, 8)


def test_counting_allocates_and_draws_nothing():
    before = torch.get_rng_state()
    planned = count_parameters(SMALL, Protocol(), classes=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert planned == count(build_classifier(SMALL, Protocol(), classes=7))


@pytest.mark.parametrize(("frontend", "backbone"), VARIANTS)
def test_every_variant_learns(frontend, backbone):
    """A few steps of gradient descent tell a tone from a noise."""
    torch.manual_seed(0)
    model = build_classifier(spec(backbone, frontend=frontend, layers=4), Protocol(), classes=2)
    wave_BT, label_B = wave(8000), torch.tensor([0, 1])
    wave_BT[1] = 0.1 * torch.sin(torch.arange(8000) * 0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(wave_BT), label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_forward_pass_is_its_two_stages():
    model = build_classifier(spec("helix", frontend="mel"), Protocol(), classes=5)
    wave_BT = wave()
    assert torch.equal(model(wave_BT), model.logits(model.features(wave_BT)))
    assert model(wave_BT).shape == (2, 5)


def permuted(wave_BT: torch.Tensor) -> torch.Tensor:
    """The same 10 ms pieces in another order."""
    pieces = wave_BT.unflatten(1, (-1, 160))
    return pieces[:, torch.randperm(pieces.shape[1], generator=torch.Generator().manual_seed(0))].flatten(1)


@pytest.mark.parametrize(("backbone", "blind"), [("attention", True), ("mamba", False), ("helix", False)])
def test_only_attention_without_positions_is_blind_to_the_order_of_tokens(backbone, blind):
    torch.manual_seed(0)
    model = build_classifier(spec(backbone), Protocol(), classes=5).double()
    wave_BT = wave().double()
    difference = (model(permuted(wave_BT)) - model(wave_BT)).abs().max()
    assert bool(difference < 1e-12) is blind


def test_pooling_takes_the_first_tokens_and_no_others():
    torch.manual_seed(0)
    model = build_classifier(replace(SMALL, pattern=("mamba",), pool_tokens=5), Protocol(), classes=3)
    with torch.no_grad():
        model.get_parameter("blocks.0.out_proj.weight").zero_()  # tokens no longer see each other
        wave_BT = wave()
        beyond, within = wave_BT.clone(), wave_BT.clone()
        beyond[:, 5 * 160 :] *= -1
        within[:, 4 * 160 :] *= -1
        assert torch.equal(model(beyond), model(wave_BT))
        assert not torch.equal(model(within), model(wave_BT))
        model.pool_tokens = None
        assert not torch.equal(model(beyond), model(wave_BT))


@pytest.mark.parametrize(("frontend", "backbone"), VARIANTS)
def test_the_planned_cost_is_the_real_one(frontend, backbone):
    model = spec(backbone, frontend=frontend)
    planned = cost(model, Protocol(), classes=5, samples=24_576)
    built = build_classifier(model, Protocol(), classes=5)
    assert planned.parameters == count(built)
    assert planned.tokens == built.frontend(wave(24_576, batch=1)).shape[1]
    assert planned.training_flops_per_clip == 3 * planned.forward_flops_per_clip


def test_the_planned_flops_of_attention_are_those_that_torch_counts():
    protocol = profile("authors")
    model = build_classifier(spec("attention"), protocol, classes=5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(wave(8000, batch=1))
    planned = cost(spec("attention"), protocol, classes=5, samples=8000)
    assert planned.forward_flops_per_clip == counter.get_total_flops()


def test_at_full_length_attention_costs_far_more_than_mamba():
    """Section 3.1: quadratic against linear, at the five minutes of VoxPopuli."""
    mamba, attention = (
        cost(spec(backbone, base=ModelSpec()), Protocol(), classes=1313, samples=300 * 16_000)
        for backbone in ("mamba", "attention")
    )
    assert attention.forward_flops_per_clip > 10 * mamba.forward_flops_per_clip


def test_what_is_exempt_from_decay_is_marked_or_has_no_direction():
    model = build_classifier(spec("helix"), Protocol(), classes=5)
    exempt = decay_exempt(model)
    kept = {name for name, _ in model.named_parameters()} - exempt
    layer = "blocks.0.mamba_forward"
    assert {f"{layer}.A_log", f"{layer}.D", f"{layer}.dt_proj.bias", "final_norm.weight", "final_norm.bias"} <= exempt
    assert {f"{layer}.in_proj.weight", f"{layer}.conv1d.weight", "blocks.3.attn.in_proj_weight"} <= kept
    assert "blocks.3.attn.in_proj_bias" in exempt
    assert "classifier.weight" in kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frontend": "cqt"}, f"unknown frontend 'cqt'; known: {', '.join(FRONTENDS.names())}"),
        ({"pattern": ("mamba9",)}, f"unknown block 'mamba9'; known: {', '.join(BLOCKS.names())}"),
        ({"reference": "mamba9"}, "unknown block 'mamba9'"),
        ({"options": {"mamba": {"states": 8}}}, "block 'mamba' has no option 'states'; it has d_state"),
        ({"options": {"raw": {"samples_per_token": "10"}}}, "option samples_per_token is '10'; wanted int"),
        ({"width": 66, "pattern": ("attention",)}, "width 66 does not divide into 4 heads"),
        ({"pool_tokens": 26}, "model.pool_tokens is 26, but the clip has only 25 tokens"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_when_it_is_planned(change, message):
    with pytest.raises(ValueError, match=message):
        cost(replace(SMALL, **change), Protocol(), classes=5, samples=4000)


def test_a_clip_shorter_than_its_pooling_is_refused():
    model = build_classifier(replace(SMALL, pool_tokens=26), Protocol(), classes=5)
    with pytest.raises(ValueError, match="only 25 tokens"):
        model(wave())


def test_a_classifier_needs_classes():
    with pytest.raises(ValueError, match="classes is 0"):
        build_classifier(SMALL, Protocol(), classes=0)


def logits(protocol: Protocol, wave_BT: torch.Tensor, samples_B: torch.Tensor | None = None, **changes) -> torch.Tensor:
    torch.manual_seed(0)
    model = build_classifier(replace(spec("helix"), **changes), protocol, classes=5)
    with torch.no_grad():
        return model(wave_BT, samples_B)


@pytest.mark.parametrize("pool", [{}, {"pool_tokens": 3}, {"pool_tokens": 3, "pool": "last"}], ids=str)
def test_with_the_padding_masked_a_padded_clip_is_the_clip(pool):
    """Raw tokens of a clip of 17 tokens, alone and followed by the silence that completes 25."""
    masked, whole = replace(Protocol(), pad_mask="clip"), wave(17 * 160, batch=1)
    padded = torch.nn.functional.pad(whole, (0, 8 * 160))
    alone = logits(Protocol(), whole, **pool)
    assert torch.allclose(logits(masked, padded, torch.tensor([17 * 160]), **pool), alone, atol=1e-5)
    unmasked = logits(Protocol(), padded, torch.tensor([17 * 160]), **pool)
    assert not torch.allclose(unmasked, alone, atol=1e-4)


@pytest.mark.parametrize("frontend", ["raw", "mel"])
@pytest.mark.parametrize("mel_order", ["freq_major", "time_major"])
def test_sounding_tokens_are_those_that_the_samples_reach(frontend, mel_order):
    protocol = replace(Protocol(), pad_mask="clip", mel_order=mel_order)
    tokenizer = build_classifier(spec("mamba", frontend=frontend), protocol, classes=5).frontend
    silent, loud = torch.zeros(1, 24_576), torch.zeros(1, 24_576)
    loud[:, 8_192:] = wave(16_384, batch=1)
    differs_L = (tokenizer.patches(tokenizer.features(loud)) != tokenizer.patches(tokenizer.features(silent))).any(-1)[
        0
    ]
    mask_L = tokenizer.sounding(torch.tensor([8_192]), len(differs_L))[0]
    assert bool(mask_L.any()) and bool((~mask_L).any())
    if frontend == "raw":
        assert torch.equal(~mask_L[:51], differs_L[:51])
    order = (8, -1) if mel_order == "freq_major" else (-1, 8)
    if frontend == "mel":  # the same patches along time in every row of mel bins
        rows = mask_L.view(order) if mel_order == "freq_major" else mask_L.view(order).T
        assert all(torch.equal(row, rows[0]) for row in rows) and rows[0].tolist() == sorted(rows[0].tolist())[::-1]
    assert tokenizer.sounding(torch.tensor([0]), len(differs_L)).any(), "a clip of silence keeps a token"


def test_sinusoids_are_those_of_the_paper():
    table_LD = sinusoids(50, 7)
    for place, channel in ((0, 0), (3, 0), (3, 1), (49, 4), (49, 5), (20, 6)):
        angle = place / 10_000 ** (2 * (channel // 2) / 7)
        wanted = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
        assert abs(float(table_LD[place, channel]) - wanted) < 1e-5


def test_sinusoidal_positions_let_pure_attention_hear_order():
    wave_BT = wave(4_000)
    turned = wave_BT.roll(1_600, dims=1)
    for pos, same in (("none", True), ("sinusoidal", False), ("rope", False)):
        given = [logits(replace(Protocol(), pos=pos), x, pattern=("attention",) * 2) for x in (wave_BT, turned)]
        assert torch.allclose(*given, atol=1e-5) == same, pos


@pytest.mark.parametrize("backbone", PATTERNS)
def test_recomputing_saves_memory_and_changes_no_bit(backbone):
    results, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_classifier(spec(backbone), Protocol(), classes=5)
        model.recompute = recompute
        held: dict[int, int] = {}

        def keep(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(wave(8_000)).square().sum()
        loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(held.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.7 * kept[0]
