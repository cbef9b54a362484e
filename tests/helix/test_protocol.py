"""The register of switches: complete in every profile, true to its sources, and without an option that does nothing."""

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helix import spec
from helix.data.shards import Recordings
from helix.protocol import PROFILES, SWITCHES, Protocol, profile
from helix.registry import BLOCKS, DATASETS
from helix.spec import TrialSpec, apply_overrides, resolve
from helix.storage import FolderStorage
from helix.training.trainer import Fit, fit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_has_a_value_of_its_own_choices_in_each_profile(name: str):
    row = SWITCHES[name]
    assert len(set(row["choices"])) == len(row["choices"]) >= 2
    assert {row[who] for who in PROFILES} <= set(row["choices"])


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_says_what_the_paper_says_and_what_the_code_does(name: str):
    for text in (SWITCHES[name]["says"], SWITCHES[name]["does"]):
        assert text.strip() == text != ""


def test_the_profiles_are_what_the_sources_say():
    facts = {
        # switch: (authors, paper, fair)
        "ffn_match": ("code", "eq10", "code"),
        "attn_impl": ("weights", "sdpa", "sdpa"),
        "pos": ("none", "none", "none"),
        "pad_mask": ("none", "none", "clip"),
        "decay": ("all", "all", "mamba_groups"),
        "schedule_unit": ("epoch", "epoch", "epoch"),
        "mel_pad": ("floor", "ceil", "ceil"),
        "shift": ("dataset", "paper", "paper"),
        "augment_mel": ("none", "waveform", "waveform"),
        "mixup_on": ("features", "waveform", "waveform"),
        "concat_shift": ("whole", "per_clip", "per_clip"),
        "stitch": ("reshuffle", "reshuffle", "disjoint"),
        "speaker_split": ("utterance", "utterance", "session"),
        "divergence": ("stop", "stop", "stop"),
        "validation": ("test_halves", "test_halves", "held_out"),
        "select": ("best_test", "best_test", "validation"),
        "std": ("population", "population", "sample"),
    }
    found = {name: tuple(getattr(profile(who), name) for who in ("authors", "paper", "fair")) for name in facts}
    assert found == facts


@pytest.mark.parametrize("who", PROFILES)
def test_a_profile_sets_every_switch_and_carries_its_name(who: str):
    protocol = profile(who)
    assert protocol.profile == who
    assert {name: getattr(protocol, name) for name in SWITCHES} == {name: row[who] for name, row in SWITCHES.items()}


def test_the_protocol_of_nobody_in_particular_is_the_papers():
    assert Protocol() == profile("paper")


def test_no_two_profiles_agree_in_everything():
    assert len({tuple(row[who] for row in SWITCHES.values()) for who in PROFILES}) == len(PROFILES)


def test_an_unknown_profile_is_answered_with_the_known_ones():
    with pytest.raises(ValueError) as refused:
        profile("author")
    assert str(refused.value) == "unknown profile 'author'; known: authors, paper, fair"


def test_only_what_summarises_results_is_reporting():
    assert {name for name, row in SWITCHES.items() if row["reporting"]} == {"select", "std"}


@cache
def readers() -> dict[str, set[str]]:
    """attribute name -> the files that read it from something called `protocol`."""
    found: dict[str, set[str]] = {}
    for top in ("helix", "orchestration", "dashboards"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "protocol":
                    found.setdefault(node.attr, set()).add(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.parametrize("name", SWITCHES)
def test_somebody_reads_each_switch(name: str):
    assert readers().get(name, set()) - {"helix/protocol.py"}, f"nobody reads protocol.{name}"


#: These have tests of their own: tones shift by what the paper says, have one recording per clip and no speakers; the
#: attentions agree to rounding; and no loss of these trials diverges.
ELSEWHERE = ("shift", "attn_impl", "concat_shift", "stitch", "speaker_split", "divergence")

LEARNED = [name for name, row in SWITCHES.items() if not row["reporting"] and name not in ELSEWHERE]

#: At width 16 and this state size the two ways to match the parameters give two widths.
D_STATE = 7


@pytest.mark.parametrize("name", LEARNED)
def test_each_switch_changes_what_is_learned(name: str, tiny_spec: TrialSpec, tiny_data: Recordings, tmp_path: Path):
    def learned(frontend: str, value: str) -> str:
        """The hash of the weights after one epoch of three steps."""
        changes = {"model.frontend": frontend, "model.options.mamba.d_state": D_STATE, "training.epochs": 1}
        spec = apply_overrides(tiny_spec, {**changes, f"protocol.{name}": value})
        return fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / frontend / value)))["weights_sha256"]

    choices = SWITCHES[name]["choices"]
    assert any(len({learned(frontend, value) for value in choices}) == len(choices) for frontend in ("mel", "raw")), (
        f"however protocol.{name} is set, the same is learned"
    )


def test_the_shift_is_the_data_sets_own_or_the_papers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DATASETS["tones"], "authors_shift_s", 0.1)
    monkeypatch.setattr(spec, "_RESOLVED", {})  # what was resolved with the other shift is remembered
    shifts = {
        value: resolve(TrialSpec(protocol=Protocol(shift=value))).augment.shift_s for value in ("dataset", "paper")
    }
    assert shifts == {"dataset": 0.1, "paper": 0.5}


def test_attention_weights_stay_in_memory_only_where_they_are_asked_for():
    tokens, heads = 64, 4
    largest = {}
    for value in SWITCHES["attn_impl"]["choices"]:
        layer = BLOCKS.make("attention", {"heads": heads}).build(
            width=16, parameters=4000, protocol=Protocol(attn_impl=value)
        )
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(1, tokens, 16))
        largest[value] = max(kept)
    assert largest["weights"] >= heads * tokens**2 > largest["sdpa"]
