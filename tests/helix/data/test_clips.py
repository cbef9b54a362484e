"""Clips: index arithmetic that loses no sample, overlaps none, and draws by (seed, epoch) alone."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix.data.clips import Clips, concat, single, stitch
from helix.data.datasets.concat_speech_commands import ConcatSpeechCommands
from helix.data.datasets.librispeech import LibriSpeech
from helix.data.index import Index, Recording, listed_index
from helix.protocol import profile


def index_of(samples: list[int], label: list[int] | None = None, padded: list[int] | None = None) -> Index:
    """An index of recordings of these lengths, all of one speaker unless labels are given."""
    listing = [
        Recording(
            recording_id=str(row),
            label=label[row] if label else 0,
            path=None,
            fold=None,
            speaker=None,
            group=f"session {row}",
        )
        for row in range(len(samples))
    ]
    return replace(
        listed_index(listing), samples=np.array(samples), padded_samples=np.array(padded or [0] * len(samples))
    )


def pieces(clips: Clips, number: int) -> list[tuple[int, int, int, int]]:
    """(row, start, samples, place) of each piece of a clip."""
    part = slice(clips.first_piece[number], clips.first_piece[number + 1])
    columns = (clips.row[part], clips.start[part], clips.samples[part], clips.place[part])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def stitched(index: Index, rows: np.ndarray | None = None, *, how: str, clip_samples: int, **draw: int | None) -> Clips:
    given = {"seed": 0, "epoch": 0} | draw
    rows = np.arange(len(index)) if rows is None else rows
    return stitch(index, rows, clip_samples=clip_samples, how=how, **given)  # pyright: ignore


def test_a_single_clip_is_its_recording_cut_or_followed_by_silence():
    clips = single(index_of([50, 200, 100], padded=[10, 0, 100]), np.array([2, 0, 1]), clip_samples=100)
    assert [pieces(clips, number) for number in range(3)] == [[(2, 0, 100, 0)], [(0, 0, 50, 0)], [(1, 0, 100, 0)]]
    assert clips.clip.tolist() == [2, 0, 1]
    assert clips.sounding.tolist() == [1, 40, 100], "a silent clip keeps one sample, so that nothing divides by none"
    assert clips.silence == pytest.approx(1 - 141 / 300)


def test_in_a_concatenation_the_label_stands_where_it_was_asked_for():
    index = index_of([10, 7, 12, 9, 10], label=[4, 3, 2, 1, 0], padded=[0, 2, 0, 0, 0])
    for position in range(3):
        clips = concat(index, np.arange(5), n=3, position=position, piece_samples=10, seed=0, epoch=0)
        assert clips.clip_samples == 30 and clips.label.tolist() == [4, 3, 2, 1, 0]
        for number in range(5):
            parts = pieces(clips, number)
            assert [place for *_, place in parts] == [0, 10, 20]
            assert parts[position][0] == number and all(row != number for row, *_ in parts[:position])
            assert all(samples == min(10, [10, 7, 12, 9, 10][row]) for row, _, samples, _ in parts)
            last = parts[2][0]
            assert clips.sounding[number] == 20 + [10, 5, 10, 9, 10][last]


def test_fillers_come_from_the_same_rows_evenly_and_anew_each_epoch():
    index, rows = index_of([10] * 40), np.arange(0, 40, 2)
    drawn = np.zeros(40, int)
    orders = set()
    for epoch in range(200):
        clips = concat(index, rows, n=4, position=1, piece_samples=10, seed=0, epoch=epoch)
        filler = np.delete(clips.row.reshape(-1, 4), 1, axis=1)
        assert not (filler == rows[:, None]).any(), "a recording does not stand beside itself"
        drawn += np.bincount(filler.ravel(), minlength=40)
        orders.add(tuple(clips.row.tolist()))
    assert len(orders) == 200 and not drawn[1::2].any()
    assert abs(drawn[::2] - 600).max() < 5 * np.sqrt(600)


def test_one_recording_alone_cannot_be_concatenated():
    with pytest.raises(ValueError, match="one recording alone has no others to stand beside it"):
        concat(index_of([10, 10]), np.array([1]), n=2, position=0, piece_samples=10, seed=0, epoch=0)
    with pytest.raises(ValueError, match="position is 2; wanted 0 to 1, the places among n=2"):
        concat(index_of([10, 10]), np.arange(2), n=2, position=2, piece_samples=10, seed=0, epoch=0)


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 60), st.sampled_from(["reshuffle", "disjoint"]), st.integers(0, 5))
def test_a_stitched_clip_is_one_speaker_end_to_end(recordings, clip_samples, how, epoch):
    lengths, labels = [length for length, _ in recordings], [label for _, label in recordings]
    index = index_of(lengths, labels)
    clips = stitched(index, how=how, clip_samples=clip_samples, epoch=epoch)
    totals = {label: sum(length for length, of in recordings if of == label) for label in labels}
    counts = {label: int((clips.label == label).sum()) for label in totals}
    assert counts == {label: max(1, total // clip_samples) for label, total in totals.items()}
    assert len(set(clips.clip.tolist())) == len(clips)
    for number in range(len(clips)):
        parts = pieces(clips, number)
        assert {labels[row] for row, *_ in parts} == {clips.label[number]}
        at = 0
        for row, start, samples, place in parts:
            assert place == at and 0 < samples <= lengths[row] - start
            at += samples
        assert at == min(clip_samples, totals[int(clips.label[number])]) == clips.sounding[number]
        assert len({row for row, *_ in parts}) == len(parts), "a recording comes once per clip"


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 60))
def test_disjoint_clips_share_no_sample_and_leave_less_than_one_clip_over(recordings, clip_samples):
    index = index_of([length for length, _ in recordings], [label for _, label in recordings])
    clips = stitched(index, how="disjoint", clip_samples=clip_samples)
    heard = [np.zeros(length, int) for length, _ in recordings]
    for row, start, samples in zip(clips.row, clips.start, clips.samples, strict=True):
        heard[row][start : start + samples] += 1
    assert max(map(np.max, heard)) == 1
    for label in {of for _, of in recordings}:
        left = sum(int((one == 0).sum()) for one, (_, of) in zip(heard, recordings, strict=True) if of == label)
        assert left < clip_samples


def test_reshuffled_clips_of_a_speaker_overlap_and_are_one_group():
    index = index_of([100] * 12, [0] * 6 + [1] * 6)
    apart, again = (stitched(index, how=how, clip_samples=200) for how in ("disjoint", "reshuffle"))
    assert len(apart) == len(again) == 6
    assert len(set(apart.row.tolist())) == len(apart.row) and len(set(again.row.tolist())) < len(again.row)
    assert len(set(apart.group)) == 6 and len(set(again.group)) == 2
    with pytest.raises(ValueError, match="stitch is 'cut'; wanted reshuffle or disjoint"):
        stitched(index, how="cut", clip_samples=200)


@pytest.mark.parametrize("how", ["reshuffle", "disjoint"])
def test_orders_are_drawn_by_seed_and_epoch_and_every_order_is_as_likely(how):
    index = index_of([10] * 4)
    at = [
        stitched(index, how=how, clip_samples=40, seed=seed, epoch=epoch).row.tolist() for seed, epoch in ((0, 0),) * 2
    ]
    assert at[0] == at[1]
    first = [stitched(index, how=how, clip_samples=40, epoch=epoch).row.tolist() for epoch in range(2_400)]
    counts = {tuple(order): first.count(order) for order in map(list, set(map(tuple, first)))}
    assert len(counts) == 24 and all(abs(count - 100) < 5 * np.sqrt(100) for count in counts.values())
    told = [stitched(index, how=how, clip_samples=40, seed=seed, epoch=None).row.tolist() for seed in range(3)]
    assert told[0] == told[1] == told[2]


def test_no_rows_make_no_clips():
    index, none = index_of([10, 10]), np.arange(0)
    for clips in (
        single(index, none, clip_samples=5),
        concat(index, none, n=2, position=0, piece_samples=5, seed=0, epoch=None),
        stitched(index, none, how="reshuffle", clip_samples=5),
        stitched(index, none, how="disjoint", clip_samples=5),
    ):
        assert len(clips) == 0 and clips.silence == 0.0 and len(clips.take(none)) == 0


def test_taking_clips_takes_their_pieces():
    clips = stitched(index_of(list(range(1, 30))), how="disjoint", clip_samples=40)
    chosen = np.array([5, 0, 5, len(clips) - 1])
    taken = clips.take(chosen)
    assert [pieces(taken, number) for number in range(4)] == [pieces(clips, int(number)) for number in chosen]
    assert (
        taken.clip.tolist() == clips.clip[chosen].tolist()
        and taken.sounding.tolist() == clips.sounding[chosen].tolist()
    )


def test_the_switches_reach_the_clips():
    words = ConcatSpeechCommands(n=4)
    index, rows = index_of([16_000] * 9), np.arange(9)
    parts = {
        name: words.clips(index, rows, protocol=profile(name), seed=0, epoch=0).parts
        for name in ("authors", "paper", "fair")
    }
    assert parts == {"authors": 1, "paper": 4, "fair": 4}
    speech = LibriSpeech(clip_s=1)
    index = index_of([9_000] * 9)
    overlap = {}
    for name in ("authors", "paper", "fair"):
        clips = speech.clips(index, rows, protocol=profile(name), seed=0, epoch=0)
        spans = [
            (row, sample)
            for row, start, samples in zip(clips.row, clips.start, clips.samples, strict=True)
            for sample in range(start, start + samples, 500)
        ]
        overlap[name] = len(clips.group) != len(set(clips.group)), len(spans)
    assert [overlap[name][0] for name in ("authors", "paper", "fair")] == [True, True, False]


def test_an_epoch_of_85_thousand_clips_of_ten_takes_well_under_a_second():
    count = 85_000
    nothing = np.zeros(count, np.int64)
    names = np.zeros(count, object)
    index = Index(
        recording_id=names, shard=nothing, offset=nothing, samples=nothing + 16_000, label=np.arange(count) % 35,
        speaker=names, fold=nothing, group=names, crc32=nothing, source_sha256=names, padded_samples=nothing,
    )  # fmt: skip
    took = []
    for epoch in range(3):
        began = time.process_time()
        clips = concat(index, np.arange(count), n=10, position=0, piece_samples=16_000, seed=0, epoch=epoch)
        took.append(time.process_time() - began)
    assert len(clips.row) == 850_000 and min(took) < 0.8
