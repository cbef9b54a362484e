"""A spec says everything about a trial and nothing else: read strictly, written out in full, hashed to one name."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix import spec as spec_module
from helix.protocol import PROFILES, SWITCHES, profile
from helix.registry import BLOCKS, DATASETS, FRONTENDS
from helix.spec import (
    AugmentSpec,
    DataSpec,
    ModelSpec,
    TrainingSpec,
    TrialSpec,
    apply_overrides,
    derive_seed,
    from_json,
    identity,
    resolve,
    to_json,
    trial_id,
)
from orchestration.grid import expand, load_grid

MANIFEST = "5eed" * 16
DEMO = expand(load_grid("demo"), folds=[1])

#: One other value for every key of a spec. A new field that is not added here fails a test below.
OTHER_VALUE: dict[str, Any] = {
    "data.dataset": "esc50",
    "data.fold": 2,
    "data.options": {"clips_per_class": 48},
    "model.frontend": "mel",
    "model.pattern": ["mamba"] * 5 + ["attention"],
    "model.width": 128,
    "model.reference": "attention",
    "model.pool": "last",
    "model.pool_tokens": 8,
    "model.options": {"mamba": {"d_state": 16}},
    "augment.shift_s": 0.25,
    "augment.gain_low": 0.9,
    "augment.gain_high": 1.1,
    "augment.noise": 0.0,
    "augment.mixup_alpha": 0.2,
    "training.epochs": 99,
    "training.batch_size": 16,
    "training.lr": 1e-3,
    "training.lr_min": 0.0,
    "training.weight_decay": 0.0,
    "training.clip_norm": 2.0,
    "training.precision": "bf16",
    "seed": 1,
} | {
    f"protocol.{name}": next(value for value in row["choices"] if value != row["paper"])
    for name, row in SWITCHES.items()
    if not row["reporting"]
}
REPORTING = {"protocol.profile": "fair"} | {
    f"protocol.{name}": next(value for value in row["choices"] if value != row["paper"])
    for name, row in SWITCHES.items()
    if row["reporting"]
}


def named(spec: TrialSpec) -> str:
    return trial_id(spec, MANIFEST)


def with_value(key: str, value: Any) -> TrialSpec:
    """The default spec with one value exchanged, past the overrides."""
    values = to_json(TrialSpec())
    *path, last = key.split(".")
    node = values
    for part in path:
        node = node[part]
    node[last] = value
    return from_json(values)


@cache
def name_with(key: str) -> str:
    """The name of the default trial with the other value of one key."""
    return named(with_value(key, OTHER_VALUE[key]))


@cache
def name_of_default() -> str:
    return named(TrialSpec())


def keys(value: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys of a spec as JSON; options are one value."""
    found: set[str] = set()
    for name, child in value.items():
        nested = isinstance(child, Mapping) and name != "options"
        found |= keys(child, f"{prefix}{name}.") if nested else {f"{prefix}{name}"}
    return found


# Identity


def test_trial_ids_are_pinned():
    """A change here renames every trial that was ever stored: results are trained again. Was that meant?"""
    pinned = {
        "demo": {
            "mamba-raw": "7cf78c0e0aaf1c03",
            "mamba-mel": "d481c76030a84151",
            "helix-raw": "539e42f352af0d42",
            "helix-mel": "7445fa3cf409c74d",
            "attention-raw": "a0d9484db97b99ae",
            "attention-mel": "7b1753379a6616c2",
        },
        "esc50": {
            "mamba-raw": "1b3faf1ad7020e83",
            "mamba-mel": "bc92bebe8762e8a6",
            "helix-raw": "78b4fb145aab21bf",
            "helix-mel": "55cb0d51765e1bee",
            "attention-raw": "5f576e788274aff4",
            "attention-mel": "2da451764cd994f4",
        },
    }
    found = {
        grid: {trial.variant.name: named(trial.spec) for trial in expand(load_grid(grid), folds=[1])} for grid in pinned
    }
    assert found == pinned


def test_an_id_is_the_sha256_of_the_identity_in_canonical_json():
    value = identity(TrialSpec(), MANIFEST)
    assert set(value) == {"spec", "data_manifest", "science_version"}
    assert value["spec"] == to_json(resolve(TrialSpec())) | {"protocol": value["spec"]["protocol"]}
    written = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert named(TrialSpec()) == hashlib.sha256(written.encode()).hexdigest()[:16]


def test_every_key_of_a_spec_is_either_science_or_reporting():
    assert keys(to_json(TrialSpec())) == set(OTHER_VALUE) | set(REPORTING)


@pytest.mark.parametrize("key", OTHER_VALUE)
def test_another_value_of_what_is_science_is_another_trial(key: str):
    assert name_with(key) != name_of_default()


@pytest.mark.parametrize("key", REPORTING)
def test_what_only_concerns_reporting_is_the_same_trial(key: str):
    assert with_value(key, REPORTING[key]) != TrialSpec()
    assert named(with_value(key, REPORTING[key])) == name_of_default()


def test_no_two_single_changes_are_the_same_trial():
    assert len({name_with(key) for key in OTHER_VALUE}) == len(OTHER_VALUE)


def test_other_data_are_another_trial():
    assert trial_id(TrialSpec(), MANIFEST) != trial_id(TrialSpec(), MANIFEST[::-1])


def test_another_science_is_another_trial(monkeypatch: pytest.MonkeyPatch):
    before = named(TrialSpec())
    monkeypatch.setattr(spec_module, "SCIENCE_VERSION", spec_module.SCIENCE_VERSION + 1)
    assert named(TrialSpec()) != before


def test_options_of_members_that_are_not_used_are_the_same_trial():
    unused = {"attention": {"heads": 8}, "mel": {"n_mels": 64}}
    assert named(TrialSpec(model=ModelSpec(options=unused))) == named(TrialSpec())


def test_options_of_the_reference_block_are_science_where_no_block_is_one():
    model = ModelSpec(pattern=("attention",), reference="mamba")
    other = dataclasses.replace(model, options={"mamba": {"d_state": 16}})
    assert named(TrialSpec(model=model)) != named(TrialSpec(model=other))


def test_writing_a_default_out_changes_nothing():
    written = TrialSpec(
        data=DataSpec(options={"fold_count": 4}),
        model=ModelSpec(options={"mamba": {"d_conv": 4}, "raw": {}}),
        augment=AugmentSpec(shift_s=0.5),
    )
    assert named(written) == named(TrialSpec())


def test_equal_specs_have_equal_names():
    whole = TrialSpec(training=TrainingSpec(lr=1, weight_decay=0))
    assert whole == TrialSpec(training=TrainingSpec(lr=1.0, weight_decay=0.0))
    assert named(whole) == named(TrialSpec(training=TrainingSpec(lr=1.0, weight_decay=0.0)))
    assert named(whole) == named(from_json(to_json(whole)))


# Resolving


@pytest.mark.parametrize("variant", [trial.spec for trial in DEMO])
def test_resolving_leaves_nothing_implicit(variant: TrialSpec):
    resolved = resolve(variant)
    used = {*resolved.model.pattern, resolved.model.reference}
    assert set(resolved.model.options) == used | {resolved.model.frontend}
    for name, options in resolved.model.options.items():
        registry = BLOCKS if name in used else FRONTENDS
        assert set(options) == {field.name for field in dataclasses.fields(registry[name])}
    assert set(resolved.data.options) == {field.name for field in dataclasses.fields(DATASETS[resolved.data.dataset])}
    assert resolved.augment.shift_s is not None


@pytest.mark.parametrize("variant", [trial.spec for trial in DEMO])
@pytest.mark.parametrize("who", PROFILES)
def test_resolving_twice_is_resolving_once(variant: TrialSpec, who: str):
    once = resolve(dataclasses.replace(variant, protocol=profile(who)))
    assert resolve(once) == once
    assert named(once) == named(dataclasses.replace(variant, protocol=profile(who)))


def test_a_shift_that_is_given_is_kept():
    for given_s in (0.0, 0.3):
        assert resolve(TrialSpec(augment=AugmentSpec(shift_s=given_s))).augment.shift_s == given_s


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (TrialSpec(data=DataSpec(dataset="esc51")), f"unknown data set 'esc51'; known: {', '.join(DATASETS.names())}"),
        (
            TrialSpec(model=ModelSpec(frontend="raws")),
            f"unknown frontend 'raws'; known: {', '.join(FRONTENDS.names())}",
        ),
        (
            TrialSpec(model=ModelSpec(pattern=("mamba9",))),
            f"unknown block 'mamba9'; known: {', '.join(BLOCKS.names())}",
        ),
        (TrialSpec(model=ModelSpec(reference="mamba9")), f"unknown block 'mamba9'; known: {', '.join(BLOCKS.names())}"),
        (
            TrialSpec(model=ModelSpec(options={"mamba9": {"d_state": 8}})),
            "model.options names 'mamba9', which is no block and no frontend; known: "
            + ", ".join((*BLOCKS.names(), *FRONTENDS.names())),
        ),
        (
            TrialSpec(model=ModelSpec(options={"mamba": {"state": 8}})),
            "block 'mamba' has no option 'state'; it has d_state, d_conv, expand",
        ),
        (
            TrialSpec(data=DataSpec(options={"clips": 8})),
            "data set 'tones' has no option 'clips'; it has seed, clips_per_class, fold_count",
        ),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(spec: TrialSpec, complaint: str):
    with pytest.raises(ValueError) as refused:
        resolve(spec)
    assert str(refused.value) == complaint


def test_a_mistyped_option_of_a_member_that_is_not_used_is_refused_too():
    with pytest.raises(ValueError, match="block 'attention' has no option 'hedas'; it has heads"):
        resolve(TrialSpec(model=ModelSpec(pattern=("mamba",), options={"attention": {"hedas": 2}})))


# Overrides

PROTOCOL_KEYS = ", ".join(["profile", *SWITCHES])
TRAINING_KEYS = "epochs, batch_size, lr, lr_min, weight_decay, clip_norm, precision"
MODEL_KEYS = "frontend, pattern, width, reference, pool_tokens, pool, options"


def test_an_override_replaces_one_value_and_leaves_the_rest():
    changed = apply_overrides(TrialSpec(), ["training.epochs=3", "model.options.mamba.d_state=16"])
    assert changed.training == TrainingSpec(epochs=3)
    assert changed.model == ModelSpec(options={"mamba": {"d_state": 16}})
    assert dataclasses.replace(changed, training=TrainingSpec(), model=ModelSpec()) == TrialSpec()
    assert apply_overrides(TrialSpec(), []) == TrialSpec()


def test_the_later_override_wins():
    assert apply_overrides(TrialSpec(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.epochs=3", "training.epochs", 3),
        ("training.lr=1e-3", "training.lr", 1e-3),
        ("training.weight_decay=1", "training.weight_decay", 1.0),
        ("augment.shift_s=null", "augment.shift_s", None),
        ("model.pool_tokens=9", "model.pool_tokens", 9),
        ("model.pattern=[mamba, attention]", "model.pattern", ("mamba", "attention")),
        ("data.options.clips_per_class=4", "data.options", {"clips_per_class": 4}),
        ("data.options.note=A is B=c", "data.options", {"note": "A is B=c"}),
        ("protocol.raw_norm=rms", "protocol.raw_norm", "rms"),
        ("protocol.mel_norm=none", "protocol.mel_norm", "none"),
    ],
)
def test_text_and_value_override_alike(text: str, key: str, value: Any):
    from_text = apply_overrides(TrialSpec(), [text])
    found: Any = from_text
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert apply_overrides(TrialSpec(), {key: value}) == from_text


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in SWITCHES.items() for value in row["choices"]]
)
def test_every_switch_can_be_set_from_the_command_line(name: str, value: str):
    assert getattr(apply_overrides(TrialSpec(), [f"protocol.{name}={value}"]).protocol, name) == value


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "training.epocs=3",
            "override 'training.epocs': Key 'epocs' not in 'TrainingSpec'. Did you mean: 'epochs'?; "
            f"training has {TRAINING_KEYS}",
        ),
        (
            "sede=3",
            "override 'sede': Key 'sede' not in 'TrialSpec'. Did you mean: 'seed'?; "
            "a trial has data, model, augment, training, protocol, seed",
        ),
        (
            "training.epochs=3.5",
            "override 'training.epochs': Value '3.5' of type 'float' could not be converted to Integer; "
            f"training has {TRAINING_KEYS}",
        ),
        (
            "training.epochs=true",
            "override 'training.epochs': Value 'True' of type 'bool' could not be converted to Integer; "
            f"training has {TRAINING_KEYS}",
        ),
        (
            "training.epochs=",
            "override 'training.epochs': Incompatible value 'None' for field of type 'int'; "
            f"training has {TRAINING_KEYS}",
        ),
        (
            "training=3",
            "override 'training': Merge error: int is not a subclass of TrainingSpec. value: 3; "
            f"training has {TRAINING_KEYS}",
        ),
        (
            "model.pattern=mamba",
            "override 'model.pattern': Invalid value assigned: str is not a TupleConfig, ListConfig, list, or tuple.; "
            f"model has {MODEL_KEYS}",
        ),
        (
            "model.options.mamba=3",
            "override 'model.options.mamba': Value 3 (int) is incompatible with type hint 'typing.Dict[str, "
            f"typing.Any]'; model has {MODEL_KEYS}",
        ),
        (
            "protocol.decay=some",
            "override 'protocol.decay': Invalid value 'some', expected one of ['all', 'mamba_groups']; "
            f"protocol has {PROTOCOL_KEYS}",
        ),
        ("seed", "'seed' is not an override; wanted key=value, as in training.epochs=3"),
        ("=3", "'=3' is not an override; wanted key=value, as in training.epochs=3"),
        ("protocol.profile=fair", "protocol.profile cannot be overridden alone; choose a profile with --profile"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_in_words(override: str, complaint: str):
    with pytest.raises(ValueError) as refused:
        apply_overrides(TrialSpec(), [override])
    assert str(refused.value) == complaint


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed=-1", "seed is -1; wanted 0 or more"),
        ("model.pattern=[]", "model.pattern is (); wanted at least one block"),
        ("model.width=0", "model.width is 0; wanted a positive number"),
        ("model.pool_tokens=0", "model.pool_tokens is 0; wanted positive"),
        ("augment.shift_s=-0.5", "augment.shift_s is -0.5; wanted seconds, 0 or more"),
        ("augment.gain_low=0", "augment.gain_low is 0.0; wanted 0 < gain_low <= gain_high"),
        ("augment.gain_high=0.5", "augment.gain_low is 0.8; wanted 0 < gain_low <= gain_high"),
        ("augment.noise=-1", "augment.noise is -1.0; wanted a standard deviation, 0 or more"),
        ("augment.mixup_alpha=-1", "augment.mixup_alpha is -1.0; wanted 0 (no mixup) or more"),
        ("training.epochs=0", "training.epochs is 0; wanted 1 or more"),
        ("training.batch_size=0", "training.batch_size is 0; wanted 1 or more"),
        ("training.lr=1e-9", "training.lr is 1e-09; wanted 0 <= lr_min <= lr"),
        ("training.lr=nan", "training.lr is nan; wanted 0 <= lr_min <= lr"),
        ("training.weight_decay=-1", "training.weight_decay is -1.0; wanted 0 or more"),
        ("training.clip_norm=0", "training.clip_norm is 0.0; wanted a positive norm"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_words(override: str, complaint: str):
    with pytest.raises(ValueError) as refused:
        apply_overrides(TrialSpec(), [override])
    assert str(refused.value) == complaint


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.epochs=???", "training.epochs"),
        ("training={epochs: '???'}", "training"),
        ("model.options.mamba.d_state='???'", "model.options.mamba.d_state"),
        ("training.epochs=${nowhere}", "training.epochs"),
        ("model.width=${model.width}", "model.width"),
        ("model.pattern.0=attention", "model.pattern"),
        ("model.pattern[0]=attention", "model.pattern"),
    ],
)
def test_what_omegaconf_reads_as_something_else_than_a_value_is_refused(override: str, key: str):
    with pytest.raises(ValueError, match=key):
        apply_overrides(TrialSpec(), [override])


@pytest.mark.parametrize("override", ["protocol={profile: fair}", "protocol[profile]=fair"])
def test_a_profile_is_not_claimed_without_its_switches(override: str):
    with pytest.raises(ValueError, match="protocol"):
        apply_overrides(TrialSpec(), [override])


@pytest.mark.parametrize("key", ["training.lr", "training.clip_norm", "augment.noise"])
def test_an_infinite_value_is_refused_by_name(key: str):
    with pytest.raises(ValueError, match=key):
        named(apply_overrides(TrialSpec(), [f"{key}=inf"]))


# JSON

NAMES = st.text("abcdefghij_0123456789-", min_size=1, max_size=8)
FRACTIONS = st.floats(0, 1e6, allow_nan=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9) | NAMES
OPTIONS = st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=3), max_size=3)


@st.composite
def specs(draw: st.DrawFn) -> TrialSpec:
    """Any spec that can be written down, whether or not its members exist."""
    low, high = sorted(draw(st.tuples(*[st.floats(0.01, 10)] * 2)))
    lr_min, lr = sorted(draw(st.tuples(FRACTIONS, FRACTIONS)))
    switches = {name: draw(st.sampled_from(row["choices"])) for name, row in SWITCHES.items()}
    return TrialSpec(
        data=DataSpec(dataset=draw(NAMES), fold=draw(st.integers(-9, 99)), options=draw(OPTIONS)),
        model=ModelSpec(
            frontend=draw(NAMES),
            pattern=tuple(draw(st.lists(NAMES, min_size=1, max_size=7))),
            width=draw(st.integers(1, 4096)),
            reference=draw(NAMES),
            pool_tokens=draw(st.none() | st.integers(1, 999)),
            options=draw(st.dictionaries(NAMES, OPTIONS, max_size=3)),
        ),
        augment=AugmentSpec(
            shift_s=draw(st.none() | FRACTIONS),
            gain_low=low,
            gain_high=high,
            noise=draw(FRACTIONS),
            mixup_alpha=draw(FRACTIONS),
        ),
        training=TrainingSpec(
            epochs=draw(st.integers(1, 9999)),
            batch_size=draw(st.integers(1, 9999)),
            lr=lr,
            lr_min=lr_min,
            weight_decay=draw(FRACTIONS),
            clip_norm=draw(st.floats(1e-6, 1e6)),
        ),
        protocol=dataclasses.replace(profile(draw(st.sampled_from(PROFILES))), **switches),
        seed=draw(st.integers(0, 2**63)),
    )


@settings(max_examples=40, deadline=None)
@given(specs())
def test_a_spec_survives_json(spec: TrialSpec):
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_a_resolved_spec_survives_json():
    for trial in DEMO:
        resolved = resolve(trial.spec)
        assert from_json(json.loads(json.dumps(to_json(resolved)))) == resolved


def test_what_a_worker_is_sent_has_the_name_that_was_planned():
    for trial in [*DEMO, *expand(load_grid("esc50"), profile_name="authors", folds=[1])]:
        assert named(from_json(json.loads(json.dumps(to_json(trial.spec))))) == named(trial.spec)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"sede": 1}, "this is not a trial spec: Key 'sede' not in 'TrialSpec'. Did you mean: 'seed'?"),
        ({"training": {"x": 1}}, "this is not a trial spec: Key 'x' not in 'TrainingSpec'"),
        (
            {"seed": "one"},
            "this is not a trial spec: Value 'one' of type 'str' could not be converted to Integer",
        ),
        ({"seed": -1}, "seed is -1; wanted 0 or more"),
    ],
)
def test_what_is_no_spec_is_refused_in_words(value: dict[str, Any], complaint: str):
    with pytest.raises(ValueError) as refused:
        from_json(value)
    assert str(refused.value) == complaint


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_remembered_of_a_resolved_spec_is_what_resolving_it_gives(name: str):
    for trial in expand(load_grid("esc50"), profile_name=name, folds=[1, 4], seeds=[0, 7]):
        for _ in range(2):
            assert spec_module.resolve(trial.spec) == spec_module._resolve(trial.spec)


def test_what_is_remembered_of_a_resolved_spec_cannot_be_changed_from_outside():
    first = spec_module.resolve(TrialSpec())
    first.model.options["mamba"]["d_state"] = 999
    assert spec_module.resolve(TrialSpec()) == spec_module._resolve(TrialSpec())


def test_a_float_in_place_of_a_whole_number_is_not_taken_for_it_because_it_was_remembered():
    spec_module.resolve(TrialSpec(seed=1))
    with pytest.raises(ValueError):
        spec_module.resolve(TrialSpec(seed=1.5))  # pyright: ignore[reportArgumentType]


# Seeds


def test_derived_seeds_are_pinned():
    """A change here changes every random number of every trial: raise SCIENCE_VERSION with it."""
    pinned = {
        (0,): 2033344993903900207,
        (0, "initial weights"): 3417650522253600015,
        (0, "order", 0): 3991725939186754870,
        (1, "mixup", 3, 14): 8934200026925053187,
    }
    assert {path: derive_seed(*path) for path in pinned} == pinned


def test_a_seed_of_its_own_for_each_purpose_position_and_trial():
    paths = [
        (seed, purpose, epoch, step)
        for seed in range(4)
        for purpose in ("order", "shift", "gain", "noise", "mixup")
        for epoch in range(12)
        for step in range(12)
    ]
    assert len({derive_seed(*path) for path in paths}) == len(paths)


@given(st.integers(0, 2**63), st.lists(NAMES | st.integers(0, 10**6), max_size=4))
def test_a_seed_fits_into_63_bits(seed: int, path: list[str | int]):
    assert 0 <= derive_seed(seed, *path) < 2**63
