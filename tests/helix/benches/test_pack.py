"""A pack is measured by processes that take turns and then work at once, and one that fails ends them all."""

import threading
from dataclasses import replace

import pytest
import torch

from helix.bench import Conditions
from helix.benches import pack
from helix.benches.pack import Meeting, OtherFailedError, PackBench

TINY = {"trials": 2, "steps": 2, "frontends": ("mel",), "tokens": 60, "width": 16, "batch": 2, "pattern": ("mamba",)}


def test_a_pack_is_measured_in_turn_and_at_once():
    outcome = PackBench(**TINY).run(Conditions(repeats=2))
    (row,) = outcome.tables[0].rows
    in_turn, at_once, gain = (value for value in row.values if value is not None)
    assert row.name == "mel" and row.note == "median of 2"
    assert in_turn > 0 and at_once > 0 and 0 < gain <= 2 * TINY["trials"]
    assert "2 trials of mamba on one device (cpu), B=2" in outcome.tables[0].title


def test_a_process_that_fails_ends_the_pack_with_its_own_error():
    with pytest.raises(ValueError, match="too short"):
        PackBench(**{**TINY, "tokens": 1}).run(Conditions(repeats=1))


def test_each_waits_for_all_in_a_meeting_and_for_those_before_it_in_a_turn(tmp_path, monkeypatch):
    said: list[int] = []

    def come(number: int) -> None:
        meeting = Meeting(tmp_path, 3, number)
        meeting.all_here("round")
        meeting.my_turn("turn")
        said.append(number)
        meeting.here("turn")

    threads = [threading.Thread(target=come, args=(number,)) for number in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert said == [0, 1, 2]
    monkeypatch.setattr(pack, "PATIENCE_S", 0.05)
    with pytest.raises(OtherFailedError, match="not all of 3 processes were there"):
        Meeting(tmp_path, 3, 0).all_here("again")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trials": 0}, "trials is 0; wanted 1 or more"),
        ({"pattern": ("mamba", "lstm")}, "pattern has lstm; known: attention, mamba"),
        ({"frontends": ("mels",)}, "frontends has mels; known: mel, raw"),
        ({"precision": "fp16"}, "precision has fp16; known: fp32, tf32, bf16"),
        ({"device": "tpu"}, "device has tpu; known: cpu, cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        PackBench(**{**TINY, **wrong})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_none_is_measured():
    with pytest.raises(ValueError, match="torch finds no CUDA GPU here"):
        PackBench(device="cuda").run(Conditions())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_a_pack_of_mel_trials_gains():
    bench = replace(PackBench(), device="cuda", trials=4, steps=30, frontends=("mel",))
    (row,) = bench.run(Conditions(repeats=3)).tables[0].rows
    gain = row.values[2]
    assert gain is not None and gain > 1
