"""What each trial asks for, by what its step takes and the GPUs on offer; and packs of trials that ask alike."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix.models.classifier import Cost
from helix.training.memory import GIB
from helix.training.step import FILLED_TOKENS
from orchestration.grid import Trial, expand, load_grid
from orchestration.needs import (
    FLOPS_PER_S,
    LONG_S,
    MOST_SIDE_BY_SIDE,
    Deal,
    Need,
    Room,
    deal,
    need_of,
    share,
    side_by_side,
)
from orchestration.plan import Planned, place, price
from orchestration.pools import Offer, Pool

RAW, MEL = expand(load_grid("esc50"), folds=[1], variants=["mamba-raw", "mamba-mel"])
(SMALL,) = expand(load_grid("demo"), folds=[1], variants=["mamba-mel"])
GPU_22 = Room(device="cuda", gpu_bytes=22 * GIB)


def need(trial: Trial, room: Room) -> Need:
    return need_of(trial, room, tokens=price(trial).tokens)


def alone(trial: Trial) -> int:
    """The bytes that a worker of this trial has to have where the whole batch goes through its model at once."""
    return place(trial, limit_bytes=None, device="cuda").needed_bytes


def is_cut(asked: Need) -> bool:
    """Whether a step does not go through the model in one piece that keeps everything."""
    return asked.placement.micro_batch is not None or asked.placement.recompute


# What a trial asks for


def test_trials_of_one_sweep_ask_for_what_each_of_them_needs():
    """32 clips of 80 tokens leave a GPU idle that 32 clips of 500 tokens fill."""
    assert (str(need(RAW, GPU_22)), str(need(MEL, GPU_22))) == ("1 GPU", "1/4 GPU")


@pytest.mark.parametrize(("times", "wanted"), [(4.01, 0.25), (3.99, 0.3333), (2.99, 0.5), (1.99, 1.0), (1.01, 1.0)])
def test_the_share_is_what_the_predicted_peak_with_its_bound_fits_into(times: float, wanted: float):
    room = Room(device="cuda", gpu_bytes=int(times * alone(MEL)))
    asked = need(MEL, room)
    assert asked.gpus == wanted
    assert not is_cut(asked)
    limit = room.limit(asked.gpus)
    assert limit is not None and asked.placement.needed_bytes <= limit


def test_what_does_not_fit_into_a_whole_gpu_is_cut_and_gets_it_whole_and_what_never_fits_says_so():
    asked = need(MEL, Room(device="cuda", gpu_bytes=int(0.9 * alone(MEL))))
    assert asked.gpus == 1.0 and is_cut(asked)
    with pytest.raises(ValueError, match=r"mamba-mel fold 1 seed 0: .*1\.00 GiB"):
        need(SMALL, Room(device="cuda", gpu_bytes=GIB))


def test_what_somebody_asked_for_by_hand_is_what_every_trial_asks_for():
    for gpus in (1.0, 0.2, 2.0):
        room = Room(device="cuda", gpus=gpus, gpu_bytes=22 * GIB)
        assert [need(trial, room).gpus for trial in (RAW, MEL)] == [gpus, gpus]
    half = Room(device="cuda", gpus=0.5, gpu_bytes=int(1.8 * alone(MEL)))
    assert is_cut(need(MEL, half))  # to fit into the half that it has
    assert half.limit(2.0) == half.gpu_bytes  # of two GPUs a process sits on one


def test_where_nobody_knows_the_gpus_a_trial_asks_for_a_whole_one():
    assert need(MEL, Room(device="cuda")).gpus == 1.0
    assert str(need(MEL, Room())) == "no GPU"


def test_a_limit_that_somebody_set_cuts_first_and_what_is_left_is_shared():
    limited = need(MEL, Room(device="cuda", gpu_bytes=3 * alone(MEL), limit_bytes=int(0.9 * alone(MEL))))
    assert is_cut(limited) and limited.placement.needed_bytes <= 0.9 * alone(MEL)
    assert limited.gpus <= 0.3333


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(1, 10**6), st.integers(1, 64))
def test_so_many_fit_side_by_side_in_memory_in_work_and_in_cores(needed: int, has: int, tokens: int, most: int):
    workers = side_by_side(needed_bytes=needed, gpu_bytes=has, tokens=tokens, most=most)
    assert 1 <= workers <= min(most, MOST_SIDE_BY_SIDE)
    assert workers == 1 or (workers * needed <= has and workers * tokens <= FILLED_TOKENS["cuda"])
    assert 1 - 0.01 < workers * share(workers) <= 1


def test_a_room_on_a_cluster_has_the_smallest_gpu_and_the_cores_beside_it():
    small = Pool(name="l4", resources={"CPU": 4, "GPU": 1}, most=3, gpu_bytes=22 * GIB)
    large = Pool(name="l40s", resources={"CPU": 32, "GPU": 4}, most=3, gpu_bytes=44 * GIB)
    head = Pool(name="head", resources={"CPU": 8}, running=1, most=1)
    room = Room(device="cuda").on(Offer(pools=(head, small, large)), threads=1)
    assert (room.gpu_bytes, room.most) == (22 * GIB, 4)
    assert Room(device="cuda").on(Offer(pools=(small, large)), threads=3).most == 1
    assert Room(limit_bytes=5).on(Offer(pools=(head,)), threads=1) == Room(limit_bytes=5)
    unknown = Pool(name="?", resources={"CPU": 4, "GPU": 1}, most=1)
    for offer in (Offer(pools=(small, unknown)), Offer(pools=(head,)), Offer(pools=(small,), complete=False)):
        assert Room(device="cuda").on(offer, threads=1).gpu_bytes is None


# Packs


class Work(Planned):
    """A planned trial whose work is its number of steps."""

    @property
    def work(self) -> float:
        return float(self.steps_per_epoch)


def trials(*given: tuple[float, float]) -> list[tuple[Planned, float]]:
    """Trials of so much work that ask for so much, named by their position."""
    free = Cost(parameters=0, tokens=0, forward_flops_per_clip=0, training_flops_per_clip=0)
    return [
        (Work(trial=MEL, trial_id=str(number), cost=free, steps_per_epoch=int(work)), gpus)
        for number, (work, gpus) in enumerate(given)
    ]


def dealt(given: list[tuple[Planned, float]], *, gpus: int = 2, **more: Any) -> Deal:
    """Dealt over so many GPUs."""
    return deal(given, slots=lambda each: max(1, int(gpus / each + 1e-9)), **{"device": "cuda", **more})


shares = st.sampled_from([1.0, 0.5, 0.3333, 0.25])
lists = st.lists(st.tuples(st.floats(1, 1e18), shares), min_size=1, max_size=40)


@given(lists, st.integers(1, 6), st.one_of(st.none(), st.integers(1, 6)))
def test_every_trial_is_dealt_once_to_a_worker_that_has_what_it_asks_for(
    given: list[tuple[float, float]], gpus: int, workers: int | None
):
    asked = trials(*given)
    made = dealt(asked, gpus=gpus, workers=workers)
    needs = {entry.trial_id: need for entry, need in asked}
    assert sorted(entry.trial_id for pack in made.packs for entry in pack.entries) == sorted(needs)
    assert all(needs[entry.trial_id] <= pack.gpus for pack in made.packs for entry in pack.entries)
    assert 1 <= made.at_once <= (workers or len(asked))
    if workers is None:
        assert all(needs[entry.trial_id] == pack.gpus for pack in made.packs for entry in pack.entries)
    assert [pack.work for pack in made.packs] == sorted((pack.work for pack in made.packs), reverse=True)


def test_short_trials_share_a_worker_and_long_ones_have_their_own():
    long, short = LONG_S * FLOPS_PER_S["cuda"], 1e12
    made = dealt(trials(*[(long, 1.0)] * 3, *[(short, 1.0)] * 4))
    assert sorted(len(pack.entries) for pack in made.packs) == [1, 1, 1, 2, 2]
    assert all(pack.work >= long for pack in made.packs[:3])
    assert made.at_once == 2  # the third long one starts when one of the two has ended, before the short ones
    assert len(dealt(trials(*[(long, 1.0)] * 3), device="cuda").packs) == 3
    on_cpu = dealt(trials(*[(LONG_S * FLOPS_PER_S["cpu"], 0.0)] * 3), device="cpu", workers=1)
    assert len(on_cpu.packs) == 3 and on_cpu.at_once == 1


def test_workers_go_where_the_time_goes():
    """Sixteen small ones could run at once and four whole ones, so that these need twice the time of eight of those."""
    made = dealt(trials(*[(1e12, 0.25)] * 8, *[(1e12, 1.0)] * 4), gpus=4)
    assert sum(pack.gpus == 1.0 for pack in made.packs) == 3
    assert sum(pack.gpus == 0.25 for pack in made.packs) == 5
    assert made.at_once == 8 and made.waiting(1.0) == 3


def test_fewer_workers_than_kinds_of_needs_put_the_small_ones_with_the_larger():
    made = dealt(trials((3, 0.25), (2, 0.5), (1, 1.0)), workers=1)
    assert [(pack.gpus, len(pack.entries)) for pack in made.packs] == [(1.0, 3)]
    made = dealt(trials((3, 0.25), (2, 0.5), (1, 1.0)), workers=2)
    assert sorted((pack.gpus, len(pack.entries)) for pack in made.packs) == [(0.5, 2), (1.0, 1)]


def test_the_bounds_are_told_as_people_read_them():
    assert str(Need(gpus=0.3333, placement=need(MEL, GPU_22).placement)) == "1/3 GPU"
    assert str(Need(gpus=0.3, placement=need(MEL, GPU_22).placement)) == "0.3 GPU"
    assert str(Need(gpus=2.0, placement=need(MEL, GPU_22).placement)) == "2 GPU"
