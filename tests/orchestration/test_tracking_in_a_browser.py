"""MLflow's own pages in headless Chromium, opened by the links that a sweep prints: what a researcher sees first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dashboards.report import write_report
from helix.data.shards import Recordings
from helix.storage import Storage
from orchestration.grid import VARIANTS, Trial
from orchestration.plan import Snapshot, make_plan
from orchestration.tracking import Tracker
from orchestration.worker import run_trial

pytestmark = [pytest.mark.browser, pytest.mark.service]

WAIT_MS = 60_000


def view_of(tracker: Tracker, trial_id: str) -> tuple[str, str]:
    """The experiment and the run of a trial."""
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("helix-tones")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`helix.trial_id` = '{trial_id}'")
    return experiment.experiment_id, run.info.run_id


def test_the_printed_links_open_the_comparison_and_the_list_of_runs(
    browser: Any,
    pictures: Path,
    mlflow_server: str,
    tiny_sweep: Snapshot,
    tiny_spec,
    tiny_data: Recordings,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    model = tiny_spec.model
    trials = [
        Trial(
            variant=variant,
            spec=replace(
                tiny_spec,
                data=replace(tiny_spec.data, fold=fold),
                model=replace(model, frontend=variant.frontend, pattern=variant.pattern[2:4]),
            ),
        )
        for variant in VARIANTS
        for fold in (1, 2)
    ]
    tiny_sweep.plan = make_plan(trials, tiny_data)
    for entry in tiny_sweep.plan:
        run_trial(entry.trial.spec, tiny_data, storage, sweep_id="s1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    view, tracker = tiny_sweep(), Tracker(storage)
    tracker.replay(view)
    write_report(view, tmp_path / "test.html")
    tracker.publish(view, tmp_path / "test.html")
    links = tracker.compare_links(view)["tones"]

    page = browser.new_page(viewport={"width": 2000, "height": 900})
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{mlflow_server}/{links['compare']}")
    page.get_by_text("Comparing 6 Runs").first.wait_for()
    for variant in VARIANTS:
        assert page.get_by_text(variant.name, exact=True).count() > 0
    page.get_by_text("attention_layers").first.wait_for()
    page.wait_for_timeout(3000)  # the chart is drawn without a word
    page.screenshot(path=pictures / "mlflow-compare.png")

    page.goto(f"{mlflow_server}/{links['runs']}")
    page.get_by_text("report of test").first.wait_for()
    for heading in ("best_test_accuracy", "best_test_accuracy_std", "validation_accuracy", "n"):
        page.get_by_text(heading, exact=True).first.wait_for()
    page.get_by_text("tones (").first.wait_for()  # the column of data sets is filled
    page.wait_for_timeout(2000)
    page.screenshot(path=pictures / "mlflow-runs.png")

    # A trial's page: the code, the data, and what its machine did.
    experiment, trial = view_of(tracker, tiny_sweep.plan[0].trial_id)
    page.goto(f"{mlflow_server}/#/experiments/{experiment}/runs/{trial}/system-metrics")
    page.get_by_text("cpu_utilization_percentage").first.wait_for()
    page.get_by_text("process_memory_peak_megabytes").first.wait_for()
    page.wait_for_timeout(2000)
    page.screenshot(path=pictures / "mlflow-system-metrics.png")

    # The report of the same sweep.
    page.goto((tmp_path / "test.html").as_uri())
    page.set_viewport_size({"width": 1180, "height": 900})
    for variant in VARIANTS:
        assert page.get_by_text(variant.name).count() > 0
    page.screenshot(path=pictures / "report.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=pictures / "report-dark.png", full_page=True)
    page.close()
    for name in ("mlflow-compare.png", "mlflow-runs.png", "mlflow-system-metrics.png", "report.png", "report-dark.png"):
        assert (pictures / name).stat().st_size > 20_000
