"""The commands on what is stored: a report tells what was asked last, leaves nothing stale, and survives damage."""

import shutil
from pathlib import Path

import pytest

from dashboards.report import report_tables
from dashboards.tables import TABLES_KEPT
from helix.data.shards import Recordings
from helix.storage import FolderStorage, Storage, open_storage
from orchestration import cli, status
from orchestration.asked import Asked, put_asked
from orchestration.options import report_parser, sweep_parser
from orchestration.plan import Snapshot
from orchestration.tracking import Tracker
from orchestration.tracking_place import tracking_uri
from orchestration.worker import run_trial
from tests.orchestration.test_tracking import runs

OTHER = ("--variants", "mamba-mel", "--folds", "1", "data.options.clips_per_class=16")


@pytest.fixture
def demo(tiny_sweep: Snapshot, tiny_data: Recordings, storage: Storage, initialised: Path, monkeypatch) -> Snapshot:
    """A sweep of two variants on two folds that is done, under the name of a grid that asks for something else."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage.put("mlflow.db", initialised.read_bytes())
    tiny_sweep.grid_name = "demo"
    put_asked(storage, tiny_sweep.asked)
    for entry in tiny_sweep.plan:
        run_trial(entry.trial.spec, tiny_data, storage, sweep_id="s1")
    return tiny_sweep


def report(storage: Storage, *arguments: str) -> int:
    return cli.main(["report", "--grid", "demo", "--storage", repr(storage), *arguments])


def kept(storage: FolderStorage) -> set[str]:
    return {path.name for path in (storage.root / "reports" / "demo").iterdir()}


def named(snapshot: Snapshot) -> set[str]:
    return {f"{table.name}.{ending}" for table in report_tables(snapshot()) for ending in ("csv", "md", "tex")}


def test_a_report_is_of_what_was_asked_last_and_options_ask_for_something_else(
    demo: Snapshot, storage: FolderStorage, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(storage.root / "data")  # a report needs none
    assert report(storage) == 0
    page = (storage.root / "reports" / "demo.html").read_text()
    assert "Does it replay?" in page
    assert kept(storage) == named(demo) | {TABLES_KEPT}
    assert status.main(["--storage", repr(storage)]) == 0
    capsys.readouterr()
    assert report(storage, *OTHER) == 1, "what these options ask for was never trained"
    assert "1 of 1 trials are not done" in capsys.readouterr().out
    assert report(storage) == 0, "a report asks nothing of the grid"
    assert kept(storage) == named(demo) | {TABLES_KEPT}


def test_a_report_of_a_grid_that_nothing_was_asked_of_is_that_of_its_file(
    demo: Snapshot, storage: FolderStorage, capsys: pytest.CaptureFixture[str]
):
    storage.delete("grids/demo/plan.json")
    assert report(storage) == 1
    trials = 6 * 2
    assert f"{trials} of {trials} trials are not done" in capsys.readouterr().out
    assert cli.main(["report", "--grid", "nope", "--storage", repr(storage)]) == 2
    assert "unknown grid 'nope'" in capsys.readouterr().err
    storage.put("grids/demo/plan.json", b"{")
    assert report(storage) == 2
    assert "grids/demo/plan.json: is not JSON" in capsys.readouterr().err


def test_a_report_of_what_no_sweep_was_asked_of_is_refused_and_makes_no_storage(
    demo: Snapshot, storage: FolderStorage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for options in ((), OTHER):
        assert cli.main(["report", "--grid", "demo", "--storage", str(tmp_path / "mistyped"), *options]) == 2
        assert f"refused: nothing of a sweep is stored in file://{tmp_path}/mistyped;" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()
    before = sorted(storage.root.rglob("*"))
    assert cli.main(["report", "--grid", "esc50", "--storage", repr(storage)]) == 2
    assert "refused: no sweep of 'esc50' is stored in" in capsys.readouterr().err
    assert sorted(storage.root.rglob("*")) == before


def test_the_help_of_a_report_shows_what_it_takes_and_only_that(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--published", "--from-mlflow", "--tracking-uri", "--out", "--grid", "--folds", "--storage"):
        assert option in shown
    for option in ("--budget-usd", "--ranks", "--workers", "--deadline", "--threads", "--device", "--dry-run"):
        assert option not in shown
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", "--grid", "demo", option, "1"])
    helped = {action.dest for action in report_parser()._actions}
    assert helped <= {action.dest for action in sweep_parser()._actions}, "a sweep plans what a report asks for"


def test_a_report_says_which_command_trains_what_is_not_done_and_that_what_failed_fails_again(
    demo: Snapshot, tiny_data: Recordings, storage: FolderStorage, capsys: pytest.CaptureFixture[str]
):
    def stop(row: object) -> None:
        raise ValueError("stop here")

    def told() -> str:
        assert report(storage) == 1
        return next(line for line in capsys.readouterr().out.splitlines() if "are not done" in line)

    first, second = demo.plan[:2]
    storage.delete_folder(f"trials/{first.trial_id}")
    assert told() == "1 of 4 trials are not done; the sweep's command (test) goes on with them"
    storage.delete_folder(f"trials/{second.trial_id}")
    run_trial(second.trial.spec, tiny_data, storage, sweep_id="s2", on_epoch=stop)
    end = "what failed fails the same way unless something is changed first"
    assert (
        told() == "2 of 4 trials are not done; the sweep's command (test) tries the 1 that failed again "
        f"and goes on with the others; {end}"
    )
    run_trial(first.trial.spec, tiny_data, storage, sweep_id="s3")
    assert told() == f"1 of 4 trials are not done; the sweep's command (test) tries them again; {end}"


def test_tables_that_are_no_part_of_a_report_any_more_go_and_those_of_others_stay(
    demo: Snapshot, storage: FolderStorage
):
    folder = storage.root / "reports" / "demo"
    assert report(storage) == 0
    whole = kept(storage)
    assert any(name.startswith("confusion-") for name in whole)
    changed = next(name for name in sorted(whole) if name.startswith("classes-") and name.endswith(".csv"))
    (folder / changed).write_text("I wrote notes into this one\n")
    for name in ("confusion-mine.csv", "notes.txt"):
        (folder / name).write_text("mine\n")
    assert report(storage, *OTHER) == 1
    of_results = ("confusion-", "classes-", "statistics-")
    assert kept(storage) == {name for name in whole if not name.startswith(of_results)} | {
        "confusion-mine.csv",
        "notes.txt",
        changed,
    }
    assert (folder / changed).read_text() == "I wrote notes into this one\n"
    assert report(storage) == 0
    assert whole <= kept(storage) and (folder / changed).read_text() != "I wrote notes into this one\n"
    (folder / TABLES_KEPT).write_text('{"../demo.html": "", "notes.txt": 3, "a\\\\b.csv": ""}')
    assert report(storage) == 0
    assert (folder / "notes.txt").exists() and (storage.root / "reports" / "demo.html").exists()
    (folder / TABLES_KEPT).write_text("[")
    assert report(storage) == 0


@pytest.mark.service
def test_tables_that_are_stale_go_from_a_bucket_too(
    demo: Snapshot, storage: FolderStorage, s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket = open_storage(s3_address)
    for key in list(storage.keys("trials")) + list(storage.keys("grids")):
        bucket.put(key, storage.get(key))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(storage))
    for place in ("here", "another-machine"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert report(bucket) == 0
    before = set(bucket.children("reports/demo"))
    assert before == named(demo) | {TABLES_KEPT}
    bucket.put("reports/demo/notes.csv", b"mine")
    monkeypatch.chdir(tmp_path / "another-machine")
    left = Asked(**{**vars(demo.asked), "trials": demo.asked.trials[:1]})
    put_asked(bucket, Asked(**{**vars(left), "data": ()}))
    for key in list(bucket.keys("trials")):
        bucket.delete(key)
    assert report(bucket) == 1
    after = set(bucket.children("reports/demo"))
    assert after < before | {"notes.csv"} and "notes.csv" in after
    assert after - {"notes.csv"} == {path.name for path in Path("runs/reports/demo").iterdir()}
    assert not any(name.startswith("confusion-") for name in after)


def test_a_result_that_was_changed_is_in_no_table_no_report_and_no_mean(
    demo: Snapshot, storage: FolderStorage, capsys: pytest.CaptureFixture[str]
):
    broken = demo.plan[0].trial_id
    key = f"trials/{broken}/result.json"
    whole = storage.get_json(key)
    storage.put_json(key, whole | {"accuracy": {"best_test": 0.99, "last": 0.99, "validation": 0.99}})
    assert report(storage) == 1
    told = capsys.readouterr().out
    assert f"damaged: {key}: does not match its own checksum" in told and "1 of 4 trials are not done" in told
    page = (storage.root / "reports" / "demo.html").read_text()
    assert f"Damaged where it is stored, and not counted: {key}" in page
    assert "99.0" not in (storage.root / "reports" / "demo" / "trials.csv").read_text()
    cells = {cell.info.run_name: cell.data.metrics for cell in runs(storage)["cell"]}
    assert sorted(metrics["n"] for metrics in cells.values()) == [1, 2]
    assert all(metrics["best_test_accuracy"] < 99 for metrics in cells.values())
    storage.put_json(key, whole)
    assert report(storage) == 0
    assert [cell.data.metrics["n"] for cell in runs(storage)["cell"]] == [2, 2]


def test_files_of_others_among_the_trials_hold_up_no_report_and_no_replay(demo: Snapshot, storage: FolderStorage):
    first = storage.root / "trials" / demo.plan[0].trial_id
    for folder in (storage.root / "trials", first, first / "metrics", first / "attempts", storage.root / "grids"):
        (folder / ".DS_Store").write_bytes(b"\x00\x01Bud1")
    (storage.root / "trials" / "my notes").mkdir()
    storage.put_json(f"trials/{'0' * 16}/spec.json", {})
    storage.put(f"trials/{'1' * 16}/spec.json", b"{")
    Tracker(storage).replay(demo())
    assert len(runs(storage)["trial"]) == 4
    assert report(storage) == 0
