"""How a cluster is found: its autoscaler among the processes of this machine."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestration import connection

GCS = "10.0.0.1:6379"


def processes(*lines: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(info={"cmdline": line.split() or None}) for line in lines]


@pytest.mark.parametrize("version", ["autoscaler/_private", "autoscaler/v2"])
def test_the_autoscaler_is_told_from_what_else_watches(version: str, monkeypatch: pytest.MonkeyPatch):
    """Ray's log monitor has a like name and the same address; which of the two comes first is up to their ids."""
    others = [f"python ray/_private/log_monitor.py --gcs-address={GCS}", "", "python train.py"]
    monitor = f"python ray/{version}/monitor.py --gcs-address={GCS} --autoscaling-config=/etc/cluster.yaml"
    for lines in ([*others, monitor], [monitor, *others]):
        monkeypatch.setattr(connection.psutil, "process_iter", lambda _names, lines=lines: processes(*lines))
        assert connection._autoscaler(GCS) == (True, Path("/etc/cluster.yaml"))
        assert connection._autoscaler("10.0.0.2:6379") == (False, None)
    monkeypatch.setattr(connection.psutil, "process_iter", lambda _names: processes(*others))
    assert connection._autoscaler(GCS) == (False, None)
