"""What a sweep costs: the price table, what an attempt paid for, what of it was lost, and when to stop. No ray.

An attempt pays for the share of its machine that its worker held (of its GPUs or its cores, whichever is more), from
its beginning to its end, at the price of what it recorded to have run on. A machine that is not in the table has no
price: its hours are counted and called unpriced, never guessed. What stands in no attempt (a machine that starts or
idles, the head, storage) is not counted.

Lost is what of an attempt that did not finish its trial no checkpoint kept: its time from the last one on, taken in
proportion to its steps, (step - kept_step) / (step - from_step). One that finished no step is lost as a whole.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from dashboards.view import Spent
from orchestration.ledger import TrialState

#: The table that is read unless another one is named.
PRICES = Path(__file__).resolve().parent.parent / "cluster" / "prices.yaml"

#: How machines are bought, and the key of the table that says what that costs.
MARKETS = {"on-demand": "on_demand_usd_per_hour", "spot": "spot_usd_per_hour"}

#: Where a machine says what it is: set on its node by whoever starts it, or by Ray's own launcher.
INSTANCE_TYPE_VARIABLES = ("HELIX_INSTANCE_TYPE", "RAY_CLOUD_INSTANCE_TYPE_NAME")
MARKET_VARIABLES = ("HELIX_MARKET", "RAY_NODE_MARKET_TYPE")

#: The labels of a Ray node that say the same.
INSTANCE_TYPE_LABELS = ("helix/instance-type", "node.kubernetes.io/instance-type", "ray.io/instance-type")
MARKET_LABELS = ("helix/market", "ray.io/market-type")


#: What Ray says of a node's GPUs: a label, and the beginning of a resource's name.
GPU_LABEL, GPU_RESOURCE = "ray.io/accelerator-type", "accelerator_type:"


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars an hour by instance type and market ("on-demand" or "spot"), and what machines have for that.

    `gpu_bytes`: what one GPU holds, by its own name and by those of the instance types that have it.
    """

    usd: Mapping[tuple[str, str], float] = field(default_factory=dict)
    gpu_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def instance_types(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.usd))

    def per_hour(self, instance_type: str | None, market: str | None) -> float | None:
        """The price of a whole machine for an hour, None where the table does not say."""
        return self.usd.get((instance_type or "", market or ""))

    def memory_of_a_gpu(self, labels: Mapping[str, str], resources: Mapping[str, float]) -> int | None:
        """The bytes that a GPU of a machine holds, by its labels or by what Ray detects; None where unknown."""
        names = [labels.get(name) for name in (*INSTANCE_TYPE_LABELS, GPU_LABEL)]
        names += [name.removeprefix(GPU_RESOURCE) for name in resources if name.startswith(GPU_RESOURCE)]
        return next((self.gpu_bytes[name] for name in filter(None, names) if name in self.gpu_bytes), None)


def read_prices(path: Path = PRICES) -> Prices:
    """The table of a YAML file; an empty one where the default file is not there.

        prices: {g5.xlarge: {on_demand_usd_per_hour: 1.006, spot_usd_per_hour: 0.40}}
        gpus: {A10G: {memory_gib: 22, machines: [g5.xlarge]}}

    ValueError says what in it is no price, or no GPU.
    """
    if not path.exists() and path == PRICES:
        return Prices()
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the price table {path} cannot be read: {error}") from error
    rows = table.get("prices") if isinstance(table, dict) else None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path} is no price table; wanted prices: {{g5.xlarge: {{on_demand_usd_per_hour: 1.006}}}}")
    usd = {}
    for name, row in rows.items():
        for key, value in row.items():
            if not str(key).endswith("usd_per_hour"):
                continue
            market = next((market for market, known in MARKETS.items() if known == key), None)
            if market is None:
                raise ValueError(f"{path}: {name} has {key!r}; a price is one of {', '.join(MARKETS.values())}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{path}: {key} of {name} is {value!r}; wanted US dollars, 0 or more")
            usd[str(name), market] = float(value)
    return Prices(usd=usd, gpu_bytes=_gpu_bytes(table.get("gpus") or {}, path))


def _gpu_bytes(rows: Any, path: Path) -> dict[str, int]:
    wanted = "wanted gpus: {A10G: {memory_gib: 22, machines: [g5.xlarge]}}"
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{path}: gpus is {rows!r}; {wanted}")
    found = {}
    for name, row in rows.items():
        size, machines = row.get("memory_gib"), row.get("machines", [])
        if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < math.inf:
            raise ValueError(f"{path}: memory_gib of {name} is {size!r}; {wanted}")
        if not isinstance(machines, list):
            raise ValueError(f"{path}: machines of {name} is {machines!r}; {wanted}")
        found |= dict.fromkeys(map(str, [name, *machines]), int(size * 2**30))
    return found


def machine_facts(
    *,
    held: Mapping[str, float],
    resources: Mapping[str, float],
    labels: Mapping[str, str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """What an attempt records of what it runs on: instance type and market, None where nobody says, GPUs and share.

    `held`: what the worker has of the machine's `resources`.
    """
    labels = labels or {}
    shares = [held.get(name, 0.0) / resources[name] for name in ("CPU", "GPU") if resources.get(name, 0) > 0]
    said = [environment.get(name) for name in MARKET_VARIABLES] + [labels.get(name) for name in MARKET_LABELS]
    market = next(filter(None, said), None)
    names = [environment.get(name) for name in INSTANCE_TYPE_VARIABLES]
    names += [labels.get(name) for name in INSTANCE_TYPE_LABELS]
    return {
        "instance_type": next(filter(None, names), None),
        "market": market and market.lower().replace("_", "-").replace("ondemand", "on-demand"),
        "gpus": float(held.get("GPU", 0.0)),
        "share": min(1.0, max(shares, default=1.0)),
    }


def spent_on_attempt(attempt: Mapping[str, Any], prices: Prices, *, until: float) -> Spent:
    """What one attempt cost; `until` stands for its end while it has none."""
    hours = max(attempt.get("ended", until) - attempt["started"], 0.0) / 3600
    name, market = attempt.get("instance_type"), attempt.get("market")
    lost_hours = hours * lost_share(attempt)
    spent = {"hours": hours, "gpu_hours": hours * attempt.get("gpus", 0.0), "lost_hours": lost_hours}
    per_hour = prices.per_hour(name, market)
    if per_hour is None:
        what = f"{name or 'unknown instance type'}, {market or 'unknown market'}"
        return Spent(**spent, unpriced_hours=hours, unpriced=(what,))
    per_hour *= attempt.get("share", 1.0)
    return Spent(**spent, usd=hours * per_hour, lost_usd=lost_hours * per_hour)


def lost_share(attempt: Mapping[str, Any]) -> float:
    """The share of an attempt's time that was lost, by the rule above; 0 while it is under way."""
    if attempt.get("outcome") in (None, "done"):
        return 0.0
    begun = attempt.get("from_step", 0)
    moved = attempt.get("step", 0) - begun
    if moved <= 0:
        return 1.0
    return 1.0 - min(max((attempt.get("kept_step", begun) - begun) / moved, 0.0), 1.0)


def spent_on_trial(state: TrialState, prices: Prices, *, sweep_id: str | None = None) -> Spent:
    """What all attempts at a trial cost, or those of one sweep. One without an end counts until last heard of."""
    attempts = [one for one in state.attempts if sweep_id is None or one.get("sweep_id") == sweep_id]
    spent = (spent_on_attempt(one, prices, until=state.heard or one["started"]) for one in attempts)
    return sum(spent, Spent())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run of a sweep may take: US dollars, and until when (Unix seconds). None is no limit."""

    budget_usd: float | None = None
    ends: float | None = None

    def __post_init__(self) -> None:
        if self.budget_usd is not None and not 0 < self.budget_usd < math.inf:
            raise ValueError(f"--budget-usd is {self.budget_usd}; wanted a positive number of US dollars")

    def reached(self, spent: Spent, *, now: float) -> str | None:
        """Which limit is reached, in words; None while none is.

        A budget cannot be held on machines that have no price: that is a reason to stop as well.
        """
        if self.ends is not None and now >= self.ends:
            return f"the time is over ({datetime.fromtimestamp(self.ends, UTC):%Y-%m-%d %H:%M UTC})"
        if self.budget_usd is None:
            return None
        if spent.unpriced_hours:
            return f"the budget cannot be held: no price for {'; '.join(spent.unpriced)}"
        if spent.usd >= self.budget_usd:
            return f"the budget is spent (${spent.usd:.2f} of ${self.budget_usd:.2f})"
        return None


def until(*, deadline: str | None, hours: float | None, now: float) -> float | None:
    """The Unix time at which to stop: the earlier of --deadline, which is UTC unless it names its offset, and --hours.

    ValueError where either is no time that is still to come.
    """
    ends = []
    if deadline is not None:
        try:
            given = datetime.fromisoformat(deadline)
        except ValueError as error:
            raise ValueError(f"--deadline is {deadline!r}; wanted a time such as 2026-12-01T08:00 (UTC)") from error
        ends.append((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp())
        if ends[0] <= now:
            raise ValueError(
                f"--deadline {deadline} is over; it is {datetime.fromtimestamp(now, UTC):%Y-%m-%dT%H:%M} UTC now"
            )
    if hours is not None:
        if not 0 < hours < math.inf:
            raise ValueError(f"--hours is {hours}; wanted a positive number")
        ends.append(now + 3600 * hours)
    return min(ends, default=None)
