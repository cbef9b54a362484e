"""The Grafana dashboard: every expression is asked of a real Prometheus that scraped a real sweep on a real Ray."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from orchestration import metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "dashboards" / "grafana.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]

#: What only a machine with a GPU tells; here they have to be understood and cannot have a value.
NEED_A_GPU = ("ray_node_gram_used", "ray_node_gpus_utilization", 'ray_resources{Name="GPU"}')

RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"
SMALL = (
    *("--grid", "demo", "--variants", "mamba-mel,attention-mel", "--folds", "1", "training.epochs=2"),
    *("data.options.clips_per_class=24", "--workers", "2"),
)


def test_the_dashboard_is_found_by_its_uid_and_asks_which_prometheus():
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("helix-sweeps", "HELIX sweeps")
    assert "id" not in DASHBOARD, "a dashboard that is provisioned by uid has no number of one Grafana's database"
    kinds = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "grid": "query"}
    for panel in PANELS:
        asked = [panel, *panel["targets"]]
        assert all(one["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for one in asked)


def test_panels_have_an_id_each_and_do_not_lie_on_each_other():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        squares = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not squares & taken, panel["title"]
        taken |= squares


def test_what_is_promised_to_be_shown_is_there_and_every_panel_says_what_it_is():
    titles = {panel["title"] for panel in PANELS}
    promised = {"Throughput", "GPU memory of machines", "Memory of a step, predicted and used", "Preemptions"}
    assert promised | {"Lost steps", "Checkpoint time", "Queue", "Cost so far"} <= titles
    assert all(panel["description"].endswith(".") for panel in PANELS)


def test_the_dashboard_shows_all_that_a_sweep_tells():
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    told = set(re.findall(r'"(helix_\w+)"', source))
    shown = {
        name
        for one in EXPRESSIONS
        for name in re.findall(r"ray_(helix_[a-z_]+?)(?:_total|_bucket|_sum|_count)?\{", str(one.values[0]))
    }
    assert told == shown
    assert len(told) > 10


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A Prometheus that scraped a sweep, from its beginning to its end in Unix seconds."""

    url: str
    began: float
    ended: float

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer; AssertionError with Prometheus' own words where it refuses."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}") as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """All numbers that a panel would draw; NaN is none."""
        asked = expression.replace("$grid", "demo").replace("$__rate_interval", "10s")
        span = {"start": f"{self.began:.3f}", "end": f"{self.ended:.3f}", "step": "1"}
        series = self.ask("query_range", query=asked, **span)["result"]
        return [float(value) for one in series for _, value in one["values"] if value != "NaN"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in children:
        if child.is_running():
            child.kill()


def until(holds: Any, process: subprocess.Popen[Any], output: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{process.args} did not come up: {output.read_text()[-3000:]}")
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def observed() -> Iterator[Observed]:
    """A head with a token, a Prometheus that finds it by the file that Ray writes, and a sweep of two trials."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on this machine (Debian: apt-get install prometheus)")
    folder = Path(tempfile.mkdtemp(prefix="helix-prom-"))  # short: Ray's sockets lie in it
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "token").chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HELIX_", "MLFLOW_"))}
    environment = {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),
        "RAY_metrics_report_interval_ms": "1000",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    port, prometheus_port = free_port(), free_port()
    options = {"--port": port, "--dashboard-port": free_port(), "--ray-client-server-port": free_port()}
    options |= {"--dashboard-agent-listen-port": free_port(), "--dashboard-agent-grpc-port": free_port()}
    start = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    start += ["--object-store-memory=100000000", f"--metrics-export-port={free_port()}"]
    start += [f"{name}={number}" for name, number in options.items()]
    found = folder / "ray" / "prom_metrics_service_discovery.json"
    section = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8").split("<!-- prometheus.yml -->")[1]
    config = yaml.safe_load(
        section.split("<!-- end -->")[0].replace("/tmp/ray/prom_metrics", f"{found.parent}/prom_metrics")
    )
    config["global"]["scrape_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    subprocess.run(["promtool", "check", "config", folder / "prometheus.yml"], check=True, capture_output=True)
    watch = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    watch += [f"--web.listen-address=127.0.0.1:{prometheus_port}"]
    url = f"http://127.0.0.1:{prometheus_port}"
    said = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT}
    processes: list[subprocess.Popen[Any]] = []
    try:
        with (folder / "ray.log").open("w") as ray_log, (folder / "prometheus.log").open("w") as prometheus_log:
            processes.append(subprocess.Popen([sys.executable, "-c", RAY, *start], stdout=ray_log, **said))
            until(found.exists, processes[0], folder / "ray.log")
            processes.append(subprocess.Popen(watch, stdout=prometheus_log, **said))
            until(lambda: answers(f"{url}/-/ready"), processes[1], folder / "prometheus.log")
            began = time.time()
            sweep = subprocess.run(
                [sys.executable, "orchestration/sweep.py", *SMALL, "--storage", str(folder / "storage")],
                cwd=ROOT,
                env={**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert sweep.returncode == 0, sweep.stdout[-3000:] + sweep.stderr[-3000:]
            yield Observed(url=url, began=began, ended=time.time())
    finally:
        for process in reversed(processes):
            end(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.service
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_panel_shows_something_of_a_real_sweep(observed: Observed, expression: str):
    values = observed.values(expression)
    if any(name in expression for name in NEED_A_GPU):
        assert "ray_" in expression  # Prometheus understood it, or `values` had raised
        return
    assert values, "Prometheus has nothing for this panel"


@pytest.mark.ray
@pytest.mark.service
def test_the_numbers_are_those_of_the_sweep(observed: Observed):
    assert max(observed.values('max(ray_helix_trials{status="running"})')) >= 1
    # 24 clips a class, 6 classes, 4 folds: 108 to train on, 6 batches of 16 in each of two epochs, of two trials.
    assert max(observed.values("sum(max_over_time(ray_helix_steps_total[10m]))")) == 24
    assert max(observed.values("sum(max_over_time(ray_helix_clips_total[10m]))")) == 24 * 16
    assert max(observed.values("max(ray_helix_epoch)")) == 2
    assert max(observed.values("max(ray_helix_lost_steps)")) == 0
    assert min(observed.values("min(ray_helix_memory_predicted_bytes)")) > 1e6
    assert min(observed.values("min(ray_helix_memory_used_bytes)")) > 1e8
    grids = observed.ask("series", **{"match[]": "ray_helix_trials", "start": str(observed.began)})
    assert {one["grid"] for one in grids} == {"demo"}, "the variable of the dashboard lists the grids"


def shown(panel: str, ref: str = "A") -> str:
    """The expression of a panel, for all grids: what Grafana asks when All is chosen."""
    (one,) = [
        one for one in PANELS if one["title"] == panel and {target["refId"] for target in one["targets"]} >= {ref}
    ]
    expression = next(target["expr"] for target in one["targets"] if target["refId"] == ref)
    return expression.replace("$grid", ".*").replace("$__rate_interval", "5m")


#: Two sweeps at once, as two drivers and their workers tell of them; a head may be scraped under two addresses.
TWO_GRIDS = {
    'ray_helix_trials{grid="a",status="done",instance="1"}': 8,
    'ray_helix_trials{grid="a",status="done",instance="2"}': 8,
    'ray_helix_trials{grid="b",status="done",instance="1"}': 3,
    'ray_helix_trials{grid="a",status="missing",instance="1"}': 2,
    'ray_helix_trials{grid="b",status="partial",instance="1"}': 5,
    'ray_helix_attempts{grid="a",outcome="lost",instance="1"}': 4,
    'ray_helix_attempts{grid="b",outcome="lost",instance="1"}': 1,
    'ray_helix_attempts{grid="b",outcome="failed",instance="1"}': 6,
    'ray_helix_epoch{grid="a",trial="mamba-raw fold 1 seed 0",instance="1"}': 7,
    'ray_helix_epoch{grid="b",trial="mamba-raw fold 1 seed 0",instance="2"}': 2,
    'ray_helix_cost_usd{grid="a",instance="1"}': 1.5,
    'ray_helix_cost_usd{grid="b",instance="1"}': 2.5,
}


@pytest.mark.service
@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        (shown("Trials"), {'{status="done"}': 11, '{status="missing"}': 2, '{status="partial"}': 5}),
        (shown("Attempts"), {'{outcome="lost"}': 5, '{outcome="failed"}': 6}),
        (shown("Queue"), {'{grid="a"}': 2, '{grid="b"}': 5}),
        (shown("Preemptions"), {'{grid="a"}': 4, '{grid="b"}': 1}),
        (
            shown("Epochs"),
            {f'{{grid="{grid}", trial="mamba-raw fold 1 seed 0"}}': epoch for grid, epoch in (("a", 7), ("b", 2))},
        ),
        (shown("Cost so far"), {'{grid="a"}': 1.5, '{grid="b"}': 2.5}),
    ],
    ids=["Trials", "Attempts", "Queue", "Preemptions", "Epochs", "Cost so far"],
)
def test_two_grids_at_once_are_counted_together_or_apart(expression: str, wanted: dict[str, float], tmp_path: Path):
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on this machine (Debian: apt-get install prometheus)")
    for number, samples in enumerate((wanted, {name: value + 1 for name, value in wanted.items()})):
        expected = [{"labels": labels, "value": value} for labels, value in samples.items()]
        test = {
            "interval": "1m",
            "input_series": [{"series": name, "values": f"{value}x3"} for name, value in TWO_GRIDS.items()],
            "promql_expr_test": [{"expr": expression, "eval_time": "1m", "exp_samples": expected}],
        }
        (tmp_path / f"{number}.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    right, wrong = (
        subprocess.run(["promtool", "test", "rules", tmp_path / f"{number}.yml"], capture_output=True, text=True)
        for number in (0, 1)
    )
    assert right.returncode == 0, right.stdout + right.stderr
    assert wrong.returncode != 0, "promtool would tell other numbers"


@pytest.mark.ray
@pytest.mark.service
def test_an_expression_that_is_wrong_would_be_noticed(observed: Observed):
    with pytest.raises(AssertionError, match="parse error"):
        observed.values("max by (trial) (ray_helix_epoch")
    assert observed.values("ray_helix_that_nobody_tells") == []
