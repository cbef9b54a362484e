"""Ranks: one trial on several processes is the trial on one, killed or not, and what fails on one fails on all."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helix.data.shards import Recordings
from helix.protocol import profile
from helix.spec import TrialSpec, to_json, trial_id
from helix.storage import FolderStorage, Storage
from helix.training.checkpoint import committed
from helix.training.ranks import Ranks
from helix.training.trainer import Fit, fit
from tests.conftest import with_training

ROOT = Path(__file__).resolve().parents[3]

#: A process that has imported everything and forks the ranks of each order that it reads: `fit`, with what the order
#: says happens to a rank. What each said goes into a file of its own; the number of the order says that all have ended.
TEMPLATE = """
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from helix.data.shards import open_prepared
from helix.spec import from_json
from helix.storage import FolderStorage
from helix.training import step, trainer
from helix.training.checkpoint import replica, weights_sha256
from helix.training.ranks import Ranks, RankLostError
from helix.training.trainer import Fit, fit

torch.set_num_threads(1)


def read_order():
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        children = []
        for rank in range(order["ranks"]):
            child = os.fork()
            if child == 0:
                return order, rank
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        print("ended", flush=True)
    sys.exit()


order, rank = read_order()
distributed.init_process_group(
    "gloo", init_method=f"file://{order['meeting']}", rank=rank, world_size=order["ranks"],
    timeout=timedelta(seconds=60),
)
happens, told, seen = order["happens"].get(str(rank), {}), [], []

def on_step(step):
    seen.append(step)
    if step == happens.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == happens.get("raise"):
        raise MemoryError("no room")

real_logits, real_save = step.logits_of, trainer.Saver.save

def logits(model, *rest):
    here = len(seen) + 1
    found = real_logits(model, *rest)
    if torch.is_grad_enabled() and here == happens.get("fail"):
        raise MemoryError("no room")
    if torch.is_grad_enabled() and here == happens.get("spoil"):
        return found * torch.inf
    return found

step.logits_of = logits
trials = []
real_trial = trainer._Trial

def trial(*arguments):
    trials.append(real_trial(*arguments))
    return trials[-1]

trainer._Trial = trial
how = Fit(
    storage=FolderStorage(Path(order["storage"])), ranks=Ranks(rank, order["ranks"]), on_step=on_step,
    on_epoch=lambda row: told.append(row["epoch"]), micro_batch=order["micro_batch"],
    save_now=lambda: order["save"] or len(seen) == happens.get("notice"),
    stop_now=lambda: len(seen) == happens.get("stop"),
)
said = {}
try:
    recordings = open_prepared(FolderStorage(Path(order["source"])), order["data"])
    said["result"] = fit(from_json(order["spec"]), recordings, how)
except Exception as error:
    said["error"] = f"{type(error).__name__}: {error}"
said |= {"seen": seen, "told": told, "weights": weights_sha256(trials[0].model) if trials else None}
Path(f"{order['meeting']}-{rank}").write_text(json.dumps(said))
os._exit(0)
"""


@pytest.fixture(scope="module")
def template() -> Iterator[subprocess.Popen[str]]:
    """One process to fork all ranks of this file from: importing torch takes longer than what they train."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [sys.executable, "-c", TEMPLATE],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def train(template, tiny_data: Recordings, storage: Storage, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a spec on several ranks; returns what each said, {} of one that was killed."""
    source, numbers = tiny_data._storage, itertools.count()
    assert isinstance(source, FolderStorage) and isinstance(storage, FolderStorage)

    def run(
        spec: TrialSpec,
        *,
        ranks: int = 2,
        into: Path | None = None,
        micro_batch: int | None = None,
        save: bool = False,
        happens: dict[int, dict[str, int]] | None = None,
    ) -> list[dict[str, Any]]:
        meeting = tmp_path / f"meeting-{next(numbers)}"
        order = {
            "spec": to_json(spec),
            "source": str(source.root),
            "data": tiny_data.prepared.prefix,
            "storage": str(into or storage.root),
            "meeting": str(meeting),
            "ranks": ranks,
            "micro_batch": micro_batch,
            "save": save,
            "happens": happens or {},
        }
        template.stdin.write(json.dumps(order) + "\n")
        template.stdin.flush()
        assert template.stdout.readline() == "ended\n"
        said = [Path(f"{meeting}-{rank}") for rank in range(ranks)]
        return [json.loads(path.read_text()) if path.exists() else {} for path in said]

    return run


def science(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how a trial was run: everything but the clock."""
    rows = [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in result["rows"]]
    return {**result, "rows": rows, "train_seconds": None, "finished": None, "sha256": None}


@pytest.mark.parametrize("profile_name", ["paper", "authors", "fair"])
@pytest.mark.parametrize("frontend", ["raw", "mel"])
def test_ranks_train_the_trial_that_one_process_trains(profile_name, frontend, tiny_spec, tiny_data, train, tmp_path):
    """24 clips over two ranks and one process: every loss and what is tested, but for rounding."""
    spec = replace(tiny_spec, protocol=profile(profile_name), model=replace(tiny_spec.model, frontend=frontend))
    one = fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "one")))
    said = train(spec)
    assert "result" in said[0], said
    two = said[0]["result"]
    assert two["trial_id"] == one["trial_id"] and (two["ranks"], one["ranks"]) == (2, 1)
    assert (two["micro_batch"], one["micro_batch"]) == (12, 24)
    assert said[1]["result"] == two and said[1]["weights"] == said[0]["weights"] == two["weights_sha256"]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["train_losses"] == pytest.approx(a["train_losses"], rel=1e-4)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-4)
        assert b["train_accuracy"] == pytest.approx(a["train_accuracy"], abs=0.03)
    assert said[0]["told"] == said[1]["told"] == [1, 2, 3]


def test_unequal_parts_weigh_as_much_as_their_clips(tiny_spec, tiny_data, train, tmp_path):
    """Parts of 8, 8 and 9 clips that go through the model by threes and fours at most."""
    spec = with_training(tiny_spec, batch_size=25)
    one = fit(spec, tiny_data, Fit(storage=FolderStorage(tmp_path / "one")))
    two = train(spec, ranks=3, micro_batch=4)[0]["result"]
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["train_losses"] == pytest.approx(a["train_losses"], rel=1e-4)


def test_the_same_ranks_give_the_same_bits_also_when_one_is_killed_between(tiny_spec, train, storage, tmp_path):
    whole = train(tiny_spec, into=tmp_path / "whole")[0]["result"]
    again = train(tiny_spec, into=tmp_path / "again")[0]["result"]
    assert science(again) == science(whole)
    for rank, step in ((1, 2), (0, 4), (1, 8)):
        killed = train(tiny_spec, save=True, happens={rank: {"kill": step}})
        assert killed[rank] == {}
        assert killed[1 - rank]["error"].startswith("RankLostError: rank"), killed
    last = train(tiny_spec)[0]
    assert last["seen"][0] > 6, "it went on from a checkpoint"
    assert science(last["result"]) == science(whole)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["fail", "raise"])
def test_what_fails_on_one_rank_is_raised_by_all(rank, where, tiny_spec, train):
    """Before the gradients meet (fail) and after it (raise): the others do not wait for what never comes."""
    said = train(tiny_spec, happens={rank: {where: 5}})
    assert [one["error"] for one in said] == ["MemoryError: no room"] * 2


def test_a_stop_that_the_first_rank_hears_of_stops_all_and_saves_once(tiny_spec, train, storage, tmp_path, tiny_data):
    said = train(tiny_spec, happens={0: {"stop": 5}})
    assert [one["error"].split(":")[0] for one in said] == ["StoppedError"] * 2
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    (step,) = {int(one["error"].rpartition(" ")[2]) for one in said}
    assert committed(storage, f"trials/{name}/checkpoints")[-1] == f"step-{step:08d}"
    whole = train(tiny_spec, into=tmp_path / "whole")[0]["result"]
    assert science(train(tiny_spec)[0]["result"]) == science(whole)


def test_a_notice_that_any_rank_hears_of_saves_at_that_step(tiny_spec, train, storage, tiny_data):
    train(tiny_spec, happens={1: {"notice": 2, "kill": 3}})
    name = trial_id(tiny_spec, tiny_data.manifest_sha256)
    assert committed(storage, f"trials/{name}/checkpoints") == ["step-00000002"]


@pytest.mark.parametrize("divergence", ["stop", "rollback"])
def test_a_loss_that_one_rank_spoils_is_a_divergence_of_all(divergence, tiny_spec, train):
    spec = replace(tiny_spec, protocol=replace(tiny_spec.protocol, divergence=divergence))
    said = train(spec, happens={1: {"spoil": 2}})
    if divergence == "stop":
        assert all("the loss of step 2 is not finite" in one["error"] for one in said)
    else:
        assert said[0]["result"]["skipped_steps"] == [2]
        assert said[0]["weights"] == said[1]["weights"]


def test_another_number_of_ranks_is_another_environment(tiny_spec, tiny_data, train, storage):
    train(tiny_spec, save=True, happens={1: {"kill": 4}})
    result = fit(tiny_spec, tiny_data, Fit(storage=storage))
    assert [name.endswith(", 2 ranks") for name in result["environments"]] == [True, False]


def test_a_rank_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rank is 2 of 2; wanted 0 to 1"):
        Ranks(2, 2)
