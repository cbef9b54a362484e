"""`helix status`: how sweeps stand from storage alone: half-way, failed, silent or done; few requests, and no write."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dashboards.text import GAP
from helix.loopback import FaultProxy
from helix.storage import FolderStorage, Storage, open_storage, sealed
from orchestration import cli, status
from orchestration.asked import DriverRecord, put_asked
from orchestration.ledger import SILENCE_S
from orchestration.status import RECENT_ROWS, Standing
from tests.orchestration.test_asked import asked

ROOT = Path(__file__).parents[2]
NOW = 1_774_180_800.0  # 2026-03-22 12:00 UTC
EPOCHS = 8


@pytest.fixture(autouse=True)
def noon(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ray") is None:
        monkeypatch.setattr(status.Standing.__init__, "__kwdefaults__", {"prices": None, "clock": lambda: NOW})


def row(epoch: int) -> dict[str, Any]:
    accuracy = 0.5 if epoch == 2 else 0.3 + 0.001 * epoch
    return {"epoch": epoch, "step": 13 * epoch, "test_accuracy": accuracy, "seconds": 10.0, "time": NOW}


def attempt(number: int = 1, **said: Any) -> dict[str, Any]:
    spent = {"started": NOW - 3600, "instance_type": "g5.xlarge", "market": "spot", "gpus": 1.0, "share": 1.0}
    return {"attempt_id": str(number), "sweep_id": "s1", "host": "node-7", **spent, **said}


def files(stands: str, epochs: int = 3) -> dict[str, Any]:
    """What a trial that stands so has in storage, below its folder."""
    rows = {f"metrics/epoch-{epoch:04d}.json": row(epoch) for epoch in range(1, epochs + 1)}
    best = {"best/manifest.json": {"body": {"epoch": 2, "metric": "test_accuracy", "value": 0.5}, "sha256": "?"}}
    beat = {"heartbeat.json": {"attempt_id": "1", "step": 13 * epochs, "time": NOW - 1}}
    ended = {"ended": NOW - 60, "step": 13 * epochs, "kept_step": 13 * epochs, "from_step": 0}
    done = {"rows": [row(epoch) for epoch in range(1, EPOCHS + 1)], "accuracy": {"best_test": 0.5, "last": 0.308}}
    table: dict[str, dict[str, Any]] = {
        "missing": {},
        "running": {**rows, **best, **beat, "attempts/1.json": attempt()},
        "silent": {
            **rows,
            "attempts/1.json": attempt(),
            "heartbeat.json": {"attempt_id": "1", "step": 40, "time": NOW - 2 * SILENCE_S},
        },
        "failed": {
            **rows,
            **best,
            "attempts/1.json": attempt(outcome="failed", error="OSError: no space\nmore", **ended),
        },
        "done": {
            "result.json": sealed({**done, "finished": NOW - 60, "train_seconds": 80.0}),
            "attempts/1.json": attempt(outcome="done", ended=NOW - 60),
        },
    }
    return table[stands]


def fill(storage: Storage, stands: Callable[[int], str], *, epochs: int = 3, **size: range) -> int:
    """A sweep whose trial number n stands as `stands(n)` says. Returns how many trials it has."""
    plan = asked(**size)
    put_asked(storage, plan)
    found = [
        (f"trials/{one.trial_id}/{name}", value)
        for number, one in enumerate(plan.trials)
        for name, value in files(stands(number), epochs).items()
    ]
    with ThreadPoolExecutor(16) as writers:
        list(writers.map(lambda item: storage.put_json(*item), found))
    return len(plan.trials)


def said(capsys: pytest.CaptureFixture[str], storage: Storage, *arguments: str) -> tuple[int, list[str]]:
    code = cli.main(["status", "--storage", repr(storage), *arguments])
    told = capsys.readouterr()
    return code, (told.out + told.err).splitlines()


def tree(storage: FolderStorage) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in storage.root.rglob("*")}


def test_a_sweep_half_way_is_told_trial_by_trial_and_nothing_is_written(storage: FolderStorage, capsys):
    fill(storage, lambda number: ("done", "running", "silent", "failed", "missing")[number % 5])
    DriverRecord(storage, "demo", "s1", clock=lambda: NOW - 3).say(waiting="waiting for a GPU: 1 of 2 nodes started")
    before = tree(storage)
    code, lines = said(capsys, storage)
    assert tree(storage) == before
    assert code == status.UNFINISHED
    assert lines[0] == "demo, profile paper: 12 trials; 3 done, 3 running, 2 failed, 2 paused, 2 waiting"
    assert lines[1].startswith("45/96 epochs, ETA about ")
    assert lines[2] == "3 workers active"
    assert lines[3].startswith("cost so far: ") and "$" in lines[3]
    assert lines[4] == "waiting for a GPU: 1 of 2 nodes started"
    assert len(lines) == 5 + 12
    told = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines[5:]}
    assert told["mamba-raw fold 1 seed 0"] == (
        "done, epoch 8 of 8, best test accuracy 50.0 %, 10.0 s an epoch (1.30 steps/s)"
    )
    assert told["mamba-mel fold 1 seed 0"] == (
        "running, epoch 3 of 8, best test accuracy 50.0 %, 10.0 s an epoch (1.30 steps/s), 50 s left, on node-7"
    )
    assert told["helix-raw fold 1 seed 0"].endswith("silent since 2026-03-22 11:58 UTC on node-7")
    assert told["helix-mel fold 1 seed 0"].endswith("OSError: no space")
    assert told["attention-raw fold 1 seed 0"] == "waiting"


def test_one_fold_that_is_done_is_exit_code_0(storage: Storage, capsys):
    fill(storage, lambda _: "done", folds=range(1, 2))
    code, lines = said(capsys, storage, "--grid", "demo")
    assert code == 0
    assert lines[0].endswith("6 trials; 6 done")
    assert lines[1] == "48/48 epochs, all done"


@pytest.mark.parametrize("stands", ["missing", "failed", "silent"])
def test_without_a_driver_it_says_that_none_runs_and_what_to_do(storage: Storage, capsys, stands: str):
    fill(storage, lambda _: stands)
    assert any(
        line == "no sweep of demo runs. The same command goes on: python orchestration/sweep.py --grid demo"
        for line in said(capsys, storage)[1]
    )
    record = DriverRecord(storage, "demo", "s1", clock=lambda: NOW - 600)
    record.say()
    assert "no sweep of demo runs; the last one is silent since 10 min 00 s" in "".join(said(capsys, storage)[1])
    record.say(stopped="the budget is spent ($20.01 of $20.00)")
    record.end()
    text = "".join(said(capsys, storage)[1])
    assert "no sweep of demo runs; the last one ended 10 min 00 s ago (the budget is spent" in text


def test_a_driver_that_is_there_says_that_the_rest_waits_for_a_worker(storage: Storage, capsys):
    fill(storage, lambda number: "running" if number < 2 else "missing")
    DriverRecord(storage, "demo", "s1", clock=lambda: NOW).say()
    assert "waiting for a free worker" in said(capsys, storage)[1]


def test_what_is_not_there_is_refused_in_clear_words(storage: Storage, capsys):
    code, lines = said(capsys, storage)
    assert code == status.REFUSED
    assert lines[0].startswith("refused: nothing of a sweep is stored in file://")
    storage.put_json("trials/0123456789abcdef/spec.json", {})
    assert "holds trials, but not what was asked for" in said(capsys, storage)[1][0]
    fill(storage, lambda _: "missing")
    code, lines = said(capsys, storage, "--grid", "demo", "esc50")
    assert (code, len(lines)) == (status.REFUSED, 1)
    assert lines[0].startswith("refused: no sweep of 'esc50' is stored in file://")
    assert lines[0].endswith("; stored: demo")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--storage", "ftp://h/x"], "is not supported"),
        (["--every", "0"], "--every is 0.0; wanted a positive number of seconds"),
        (["--watch", "--json"], "leave out --watch"),
        (["--prices", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], wanted: str, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status.main(arguments) == status.REFUSED
    assert wanted in capsys.readouterr().err


def test_json_says_the_same_of_every_grid(storage: Storage, capsys):
    fill(storage, lambda number: "running" if number == 0 else "missing")
    put_asked(storage, replace(asked(), grid="another"))
    code = cli.main(["status", "--storage", repr(storage), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert code == status.UNFINISHED
    assert [value["grid"] for value in values] == ["another", "demo"]
    trial = values[1]["trials"][0]
    assert (trial["status"], trial["epochs_done"], trial["best_test_accuracy"]) == ("running", 3, 0.5)
    assert (trial["eta_seconds"], trial["host"]) == (50.0, "node-7")
    assert values[1]["cost"]["usd"] == pytest.approx(0.4, rel=1e-3)


def test_what_has_no_price_is_not_told_to_be_free(storage: Storage, capsys):
    fill(storage, lambda number: "running" if number < 2 else "missing")
    unknown, priced, not_begun = (one.trial_id for one in asked().trials[:3])
    storage.put_json(f"trials/{unknown}/attempts/1.json", attempt(instance_type="a laptop", market=None))

    def costs() -> tuple[dict[str, Any], dict[str, Any]]:
        assert cli.main(["status", "--storage", repr(storage), "--json"]) == status.UNFINISHED
        (value,) = json.loads(capsys.readouterr().out)
        return value["cost"], {trial["trial_id"]: (trial["usd"], trial["unpriced_hours"]) for trial in value["trials"]}

    cost, trials = costs()
    assert trials[unknown] == (None, pytest.approx(1.0, rel=1e-3))
    assert trials[priced] == (pytest.approx(0.4, rel=1e-3), 0.0)
    assert trials[not_begun] == (0.0, 0.0), "what was never begun did cost nothing"
    assert (cost["usd"], cost["unpriced_hours"]) == (trials[priced][0], trials[unknown][1])
    storage.put_json(f"trials/{priced}/attempts/1.json", attempt(instance_type=None, market=None))
    assert (costs()[0]["usd"], costs()[0]["lost_usd"]) == (None, None)


def test_only_the_last_rows_are_read_and_show_what_all_would(storage: Storage):
    fill(storage, lambda number: "running" if number == 0 else "missing", epochs=7)
    few = Standing(storage, "demo")()
    trial = few.cells[0].trials[0]
    assert len(trial.state.rows) == RECENT_ROWS
    storage.put_json(f"trials/{trial.trial_id}/best/manifest.json", {"body": {"metric": "validation_accuracy"}})
    whole = Standing(storage, "demo")().cells[0].trials[0]
    assert len(whole.state.rows) == 7
    for name in ("status", "epochs_done", "step", "heard", "attempts"):
        assert getattr(whole.state, name) == getattr(trial.state, name)
    assert max(one["test_accuracy"] for one in whole.state.rows) == trial.state.best


def test_a_terminal_shows_variants_by_folds(storage: Storage):
    fill(storage, lambda number: ("done", "running", "failed", "missing")[number % 4])
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=90)
    status.show(Standing(storage, "demo")(), console)
    assert isinstance(console.file, StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["variant", "fold", "1", "fold", "2"] in lines
    assert ["mamba-raw", "50.0", "✗3/8"] in lines
    assert ["mamba-mel", "▸3/8", "·"] in lines
    assert ["helix-raw", "1", "failed", "3/8", "30.3", "50.0", "10.0", GAP] in lines


def test_a_price_table_of_ones_own_replaces_that_of_the_sweep(storage: Storage, capsys, tmp_path: Path):
    fill(storage, lambda _: "done")
    table = tmp_path / "prices.yaml"
    table.write_text("prices: {g5.xlarge: {spot_usd_per_hour: 4.0}}")
    costs = []
    for arguments in ([], ["--prices", str(table)]):
        assert cli.main(["status", "--storage", repr(storage), "--json", *arguments]) == 0
        costs.append(json.loads(capsys.readouterr().out)[0]["cost"]["usd"])
    assert costs[1] == pytest.approx(10 * costs[0])


def test_watching_ends_when_the_sweep_does(storage: Storage, capsys, monkeypatch: pytest.MonkeyPatch):
    fill(storage, lambda number: "running" if number == 0 else "done")
    looks = []

    def finish(self: Standing) -> Any:
        looks.append(1)
        if len(looks) == 3:
            name = asked().trials[0].trial_id
            storage.put_json(f"trials/{name}/result.json", files("done")["result.json"])
        return look(self)

    look = Standing.__call__
    monkeypatch.setattr(Standing, "__call__", finish)
    assert status.main(["--storage", repr(storage), "--watch", "--every", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: 12 trials; 11 done, 1 running"
    assert lines[-1] == "demo: all 12 trials done"


@pytest.mark.service
def test_two_hundred_trials_in_a_bucket_take_few_requests_and_a_second_look_fewer(
    fault_proxy: FaultProxy, s3_address: str
):
    bucket = open_storage(s3_address)
    # 6 variants x 4 folds x 9 seeds: 216 trials, 120 done, 12 at epoch 60, 4 failed, 80 not begun.
    kinds = ["done"] * 120 + ["running"] * 12 + ["failed"] * 4 + ["missing"] * 80
    assert fill(bucket, kinds.__getitem__, epochs=60, folds=range(1, 5), seeds=range(9)) == 216
    DriverRecord(bucket, "demo", "s1", clock=lambda: NOW).say()
    fault_proxy.requests.clear()
    standing = Standing(open_storage(s3_address), "demo")
    view = standing()
    first = len(fault_proxy.requests)
    assert {method for method, _ in fault_proxy.requests} == {"GET"}
    statuses = Counter(trial.state.status for _, trial in view.trials())
    assert statuses == {"done": 120, "running": 12, "failed": 4, "missing": 80}
    # Plan, driver and two listings; a listing for each that was begun; of those that are done result and attempt; of
    # the others the last rows, the manifest of the best weights, the attempt, and where one runs its heartbeat.
    assert first == 4 + 136 + 120 * 2 + 12 * (RECENT_ROWS + 3) + 4 * (RECENT_ROWS + 2)
    fault_proxy.requests.clear()
    standing()
    # What is done is not asked again; of the others whether anything is new, and who works on them.
    assert len(fault_proxy.requests) <= 4 + 16 + 12 * 2 + 4


@pytest.mark.ray
def test_a_sweep_that_runs_is_seen_from_its_storage_alone(tmp_path: Path, capsys):
    storage = FolderStorage(tmp_path / "storage")
    small = ("--grid", "demo", "--variants", "mamba-mel,attention-mel", "--folds", "1", "--workers", "1")
    command = [sys.executable, str(ROOT / "orchestration" / "sweep.py"), *small, "training.epochs=3"]
    sweep = subprocess.Popen(
        [*command, "data.options.clips_per_class=24", "--storage", str(storage.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    seen: dict[str, Any] = {}
    try:
        while sweep.poll() is None:
            code = status.main(["--json", "--storage", str(storage.root)])
            told = capsys.readouterr().out
            if code == status.REFUSED:  # not planned yet
                time.sleep(0.2)
                continue
            (value,) = json.loads(told)
            for trial in value["trials"]:
                seen[f"{trial['variant']} {trial['status']}"] = (code, value["waiting"])
            time.sleep(0.2)
        assert sweep.wait() == 0, sweep.stdout and sweep.stdout.read()
    finally:
        sweep.kill()
        sweep.wait()
    assert {"mamba-mel missing", "mamba-mel running", "attention-mel missing"} <= seen.keys()
    assert seen["mamba-mel running"][0] == status.UNFINISHED
    # One worker: while one trial runs, the other waits for it.
    assert "waiting for a free worker" in {waiting for _, waiting in seen.values()}
    assert status.main(["--storage", str(storage.root)]) == 0
    assert "2 trials; 2 done" in capsys.readouterr().out
    (driver,) = storage.keys("grids/demo/drivers")
    assert "ended" in storage.get_json(driver)


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    """Damage that leaves JSON: these fields are other ones; None takes a field away."""

    def change(data: bytes) -> bytes:
        value = json.loads(data)
        value |= fields
        return json.dumps({name: one for name, one in value.items() if one is not None}).encode()

    return change


#: (which trial, which of its files, what becomes of it) -> what is said of it, and how the trial is shown then.
DAMAGE: dict[str, tuple[str, str, Callable[[bytes], bytes], str, str]] = {
    "cut result": ("done", "result.json", lambda data: data[:100], "is not JSON", "failed"),
    "no bytes": ("done", "result.json", lambda _: b"", "is not JSON", "failed"),
    "changed result": ("done", "result.json", changed(accuracy={"last": 0.99}), "its own checksum", "failed"),
    "changed result without its seal": (
        "done",
        "result.json",
        changed(accuracy={"last": 0.99}, sha256=None),
        "its own checksum",
        "failed",
    ),
    "attempt that is a list": ("running", "attempts/1.json", lambda _: b"[]", "no JSON object but list", "paused"),
    "no start": ("running", "attempts/1.json", changed(started=None), "has no started", "paused"),
    "end that is a text": ("failed", "attempts/1.json", changed(ended="yes"), "has 'yes' for ended", "paused"),
    "start that is no number": (
        "running",
        "attempts/1.json",
        changed(started=float("nan")),
        "has nan for started",
        "paused",
    ),
    "row without seconds": ("running", "metrics/epoch-0003.json", changed(seconds=None), "has no seconds", "running"),
    "seconds that are a text": (
        "running",
        "metrics/epoch-0003.json",
        changed(seconds="x"),
        "has 'x' for seconds, wanted a finite number",
        "running",
    ),
    "accuracy that is a text": (
        "silent",
        "metrics/epoch-0001.json",
        changed(test_accuracy="y"),
        "has 'y' for test_accuracy, wanted a fraction",
        "paused",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_named_and_all_the_rest_is_shown(storage: Storage, capsys, case: str):
    stands, name, damage, reason, word = DAMAGE[case]
    kinds = ("done", "running", "silent", "failed", "missing")
    fill(storage, lambda number: kinds[number % 5])
    whole = said(capsys, storage)[1]
    one = asked().trials[kinds.index(stands)]
    key = f"trials/{one.trial_id}/{name}"
    storage.put(key, damage(storage.get(key)))
    code, lines = said(capsys, storage)
    assert code == status.DAMAGED
    (named,) = [line for line in lines if line.startswith("damaged: ")]
    assert named.startswith(f"damaged: {key}: ") and reason in named
    assert "helix verify" in lines[-1]
    label = f"{one.variant} fold {one.spec.data.fold} seed {one.spec.seed}: "
    (shown,) = [line.removeprefix(label) for line in lines if line.startswith(label)]
    assert shown.startswith(word)
    others = [line for line in whole if " fold " in line and not line.startswith(label)]
    assert [line for line in lines if line in others] == others and len(others) == 11
    assert cli.main(["status", "--storage", repr(storage), "--json"]) == status.DAMAGED
    (value,) = json.loads(capsys.readouterr().out)
    assert value["damaged"] == [named.removeprefix("damaged: ")]
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=200)
    status.show(Standing(storage, "demo")(), console)
    assert isinstance(console.file, StringIO) and named in console.file.getvalue()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "another's"])
def test_a_damaged_plan_hides_no_other_grid(storage: Storage, capsys, damage: str):
    fill(storage, lambda _: "done")
    whole = said(capsys, storage)[1]
    DriverRecord(storage, "another", "s1", clock=lambda: NOW).say()
    plan = replace(asked(), grid="demo" if damage == "another's" else "another").as_json()
    if damage == "cut":
        storage.put("grids/another/plan.json", json.dumps(plan).encode()[:-7])
    elif damage == "changed":
        storage.put_json("grids/another/plan.json", plan | {"question": "?"})
    elif damage == "another's":
        storage.put_json("grids/another/plan.json", plan)
    code, lines = said(capsys, storage)
    assert (code, lines[: len(whole)]) == (status.DAMAGED, whole)
    (named,) = [line for line in lines if line.startswith("damaged: ")]
    assert "grids/another/plan.json" in named
    assert said(capsys, storage, "--grid", "demo") == (0, whole)
    code, lines = said(capsys, storage, "--grid", "another")
    assert code == (status.REFUSED if damage == "gone" else status.DAMAGED)
    assert len(lines) == (1 if damage == "gone" else 2) and "another" in lines[0]


def test_a_trial_whose_result_is_damaged_waits_for_no_sweep(storage: Storage, capsys):
    fill(storage, lambda _: "done")
    storage.put(f"trials/{asked().trials[0].trial_id}/result.json", b"{")
    lines = said(capsys, storage)[1]
    assert lines[0].endswith("12 trials; 11 done, 1 failed")
    assert not any("The same command goes on" in line for line in lines)


def test_files_that_others_leave_in_folders_change_nothing(storage: FolderStorage, capsys):
    fill(storage, lambda number: ("done", "running", "silent", "failed", "missing")[number % 5])
    DriverRecord(storage, "demo", "s1", clock=lambda: NOW - 3).say(waiting="waiting for a GPU")
    whole = said(capsys, storage)
    folders = {path.parent for path in storage.root.rglob("*.json")}
    for folder in [storage.root / "grids", storage.root / "trials", *folders]:
        for name in (".DS_Store", "._plan.json", "Thumbs.db"):
            (folder / name).write_bytes(b"\x00\x01Bud1")
    assert said(capsys, storage) == whole
    (storage.root / "trials").rename(storage.root / "elsewhere")
    (storage.root / "grids" / "demo").rename(storage.root / "another")
    (storage.root / "trials").mkdir()
    (storage.root / "trials" / ".DS_Store").touch()
    code, lines = said(capsys, storage)
    assert code == status.REFUSED and lines[0].startswith("refused: nothing of a sweep is stored in")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_storage_says_gives_the_terminal_no_orders(storage: Storage, terminal: bool):
    fill(storage, lambda _number: "failed")
    key = next(key for key in storage.keys("trials") if "/attempts/" in key)
    storage.put_json(key, storage.get_json(key) | {"outcome": "failed", "error": "no \x1b]0;pwn\x07\x9b2Jroom"})
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal, color_system=None, width=200)
    status.show(Standing(storage, "demo")(), console)
    assert "no ]0;pwn2Jroom" in shown.getvalue()
    assert not set("\x1b\x07\x9b") & set(shown.getvalue())
