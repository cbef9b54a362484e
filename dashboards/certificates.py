"""What the certificates in a storage say of a sweep: the newest of each backend, and which results have none."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dashboards.view import SweepView
from helix.spec import SCIENCE_VERSION

#: The verdict of orchestration/certify.py that means that killing changed nothing.
BIT_EXACT = "bit-exact"


@dataclass(frozen=True, kw_only=True)
class CertificateRow:
    """One certificate beside the sweep.

    `in_sweep`: its trial, data and settings are one of the sweep's. `results`: how many finished trials of the sweep
    ran on the same backend, kind of device and version of torch; it says nothing of the others.
    """

    certificate: dict[str, Any]
    in_sweep: bool
    results: int

    @property
    def exact(self) -> bool:
        return self.certificate["verdict"] == BIT_EXACT


@dataclass(frozen=True, kw_only=True)
class Certified:
    """`rows`, and how many results of the sweep ran where no certificate of its grid was made, by what they ran on."""

    rows: tuple[CertificateRow, ...]
    uncovered: tuple[tuple[str, int], ...]


def certified(view: SweepView) -> Certified:
    """The newest certificate of the view's grid and this science version for each backend, device and torch."""
    ran = Counter(
        (result.get("scan"), result.get("device"), (result.get("versions") or {}).get("torch"))
        for _, trial in view.trials()
        if (result := trial.state.result) is not None
    )
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for certificate in sorted(view.certificates, key=lambda one: one["made"]):
        if certificate["grid"] == view.grid and certificate["science_version"] == SCIENCE_VERSION:
            newest[certificate["scan"], certificate["device"], certificate["versions"]["torch"]] = certificate
    ids = {trial.trial_id for _, trial in view.trials()}
    rows = [
        CertificateRow(certificate=one, in_sweep=one["trial_id"] in ids, results=ran[place])
        for place, one in newest.items()
    ]
    uncovered = [
        (f"scan {scan or 'unknown'} on {device or 'unknown'}, torch {torch or 'unknown'}", count)
        for (scan, device, torch), count in ran.items()
        if (scan, device, torch) not in newest
    ]
    return Certified(rows=tuple(reversed(rows)), uncovered=tuple(uncovered))
