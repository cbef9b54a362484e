"""`helix report --published` as a user runs it: what it says, what it leaves, how it ends."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dashboards.evidence import published_evidence
from dashboards.paper import render_published, write_published
from dashboards.verdicts import CLAIMS, ledger, tallied
from orchestration.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from orchestration.cli import main; sys.exit(main())"


Helix = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def helix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Helix:
    """Runs a command line in this process, in a folder, with nothing of HELIX in the environment but what is given."""

    def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("HELIX_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            code = main(list(arguments))
        except SystemExit as end:  # as argparse ends
            code = int(end.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run


def test_a_user_gets_a_page_tables_and_the_count_of_verdicts(helix: Helix, tmp_path: Path):
    ended = helix("report", "--published", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    *_, count, page, tables = ended.stdout.splitlines()
    assert count == tallied(ledger(published_evidence()))
    assert page == f"page:    {tmp_path}/runs/reports/published.html"
    assert tables == f"tables:  18 files in {tmp_path}/runs/reports/published"
    folder = tmp_path / "runs" / "reports"
    assert sorted(path.name for path in folder.iterdir()) == ["published", "published.html"]
    assert len(list((folder / "published").iterdir())) == 18
    with (folder / "published" / "claims.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(CLAIMS)


def test_the_terminal_shows_verdicts_and_tests_in_100_columns(tmp_path: Path):
    command = [sys.executable, "-c", COMMAND, "report", "--published", "--storage", str(tmp_path / "s")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    text = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    lines = [line for line in text.splitlines() if not line.startswith(("page:", "tables:"))]
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text, "no colours where nobody watches"
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert re.search(r"contradicted +section 5 +Runs that were ended early had converged", text)
    assert re.search(r"mamba raw . mamba mel +5 folds +\+1\.35 +0\.103 +0\.233 +1\.000 +0\.188", text)
    assert re.search(r"helix raw . mamba raw +1 seed +\+1\.50", text)


def test_it_may_be_run_again_and_says_the_same(helix: Helix, tmp_path: Path):
    first, again = (helix("report", "--published", "--storage", "s", folder=tmp_path) for _ in range(2))
    assert (first.returncode, first.stdout) == (again.returncode, again.stdout)


def test_it_goes_where_the_environment_says(helix: Helix, tmp_path: Path):
    assert helix("report", "--published", folder=tmp_path, HELIX_STORAGE=str(tmp_path / "here")).returncode == 0
    assert (tmp_path / "here" / "reports" / "published.html").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--published", "--grid", "demo"], "unrecognized arguments: --grid demo"),
        (["--published", "--storage", "file"], "file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(helix: Helix, tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "file").write_text("a file where a folder is wanted")
    ended = helix("report", *arguments, folder=tmp_path)
    assert ended.returncode == 2
    assert said in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr


def test_the_page_needs_no_network_and_runs_nothing():
    source = render_published()
    assert not re.search(r"https?://|@import|<script", source)
    assert all(value.startswith(("data:", "#")) for value in re.findall(r'(?:src|href)="([^"]*)"', source))
    assert source == render_published()


def test_every_table_that_is_written_is_linked_and_no_other(tmp_path: Path):
    page, *tables = write_published(tmp_path)
    linked = re.findall(r'href="(published/[^"]*)"', page.read_text())
    assert sorted(linked) == sorted(str(path.relative_to(tmp_path)) for path in tables)
    assert 'href="published' not in render_published()


def test_the_page_shows_every_claim_and_every_comparison(tmp_path: Path):
    page, *_ = write_published(tmp_path)
    source = page.read_text()
    for claim in CLAIMS:
        assert source.count(f">{claim.says}<") == 1, claim.id
    assert source.count("Paired differences on ") == 4
    assert "30,000 tokens" in source and "nan" not in re.findall(r">([^<]*)<", source)
    ids = re.findall(r"<(caption|h2)", source)
    assert ids.count("h2") == 2 and ids.count("caption") == 9
