"""The command as a user runs it: refused with a reason, planned without a trace, killed and run again, run twice."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helix import storage_s3
from helix.loopback import FaultProxy
from helix.registry import GRIDS
from helix.storage import FolderStorage, open_storage
from helix.training.memory import GIB
from orchestration import scale, sweep
from orchestration.connection import ClusterError
from orchestration.needs import Room, need_of
from orchestration.pools import Offer, Pool

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "orchestration" / "sweep.py"
#: Two trials of two variants that train in seconds.
SMALL = (
    *("--grid", "demo", "--variants", "mamba-mel,attention-raw", "--folds", "1", "--workers", "2"),
    *("data.options.clips_per_class=16", "model.width=40", "model.options.mamba.d_state=16", "training.batch_size=24"),
)


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**kept, **extra}


def run(
    arguments: Sequence[str], *, cwd: Path, timeout_s: float = 240, **extra: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SWEEP), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout_s)


def results(root: Path) -> dict[str, dict]:
    """The stored results by trial id."""
    storage = FolderStorage(root)
    found = {name: storage.get_json(f"trials/{name}/result.json") for name in storage.children("trials")}
    return {name: result for name, result in found.items() if result is not None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "nonsense"], f"unknown grid 'nonsense'; known: {', '.join(GRIDS.names())}"),
        (["--grid", "demo", "training.epocs=3"], "training has epochs, batch_size"),
        (["--grid", "demo", "training.epochs=many"], "could not be converted to Integer"),
        (["--grid", "demo", "model.options.mamba.d_stat=3"], "has no option 'd_stat'; it has"),
        (["--grid", "demo", "model.options.mamba9.d_state=3"], "'mamba9', which is no block and no frontend; known:"),
        (["--grid", "demo", "data.dataset=esc50"], "data.dataset is set by the grid"),
        (["--grid", "demo", "--profile", "best"], "unknown profile 'best'; known: authors, paper, fair"),
        (["--grid", "demo", "--preset", "huge"], "unknown preset 'huge'; known: paper, small"),
        (["--grid", "demo", "--folds", "9"], "tones has no fold 9; it has 1, 2, 3, 4"),
        (["--grid", "demo", "model.options.attention.heads=7"], "heads"),
        (["--grid", "demo", "model.width=16", "model.options.mamba.d_state=4"], "would not be fair"),
        (["--grid", "demo", "model.options.mamba.d_state=0"], "option d_state is 0; wanted 1 or more"),
        (["--grid", "demo", "training.batch_size=9999"], "do not fill one batch of 9999"),
        (["--grid", "esc50"], "esc50 is not prepared"),
        (["--grid", "esc50", "--source", "nowhere"], "nowhere"),
        (["--grid", "demo", "--storage", "a-file/runs"], "cannot write to the storage"),
        (["--grid", "demo", "--storage", "ftp://host/x"], "is not supported"),
        (["--grid", "demo", "--storage", "s3://b"], "wanted s3://bucket/prefix"),
        (["--grid", "demo", "--workers", "0"], "--workers is 0; wanted 1 or more"),
        (["--grid", "demo", "--budget-usd", "0"], "--budget-usd is 0.0; wanted a positive number of US dollars"),
        (["--grid", "demo", "--budget-usd", "5"], "--budget-usd needs the price of this machine"),
        (["--grid", "demo", "--hours", "-1"], "--hours is -1.0; wanted a positive number"),
        (["--grid", "demo", "--deadline", "tomorrow"], "--deadline is 'tomorrow'; wanted a time such as"),
        (["--grid", "demo", "--deadline", "2020-01-01T08:00"], "--deadline 2020-01-01T08:00 is over"),
        (["--grid", "demo", "--gpus-per-trial", "2"], "wanted a share of one GPU, above 0 and at most 1"),
        (["--grid", "demo", "--gpus-per-trial", "0.5"], "add --device cuda"),
        (["--grid", "demo", "--deterministic"], "on a CPU the bits are always the same; add --device cuda"),
        (["--grid", "demo", "--ranks", "0"], "--ranks is 0; wanted 1 or more"),
        (["--grid", "demo", "--ranks", "9", "training.batch_size=8"], "a batch has 8 clips; each rank needs one"),
        (["--grid", "demo", "--ranks", "2", "--gpus-per-trial", "0.5", "--device", "cuda"], "leave one out"),
        (["--grid", "demo", "--ranks", "4", "--threads", "999", "training.batch_size=8"], "is 999 on 4 ranks, but"),
        (["--grid", "demo", "--gpus-per-trial", "0", "--device", "cuda"], "above 0 and at most 1, or auto"),
        (["--grid", "demo", "--prices", "nowhere.yaml"], "the price table nowhere.yaml cannot be read"),
    ],
)
def test_bad_input_is_refused_with_what_was_wanted(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "run_sweep", lambda *given: pytest.fail("it was not refused"))
    (tmp_path / "a-file").write_text("in the way")
    assert sweep.main(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs" / "data").exists()
    assert not (tmp_path / "runs" / "trials").exists()


def test_the_same_bits_and_a_scan_that_does_not_give_them_are_not_asked_for_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELIX_SCAN", "mamba_ssm")
    assert sweep.main(["--grid", "demo", "--device", "cuda", "--deterministic"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "HELIX_SCAN=mamba_ssm for a scan that does not give them; leave one of them out" in said


def test_a_trial_that_cannot_fit_is_refused_before_ray_is_asked_for_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "connect", lambda **_: pytest.fail("a cluster was asked for"))
    assert sweep.main([*SMALL, "training.epochs=1", "--memory-gib", "0.05"]) == sweep.REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "refused: " in said and "fold 1 seed 0" in said and "0.05 GiB" in said, said
    assert not (tmp_path / "runs" / "trials").exists()


def test_a_refusal_seen_from_outside_is_one_message_and_exit_code_2(tmp_path):
    done = run(["--grid", "nonsense"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"refused: unknown grid 'nonsense'; known: {', '.join(GRIDS.names())}\n"


def test_a_dry_run_prints_the_plan_and_leaves_no_trace(tmp_path):
    done = run([*SMALL, "training.epochs=2", "--dry-run"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "mamba-mel" in line or "attention-raw" in line]
    rows = [line for line in lines if line and line[0] in ("mamba-mel", "attention-raw")]
    assert len(rows) == 2
    for row in rows:
        assert row[1:3] == ["1", "0"]  # fold, seed
        assert len(row[3]) == 16  # id
        assert int(row[4].replace(",", "")) > 10_000  # parameters
        assert float(row[6]) > 0 and row[7] == "GiB"  # memory of a step
        assert row[8:] == ["6", "missing"]  # 72 clips in batches of 24 for two epochs
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch finds one GPU of 22 GiB, beside four cores."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=22 * GIB))
    monkeypatch.setattr(sweep, "cpu_count", lambda: 4)


@pytest.mark.usefixtures("a_gpu")
def test_a_dry_run_says_what_each_trial_will_ask_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def asked(*options: str) -> list[str]:
        arguments = [*SMALL, "--device", "cuda", "--dry-run", *options]
        assert sweep.main(arguments) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [" ".join(row[8:10]) for row in rows if row[:1] in (["mamba-mel"], ["attention-raw"])]

    assert asked() == ["1/4 GPU", "1/4 GPU"]
    assert asked("--threads", "2") == ["1/2 GPU", "1/2 GPU"]  # a worker has to have its cores as well
    assert asked("--gpus-per-trial", "auto", "training.batch_size=72") == ["1/4 GPU", "1 GPU"]
    assert asked("--gpus-per-trial", "0.2") == ["1/5 GPU", "1/5 GPU"]
    assert asked("--gpus-per-trial", "1") == ["1 GPU", "1 GPU"]


def test_a_need_that_no_pool_holds_is_named_with_the_pools_before_anything_is_spent(tmp_path, monkeypatch):
    """Of two kinds of needs one can be met: that is not enough."""
    monkeypatch.setattr(sweep.ray.tune, "Tuner", lambda *_given, **_named: pytest.fail("something was started"))
    pool = Pool(name="spot", resources={"CPU": 4, "GPU": 0.5}, most=3, gpu_bytes=22 * GIB)
    monkeypatch.setattr(sweep, "offer", lambda _prices: Offer(pools=(pool,)))
    planned = scale.planned(FolderStorage(tmp_path), 2)
    shares = iter([0.25, 1.0])
    monkeypatch.setattr(sweep, "need_of", lambda trial, room, *, tokens: replace(whole, gpus=next(shares)))
    whole = need_of(planned.plan[0].trial, Room(device="cuda"), tokens=1)
    with pytest.raises(ClusterError, match=r"needs 1 CPU, 1 GPU; its pools: spot \(4 CPU, 0.5 GPU; 0 running"):
        sweep.train(replace(planned, room=Room(device="cuda")), planned.missing())
    monkeypatch.setattr(sweep, "need_of", need_of)
    tiny = replace(pool, resources={"CPU": 4, "GPU": 1}, gpu_bytes=GIB // 2)
    monkeypatch.setattr(sweep, "offer", lambda _prices: Offer(pools=(tiny,)))
    with pytest.raises(ClusterError, match=r"does not fit into 0\.50 GiB"):
        sweep.train(replace(planned, room=Room(device="cuda")), planned.missing())
    assert planned.storage.children("sweeps") == []


@pytest.mark.ray
def test_one_trial_that_fails_does_not_stop_the_others_and_mlflow_may_be_away(tmp_path):
    storage = FolderStorage(tmp_path / "runs")
    arguments = [*SMALL, "--workers", "1", "training.epochs=1"]
    first = run([*arguments, "--variants", "mamba-mel"], cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "does not take it" in first.stdout
    (name,) = results(storage.root)
    # a committed checkpoint that cannot be trusted: the trial must refuse to start again at step 0
    storage.delete(f"trials/{name}/result.json")
    key = next(key for key in storage.keys(f"trials/{name}/checkpoints") if key.endswith("model.safetensors"))
    storage.put(key, b"broken" + storage.get(key)[6:])

    second = run(arguments, cwd=tmp_path)
    assert second.returncode == 1, second.stdout + second.stderr
    assert "no checkpoint under" in second.stdout
    done = results(storage.root)
    assert len(done) == 1
    assert name not in done
    assert "1 of 2 trials are not done" in second.stdout
    assert "failed: mamba-mel fold 1 seed 0: CheckpointError" in second.stdout


@pytest.mark.ray
def test_a_budget_that_is_spent_saves_what_is_under_way_and_the_same_command_goes_on(tmp_path: Path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("prices: {test.large: {spot_usd_per_hour: 720}}")
    machine = {"HELIX_INSTANCE_TYPE": "test.large", "HELIX_MARKET": "spot"}
    arguments = [*SMALL, "--variants", "mamba-mel", "training.epochs=400", "--prices", str(prices)]
    stopped = run([*arguments, "--budget-usd", "0.1"], cwd=tmp_path, **machine)
    assert stopped.returncode == sweep.STOPPED, stopped.stdout + stopped.stderr
    assert "stopped: the budget is spent ($" in stopped.stdout
    storage = FolderStorage(tmp_path / "runs")
    (name,) = storage.children("trials")
    (first,) = [storage.get_json(key) for key in storage.keys(f"trials/{name}/attempts")]
    assert first["outcome"] == "stopped"
    assert (first["instance_type"], first["market"]) == ("test.large", "spot")
    assert 0 < first["share"] <= 1
    assert first["step"] == first["kept_step"] > 0
    assert not results(storage.root)

    again = run([*arguments, "--hours", "0.0005"], cwd=tmp_path, **machine)  # over before a worker can start
    assert again.returncode == sweep.STOPPED, again.stdout + again.stderr
    assert "stopped: the time is over" in again.stdout
    more = run([*arguments, "--budget-usd", "0.1"], cwd=tmp_path, **machine)
    assert more.returncode in (0, sweep.STOPPED), more.stdout + more.stderr
    attempts = [storage.get_json(key) for key in storage.keys(f"trials/{name}/attempts")]
    assert attempts[-1]["from_step"] == first["step"]
    assert "cost:    " in more.stdout


@pytest.mark.ray
@pytest.mark.service
def test_a_sweep_reads_from_a_bucket_and_writes_to_it_and_running_it_again_trains_nothing(
    s3_address: str, fault_proxy: FaultProxy, tmp_path: Path
):
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    arguments = [*SMALL, "--workers", "1", "training.epochs=1", "--storage", s3_address]
    first = run(arguments, cwd=work, HELIX_CACHE=str(cache))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 trials: 0 done, 2 to train" in first.stdout

    storage = open_storage(s3_address)
    names = storage.children("trials")
    assert len(names) == 2
    for name in names:
        kept = storage.children(f"trials/{name}")
        assert {"attempts", "best", "checkpoints", "metrics", "result.json", "spec.json"} <= set(kept)
        assert len(storage.get_json(f"trials/{name}/result.json")["rows"]) == 1
    (data,) = storage.children("data")
    manifest = storage.get_json(f"data/{data}/manifest.json")
    assert [path.stem for path in cache.glob("*.bin")] == [shard["sha256"] for shard in manifest["shards"]]
    report = work / "runs" / "reports" / "demo.html"
    assert storage.get("reports/demo.html") == report.read_bytes()
    local = {path.relative_to(work / "runs") for path in work.rglob("*") if path.is_file()}
    artifacts = {path for path in local if path.parts[0] == "mlflow-artifacts"}
    assert {path.name for path in local - artifacts if path.parent.name != "demo"} == {"demo.html", "mlflow.db"}
    assert {"demo.html", "confusion.csv", "spec.json", "weights.safetensors"} <= {path.name for path in artifacts}

    fault_proxy.requests.clear()
    again = run(arguments, cwd=work, HELIX_CACHE=str(cache))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 trials: 2 done, 0 to train" in again.stdout
    assert any("/trials/" in path for _, path in fault_proxy.requests)
    assert not [path for method, path in fault_proxy.requests if method not in ("GET", "HEAD") and "/trials/" in path]

    planned = run([*arguments, "--dry-run"], cwd=work, HELIX_CACHE=str(cache))
    assert planned.stdout.count("done, 1 epochs") == 2


def test_storage_that_does_not_answer_or_is_not_allowed_is_a_refusal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage_s3, "CHECK_DEADLINE_S", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert sweep.main(["--grid", "demo", "--storage", "s3://some-bucket/runs"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("refused: s3://some-bucket/runs/probe-")
    assert "127.0.0.1:9" in said
    assert "hidden" not in said
    assert list(tmp_path.iterdir()) == []
