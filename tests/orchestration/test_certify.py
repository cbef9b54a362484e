"""Certificates: what killing a twin shows, and that a drift, a gap and a silent restart do not pass."""

import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from helix.data.shards import Prepared, Recordings, prepare
from helix.gpu.steps import write_noise
from helix.models import scan
from helix.spec import DataSpec, TrialSpec, to_json, trial_id
from helix.storage import FolderStorage, Storage, open_storage
from helix.training.checkpoint import committed
from helix.training.trainer import Fit, fit, row_key, trial_folder
from orchestration import cli, preprocessing
from orchestration.certify import (
    BIT_EXACT,
    DRIFT,
    ON_PURPOSE,
    Pace,
    certificate_table,
    certify,
    compare,
    lost_steps,
    missing_steps,
    moments,
    seconds_to_next_step,
    verdict_line,
)
from orchestration.grid import VARIANTS, Trial
from orchestration.ledger import certificates
from orchestration.twin import AFTER_RESULT, ANY_TIME, START, Attempt, Moment, Order, Twins

PACE = Pace(start_s=2.0, step_s=0.1, whole_s=10.0)

NOISY = """
import sys
import numpy as np
import torch
from helix.models.blocks import mamba
from orchestration import twin

exact = mamba.selective_scan

def noisy(*inputs, **options):
    y_BLE = exact(*inputs, **options)
    return y_BLE + 1e-3 * torch.from_numpy(np.random.default_rng().standard_normal(y_BLE.shape, dtype="float32"))

mamba.selective_scan = noisy
sys.exit(twin.main())
"""


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    with Twins() as started:
        yield started


@pytest.fixture
def trial(tiny_spec: TrialSpec) -> Trial:
    spec = replace(tiny_spec, training=replace(tiny_spec.training, batch_size=12, epochs=3))
    return Trial(variant=VARIANTS[0], spec=spec)


@pytest.fixture
def place(tiny_data: Recordings, tmp_path: Path) -> tuple[Recordings, Storage]:
    """The tiny data in a storage of this test's own."""
    storage = FolderStorage(tmp_path / "own")
    shutil.copytree(tiny_data._storage.root, storage.root)
    return tiny_data, storage


def test_a_twin_that_is_killed_again_and_again_ends_bit_exact(trial, place, twins):
    certificate = certify(trial, *place, grid="demo", kills=8, seed=0, twins=twins)
    assert certificate["verdict"] == BIT_EXACT, verdict_line(certificate)
    assert len(certificate["kills"]) == 8
    assert len({kill["moment"] for kill in certificate["kills"]}) > 3
    assert all(pair["equal"] for pair in certificate["hashes"].values())
    assert {"weights", "optimizer", "best weights", "result", "row 1", "row 2", "row 3"} == set(certificate["hashes"])
    assert certificate["rows"] == {"count": 3, "problems": []}
    assert certificate["restarts_at_step_0"] == 0
    assert certificate["steps"] == 18
    assert certificate["twin_seconds"] > certificate["undisturbed_seconds"]
    storage = place[1]
    assert certificates(storage) == [certificate]
    assert storage.children("certificates") == [f"{certificate['certificate_id']}.json"]
    assert certificate_table(certificate).row_count == 8


def test_a_backend_that_is_not_deterministic_gives_drift_and_keeps_both_runs(trial, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_SCAN", "reference")
    script = tmp_path / "noisy.py"
    script.write_text(NOISY)
    with Twins([sys.executable, str(script)]) as noisy:
        certificate = certify(trial, *place, grid="demo", kills=1, seed=0, twins=noisy)
    assert certificate["verdict"] == DRIFT
    assert certificate["scan"] == "reference"
    assert 0 < certificate["largest_difference"]["weights"] < 10
    assert 0 < certificate["largest_difference"]["rows"] <= 2
    assert not certificate["hashes"]["weights"]["equal"]
    assert "unequal: weights" in verdict_line(certificate)
    kept = place[1].children(f"certificates/{certificate['certificate_id']}")
    assert kept == ["twin", "undisturbed"]


class Forgetful(Twins):
    """Before each attempt somebody loses all checkpoints, and the rows by which a trial would know of them."""

    def run(self, order: Order, **options) -> Attempt:
        storage = FolderStorage(Path(order.storage.removeprefix("file://")))
        for name in storage.children("trials"):
            for lost in ("checkpoints", "metrics"):
                shutil.rmtree(storage.path(f"trials/{name}/{lost}"), ignore_errors=True)
        return super().run(order, **options)


def test_a_twin_that_starts_again_at_step_0_does_not_pass(trial, place):
    with Forgetful() as forgetful:
        certificate = certify(trial, *place, grid="demo", kills=2, seed=3, twins=forgetful)
    assert certificate["restarts_at_step_0"] > 0
    assert certificate["verdict"] == "started again at step 0"
    assert all(pair["equal"] for pair in certificate["hashes"].values())


class Immortal(Twins):
    """Nobody comes to kill."""

    def run(self, order: Order, *, kill_at=None, watch=lambda *_: None) -> Attempt:
        return super().run(order, watch=watch)


def test_a_certificate_without_a_kill_shows_nothing(trial, place):
    with Immortal() as immortal:
        certificate = certify(trial, *place, grid="demo", kills=2, seed=0, twins=immortal)
    assert certificate["kills"] == []
    assert certificate["verdict"].startswith("nothing shown")


def test_no_kills_are_refused(trial, place, twins):
    with pytest.raises(ValueError, match="--kills is 0"):
        certify(trial, *place, grid="demo", kills=0, seed=0, twins=twins)


@pytest.mark.parametrize("kills", [1, 2, 3, 12, 40])
def test_moments_are_drawn_from_the_seed_in_the_order_of_training(kills: int):
    drawn = moments(kills, 7, 50, PACE)
    assert len(drawn) == kills
    assert drawn == moments(kills, 7, 50, PACE)
    assert kills < 3 or drawn != moments(kills, 8, 50, PACE)
    steps = [moment.step for moment in drawn if moment.name != START]
    assert steps == sorted(steps)
    names = [moment.name for moment in drawn]
    assert AFTER_RESULT not in names[:-1]
    assert names.count(ANY_TIME) >= kills // 2
    assert all(0 <= moment.delay_s <= 2.0 for moment in drawn)


def test_enough_kills_meet_every_moment():
    met = {moment.name for seed in range(3) for moment in moments(20, seed, 50, PACE)}
    assert met == {*ON_PURPOSE, AFTER_RESULT, ANY_TIME}


def attempt(from_step: int | None, *steps: tuple[int, float], ended: float = 0.0) -> Attempt:
    return Attempt(began=0.0, from_step=from_step, steps=list(steps), ended=ended)


def test_a_lost_step_is_one_that_was_trained_again():
    begun_only = attempt(None, ended=6.0)
    attempts = [attempt(0, (1, 1.0), (2, 2.0), (3, 3.0), ended=4.0), begun_only, attempt(1, (2, 8.0), (3, 9.0))]
    assert lost_steps(attempts) == [2, 0, 0]
    assert seconds_to_next_step(attempts) == [4.0, 2.0, None]
    assert missing_steps(attempts, 3) == []
    assert missing_steps(attempts, 5) == [4, 5]


@pytest.fixture
def pair(tiny_spec, tiny_data, tmp_path) -> tuple[Storage, Storage, str]:
    """What a trial left, and a copy of it."""
    spec = replace(tiny_spec, training=replace(tiny_spec.training, epochs=2))
    one, other = FolderStorage(tmp_path / "one"), FolderStorage(tmp_path / "other")
    fit(spec, tiny_data, Fit(storage=one))
    shutil.copytree(one.root, other.root)
    return one, other, trial_id(spec, tiny_data.manifest_sha256)


def test_the_clock_is_no_difference(pair):
    one, other, name = pair
    row = other.get_json(row_key(name, 1))
    other.put_json(row_key(name, 1), row | {"seconds": 1e9, "time": 0.0})
    assert compare(one, other, name)["verdict"] == BIT_EXACT


def test_a_missing_row_and_one_too_many_are_seen(pair):
    one, other, name = pair
    row = other.get_json(row_key(name, 2))
    other.put_json(row_key(name, 3), row)
    assert compare(one, other, name)["verdict"] == "incomplete rows"
    other.delete(row_key(name, 3))
    other.delete(row_key(name, 1))
    compared = compare(one, other, name)
    assert compared["verdict"] == "incomplete rows"
    assert any("epochs [2]" in problem for problem in compared["rows"]["problems"])


def test_steps_that_are_not_in_a_row_are_seen(pair):
    one, other, name = pair
    row = other.get_json(row_key(name, 2))
    other.put_json(row_key(name, 2), row | {"train_losses": row["train_losses"][1:]})
    assert any("ends at step" in problem for problem in compare(one, other, name)["rows"]["problems"])


def test_a_number_of_a_row_that_differs_is_measured(pair):
    one, other, name = pair
    row = other.get_json(row_key(name, 2))
    other.put_json(row_key(name, 2), row | {"test_loss": row["test_loss"] * 2})
    compared = compare(one, other, name)
    assert compared["verdict"] == DRIFT
    assert compared["largest_difference"] == {"weights": 0.0, "rows": 0.5}


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_one_changed_number_of_the_state_is_drift(pair, what):
    one, other, name = pair
    prefix = f"trials/{name}/checkpoints"
    key = f"{prefix}/{committed(other, prefix)[-1]}/{what}.safetensors"
    tensors = load(other.get(key))
    changed = max(tensors, key=lambda name: tensors[name].numel())
    flat = tensors[changed].view(-1)
    flat[0] = math.nextafter(flat[0].item(), math.inf) + 1e-3
    other.put(key, save(tensors))
    compared = compare(one, other, name)
    assert compared["verdict"] == DRIFT
    assert [name for name, hashes in compared["hashes"].items() if not hashes["equal"]] == [
        {"model": "weights", "optimizer": "optimizer"}[what]
    ]
    assert (compared["largest_difference"]["weights"] > 0) == (what == "model")


def test_the_command_makes_a_certificate_and_the_report_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    small = ["data.options.clips_per_class=16", "training.epochs=2", "--storage", str(tmp_path / "runs")]
    assert cli.main(["certify", "--grid", "demo", "--variant", "mamba-mel", "--kills", "2", *small]) == 0
    said = capsys.readouterr().out
    assert "bit-exact: 2 of 2 kills landed" in said
    assert cli.main(["report", "--grid", "demo", "--variants", "mamba-mel", *small]) == 1  # nothing is trained
    page = (tmp_path / "runs" / "reports" / "demo.html").read_text()
    assert "bit-exact" in page.partition("<h2>Certificate</h2>")[2]
    assert "other settings or data" not in page


def test_what_cannot_be_certified_is_refused_before_anything_is_run(tmp_path, capsys):
    at = ["--storage", str(tmp_path / "runs")]
    assert cli.main(["certify", "--grid", "demo", "--kills", "0", "data.options.clips_per_class=16", *at]) == 2
    assert cli.main(["certify", "--grid", "demo", "--variant", "mamba-smell", *at]) == 2
    assert cli.main(["certify", "--grid", "demo", "--fold", "9", *at]) == 2
    assert cli.main(["certify", "--grid", "demo", "training.epocs=3", *at]) == 2
    assert not (tmp_path / "runs" / "certificates").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--kills", "100000"], "--kills is 100000; wanted 1 to 1000"),
        (["--threads", "0"], "--threads is 0; wanted 1 or more"),
        (["--scan", "abacus"], "scan backend 'abacus' cannot scan torch.float32 on cpu"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_no_machine_can_do_is_refused_before_any_data_is_prepared(asked, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "prepared_data", lambda *_, **__: pytest.fail("it was not refused"))
    assert cli.main(["certify", "--grid", "demo", *asked, "--storage", str(tmp_path / "runs")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def certificate_commands() -> list[str]:
    text = (Path(__file__).parents[2] / "BENCHMARKS.md").read_text()
    return re.findall(r"`helix (certify [^`]*)`", text.partition("## On a GPU")[2])


@pytest.mark.parametrize("command", certificate_commands())
def test_the_commands_of_the_benchmarks_reach_the_first_run_from_a_part_of_esc50(
    command, tmp_path, monkeypatch, capsys
):
    write_noise(tmp_path / "ESC-50-master", 40)
    monkeypatch.chdir(tmp_path)
    # Without Ray; the scan and the device are of a GPU.
    monkeypatch.setattr(preprocessing, "prepare_with_ray", prepared_here)
    given = command.replace("--device cuda", "--device cpu").replace("--scan mamba_ssm", "")
    reached = []

    def certified(trial: Trial, recordings: Recordings, *_, **how) -> None:
        reached.append((trial, recordings, how["kills"]))
        raise RuntimeError("far enough")

    monkeypatch.setattr(cli, "certify", certified)
    assert cli.main([*shlex.split(given), "--storage", "runs"]) == 2
    assert "far enough" in capsys.readouterr().err
    ((trial, recordings, kills),) = reached
    assert trial.spec.protocol.profile == "authors" and trial.spec.training.epochs == 10
    assert len(recordings) == 40 and kills == 12


def test_the_benchmarks_have_a_certificate_of_each_scan():
    assert ["--scan mamba_ssm" in command for command in certificate_commands()] == [False, True]


def prepared_here(data: DataSpec, *, source: Path, storage: Storage, allow_partial: bool, **_) -> Prepared:
    return prepare(data.dataset, data.options, source=source, storage=storage, allow_partial=allow_partial)


class Listening(Twins):
    """Runs nothing and keeps what it was asked to run."""

    def run(self, order: Order, **_) -> Attempt:
        self.order = order
        raise RuntimeError("only listening")


@pytest.mark.parametrize(
    ("named", "deterministic"), [("auto", True), ("triton", True), ("reference", True), ("mamba_ssm", False)]
)
def test_on_cuda_both_runs_give_the_same_bits_unless_a_scan_is_named_that_drifts(
    named, deterministic, trial, place, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("HELIX_SCAN", named)
    monkeypatch.setattr(scan, "_is_there", lambda _: True)
    listening = object.__new__(Listening)
    with pytest.raises(RuntimeError, match="only listening"):
        certify(trial, *place, grid="demo", kills=1, seed=0, twins=listening, device="cuda")
    assert listening.order.deterministic is deterministic


def test_an_attempt_that_is_to_give_the_same_bits_says_so_in_its_environment(trial, place, twins):
    recordings, storage = place
    order = Order(
        spec=to_json(trial.spec),
        source=repr(storage),
        data=recordings.prepared.prefix,
        storage=f"{storage!r}/same",
        deterministic=True,
    )
    assert twins.run(order).status == 0
    name = trial_id(trial.spec, recordings.manifest_sha256)
    result = open_storage(order.storage).get_json(f"{trial_folder(name)}/result.json")
    assert [line.split(", ")[2] for line in result["environments"]] == ["deterministic"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_twin_that_is_killed_ends_bit_exact(trial, place, twins):
    certificate = certify(trial, *place, grid="demo", kills=4, seed=0, twins=twins, device="cuda")
    assert certificate["verdict"] == BIT_EXACT, verdict_line(certificate)
    assert certificate["scan"] == "triton"


def test_a_moment_that_does_not_come_any_more_is_replaced_by_the_last_one(trial, place, twins):
    recordings, storage = place
    certificate = certify(trial, recordings, storage, grid="demo", kills=1, seed=0, twins=twins)
    order = Order(
        spec=certificate["spec"],
        source=repr(storage),
        data=recordings.prepared.prefix,
        storage=f"{storage!r}/late",
        steps=18,
    )
    late = twins.run(order, kill_at=Moment(name=ANY_TIME, step=99))
    assert late.killed
    assert late.met == ("before the result is put", 18)
