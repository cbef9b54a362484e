"""What a sweep costs: attempts at the price of what they ran on, lost work, limits; nothing is guessed."""

from pathlib import Path
from typing import Any

import pytest
import ray.util.accelerators.accelerators as accelerators
import yaml
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

import orchestration.money as money
from dashboards.text import cost_line
from dashboards.view import Spent
from orchestration.ledger import TrialState
from orchestration.money import (
    Limits,
    Prices,
    lost_share,
    machine_facts,
    read_prices,
    spent_on_attempt,
    spent_on_trial,
    until,
)
from orchestration.needs import Room
from orchestration.pools import Offer, pools_of

PRICES = Prices(usd={("g5.xlarge", "spot"): 0.40, ("g5.xlarge", "on-demand"): 1.0})
HOUR = 3600.0


def attempt(**changed: Any) -> dict[str, Any]:
    record = {
        "attempt_id": "a",
        "sweep_id": "s1",
        "started": 0.0,
        "ended": HOUR,
        "outcome": "done",
        "from_step": 0,
        "instance_type": "g5.xlarge",
        "market": "spot",
        "gpus": 1.0,
        "share": 1.0,
    }
    return {key: value for key, value in (record | changed).items() if value is not None}


def test_the_table_that_is_shipped_is_a_price_table():
    assert read_prices().instance_types


def test_an_hour_on_a_machine_costs_its_price():
    spent = spent_on_attempt(attempt(), PRICES, until=0.0)
    assert (spent.usd, spent.gpu_hours, spent.lost_usd, spent.unpriced_hours) == (0.40, 1.0, 0.0, 0.0)
    assert spent_on_attempt(attempt(market="on-demand"), PRICES, until=0.0).usd == 1.0


def test_half_of_a_gpu_costs_half_of_its_machine():
    spent = spent_on_attempt(attempt(gpus=0.5, share=0.5), PRICES, until=0.0)
    assert (spent.usd, spent.gpu_hours) == (0.20, 0.5)


@pytest.mark.parametrize("unknown", [{"instance_type": "p5.48xlarge"}, {"instance_type": None}, {"market": None}])
def test_a_machine_that_nobody_priced_has_no_price(unknown: dict[str, Any]):
    spent = spent_on_attempt(attempt(**unknown), PRICES, until=0.0)
    assert (spent.usd, spent.unpriced_hours, spent.hours) == (0.0, 1.0, 1.0)
    assert "not priced" in cost_line(spent)


def test_an_attempt_without_an_end_counts_until_it_was_last_heard_of():
    record = attempt(ended=None, outcome=None)
    state = TrialState(trial_id="t", status="running", attempts=(record,), heard=HOUR / 2)
    assert spent_on_trial(state, PRICES).usd == pytest.approx(0.20)


def test_the_limits_of_a_run_look_at_its_own_attempts():
    state = TrialState(trial_id="t", status="partial", attempts=(attempt(), attempt(sweep_id="s2", ended=2 * HOUR)))
    assert spent_on_trial(state, PRICES).hours == 3.0
    assert spent_on_trial(state, PRICES, sweep_id="s2").hours == 2.0


@pytest.mark.parametrize(
    ("changed", "share"),
    [
        ({"outcome": "done"}, 0.0),
        ({"outcome": None, "ended": None}, 0.0),  # under way
        ({"outcome": "stopped", "from_step": 10, "step": 90, "kept_step": 90}, 0.0),
        ({"outcome": "lost", "from_step": 10, "step": 90, "kept_step": 70}, 0.25),
        ({"outcome": "failed", "from_step": 10, "step": 90, "kept_step": 10}, 1.0),
        ({"outcome": "lost", "from_step": 10, "step": 0, "kept_step": 10}, 1.0),  # gone before its first step
        ({"outcome": "lost", "from_step": 0, "step": 8, "kept_step": 9}, 0.0),  # saved after its last heartbeat
    ],
)
def test_lost_is_what_no_checkpoint_kept(changed: dict[str, Any], share: float):
    record = attempt(**changed)
    assert lost_share(record) == pytest.approx(share)
    assert spent_on_attempt(record, PRICES, until=HOUR).lost_usd == pytest.approx(0.40 * share)


def test_a_worker_pays_for_the_larger_of_its_shares_of_a_machine():
    held = {"CPU": 1.0, "GPU": 0.25}
    facts = machine_facts(held=held, resources={"CPU": 8.0, "GPU": 1.0}, environment={})
    assert (facts["share"], facts["gpus"], facts["instance_type"], facts["market"]) == (0.25, 0.25, None, None)
    assert machine_facts(held={"CPU": 4.0}, resources={"CPU": 8.0, "GPU": 1.0}, environment={})["share"] == 0.5


def test_what_a_machine_is_comes_from_its_environment_or_its_labels():
    labels = {"node.kubernetes.io/instance-type": "g6.xlarge", "ray.io/market-type": "ON_DEMAND"}
    told = machine_facts(held={}, resources={}, labels=labels, environment={})
    assert (told["instance_type"], told["market"]) == ("g6.xlarge", "on-demand")
    environment = {"HELIX_INSTANCE_TYPE": "g5.xlarge", "HELIX_MARKET": "spot"}
    told = machine_facts(held={}, resources={}, labels=labels, environment=environment)
    assert (told["instance_type"], told["market"]) == ("g5.xlarge", "spot")


def test_what_a_gpu_holds_is_known_by_its_machine_or_by_what_ray_calls_it():
    known = read_prices().memory_of_a_gpu
    assert known({"helix/instance-type": "g6e.xlarge"}, {}) == 44 * 2**30
    assert known({"ray.io/accelerator-type": "A10G"}, {}) == 22 * 2**30
    assert known({}, {"GPU": 1.0, "accelerator_type:L4": 1.0}) == 22 * 2**30
    assert known({"helix/instance-type": "p5.48xlarge"}, {"GPU": 8.0}) is None


#: What NVIDIA's driver calls GPUs, and what each holds at least, in GiB; an A100 does not say its size.
DRIVER_NAMES = {
    "NVIDIA A10G": 22,
    "NVIDIA L4": 22,
    "NVIDIA L40S": 44,
    "NVIDIA H100 80GB HBM3": 78,
    "NVIDIA H100 PCIe": 78,
    "NVIDIA H100 NVL": 78,
    "NVIDIA H200": 139,
    "NVIDIA H200 NVL": 139,
    "NVIDIA A100-SXM4-80GB": None,
    "NVIDIA GeForce RTX 4090": None,
}


@pytest.mark.parametrize(("driver", "gib"), DRIVER_NAMES.items())
def test_what_a_gpu_holds_is_known_by_the_name_that_ray_makes_of_its_drivers(driver: str, gib: int | None):
    name = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(driver)
    found = read_prices().memory_of_a_gpu({}, {"GPU": 8.0, f"accelerator_type:{name}": 1.0})
    assert found == read_prices().memory_of_a_gpu({"ray.io/accelerator-type": name}, {})
    assert found == (None if gib is None else gib * 2**30)


def test_the_table_calls_a_gpu_what_ray_calls_it_and_some_are_of_no_machine_that_it_prices():
    table = yaml.safe_load(money.PRICES.read_text(encoding="utf-8"))
    names = {value for key, value in vars(accelerators).items() if key.startswith("NVIDIA_")}
    assert set(table["gpus"]) <= names
    machines = {machine for row in table["gpus"].values() for machine in row.get("machines", [])}
    assert machines <= set(table["prices"])
    assert not table["gpus"]["H200"].get("machines") and "H200" not in read_prices().instance_types
    for size, gib in (("A100-40G", 39), ("A100-80G", 79)):
        given = {"GPU": 1.0, "accelerator_type:A100": 1.0, f"accelerator_type:{size}": 1.0}
        assert read_prices().memory_of_a_gpu({"ray.io/accelerator-type": "A100"}, given) == gib * 2**30


def test_trials_share_an_h200_and_are_held_to_their_share_of_it():
    node = {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0, "accelerator_type:H200": 1.0}, "Labels": {}}
    offer = Offer(pools=pools_of([node], None, gpu_bytes=read_prices().memory_of_a_gpu))
    room = Room(device="cuda").on(offer, threads=1)
    assert room.gpu_bytes == 139 * 2**30 and room.limit(0.25) == room.gpu_bytes // 4


def test_sums_keep_what_has_no_price_apart():
    both = spent_on_attempt(attempt(), PRICES, until=0.0) + spent_on_attempt(
        attempt(instance_type="laptop"), PRICES, until=0.0
    )
    assert cost_line(both) == "2.00 GPU-hours, $0.40; 1.00 h have no price (laptop, spot)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prices: [1]", "is no price table"),
        ("[", "cannot be read"),
        ("prices: {a: {spot_usd_per_hour: cheap}}", "spot_usd_per_hour of a is 'cheap'"),
        ("prices: {a: {spott_usd_per_hour: 1}}", "a price is one of on_demand_usd_per_hour, spot_usd_per_hour"),
        ("prices: {a: {spot_usd_per_hour: -1}}", "wanted US dollars, 0 or more"),
        ("{prices: {}, gpus: [L4]}", "gpus is "),
        ("{prices: {}, gpus: {L4: {memory_gib: much}}}", "memory_gib of L4 is 'much'"),
        ("{prices: {}, gpus: {L4: {memory_gib: 0}}}", "memory_gib of L4 is 0"),
        ("{prices: {}, gpus: {L4: {memory_gib: 22, machines: g6.xlarge}}}", "machines of L4 is 'g6.xlarge'"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, said: str, tmp_path: Path):
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prices(tmp_path / "prices.yaml")


def test_limits_say_which_of_them_is_reached():
    limits = Limits(budget_usd=1.0, ends=100.0)
    assert limits.reached(Spent(usd=0.99), now=99.0) is None
    assert limits.reached(Spent(usd=1.0), now=99.0) == "the budget is spent ($1.00 of $1.00)"
    assert limits.reached(Spent(), now=100.0) == "the time is over (1970-01-01 00:01 UTC)"
    assert Limits().reached(Spent(usd=1e9, unpriced_hours=1.0), now=1e12) is None


def test_a_budget_is_not_held_on_machines_without_a_price():
    said = Limits(budget_usd=1.0).reached(Spent(unpriced_hours=0.1, unpriced=("laptop, spot",)), now=0.0)
    assert said == "the budget cannot be held: no price for laptop, spot"


def test_the_earlier_end_counts_and_a_deadline_is_utc_unless_it_says_otherwise():
    assert until(deadline=None, hours=None, now=0.0) is None
    assert until(deadline="1970-01-01T02:00", hours=3.0, now=0.0) == 2 * HOUR
    assert until(deadline="1970-01-01T02:00+01:00", hours=None, now=0.0) == HOUR
    assert until(deadline="1970-01-02T02:00", hours=3.0, now=0.0) == 3 * HOUR
