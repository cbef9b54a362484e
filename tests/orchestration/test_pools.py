"""What a cluster can hold: told before anything waits, by the names of its pools."""

from orchestration.money import read_prices
from orchestration.pools import UNKNOWN_SLOTS, Offer, Pool, pools_of, types_of

GPU = {"CPU": 1, "GPU": 1.0}


def spot(running: int = 0, most: int = 2, **resources: float) -> Pool:
    return Pool(name="spot", resources=resources or {"CPU": 4, "GPU": 1}, running=running, most=most)


HEAD = Pool(name="head", resources={"CPU": 8}, running=1, most=1)


def test_a_request_that_no_pool_holds_is_impossible_and_every_pool_is_named():
    said = Offer(pools=(HEAD, spot())).impossible({"CPU": 1, "GPU": 2})
    assert said == (
        "no machine of this cluster can ever hold a worker, which needs 1 CPU, 2 GPU; its pools: "
        "head (8 CPU, 0 GPU; 1 running); spot (4 CPU, 1 GPU; 0 running, at most 2)"
    )
    assert Offer(pools=(HEAD, spot())).impossible(GPU) is None


def test_where_an_autoscaler_may_know_other_machines_only_its_own_word_makes_it_impossible():
    assert Offer(pools=(HEAD,), complete=False).impossible(GPU) is None
    assert "no machine" in str(Offer(pools=(HEAD,), complete=False, refused=(GPU,)).impossible(GPU))
    assert Offer(pools=(HEAD,), complete=False, refused=({"CPU": 99},)).impossible(GPU) is None


def test_the_wait_is_for_as_many_nodes_as_are_missing_and_may_come():
    offer = Offer(pools=(HEAD, spot()))
    assert offer.waiting(GPU, workers=6) == "waiting for a GPU: 0 of 2 nodes started"
    assert offer.waiting(GPU, workers=1) == "waiting for a GPU: 0 of 1 nodes started"
    assert Offer(pools=(spot(running=1),)).waiting(GPU, workers=2) == "waiting for a GPU: 1 of 2 nodes started"
    assert Offer(pools=(spot(running=2),)).waiting(GPU, workers=6) == ""  # all there are; the rest takes turns
    assert Offer(pools=(HEAD,), complete=False).waiting(GPU, workers=2) == "waiting for a GPU: 0 machines started"


def test_shares_of_a_gpu_fit_side_by_side():
    third = {"CPU": 1, "GPU": 1 / 3}
    assert spot().workers(third) == 3
    assert Offer(pools=(spot(),)).slots(third) == 6
    assert Offer(pools=(spot(),)).waiting(third, workers=6) == "waiting for a GPU: 0 of 2 nodes started"
    assert Offer(pools=(spot(),)).waiting(third, workers=3) == "waiting for a GPU: 0 of 1 nodes started"


def test_without_an_autoscaler_the_pools_are_the_machines_that_run():
    nodes = [
        {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {"ray.io/node-group": "spot"}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}, "Labels": {}},
    ]
    offer = Offer(pools=pools_of(nodes, None))
    assert [(pool.running, pool.most) for pool in offer.pools] == [(1, 1), (1, 1)]
    assert offer.slots(GPU) == 1


def test_node_types_of_a_cluster_file_are_pools_whether_they_run_or_not():
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 8}},
            "spot": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 3},
            "tail": {"resources": {"CPU": 4, "GPU": 1}},
        },
    }
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}, "Labels": {"ray.io/node-group": "spot"}}]
    pools = {pool.name: (pool.running, pool.most) for pool in pools_of(nodes, types_of(config))}
    assert pools == {"head": (0, 1), "spot": (1, 3), "tail": (0, 5)}


def test_the_smallest_gpu_on_offer_counts_and_one_that_is_not_known_makes_all_unknown():
    config = {
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 8}},
            "l40s": {"resources": {"CPU": 4, "GPU": 1}, "labels": {"helix/instance-type": "g6e.xlarge"}},
            "l4": {"resources": {"CPU": 16, "GPU": 2}, "labels": {"helix/instance-type": "g6.xlarge"}},
        },
    }
    known = read_prices().memory_of_a_gpu
    offer = Offer(pools=pools_of([], types_of(config), gpu_bytes=known))
    assert [pool.gpu_bytes for pool in offer.pools] == [None, 44 * 2**30, 22 * 2**30]
    assert (offer.gpu_bytes, offer.workers_beside_a_gpu(1), offer.workers_beside_a_gpu(3)) == (22 * 2**30, 4, 1)
    found = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L40S": 1.0}, "Labels": {}}
    assert Offer(pools=pools_of([found], None, gpu_bytes=known)).gpu_bytes == 44 * 2**30
    other = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "accelerator_type:Z9": 1.0}, "Labels": {}}
    assert Offer(pools=pools_of([found, other], types_of(config), gpu_bytes=known)).gpu_bytes is None
    assert Offer(pools=offer.pools, complete=False).gpu_bytes is None  # an autoscaler may start smaller ones


def test_an_unknown_number_of_machines_is_not_asked_for_all_at_once():
    assert Offer(pools=(HEAD,), complete=False).slots(GPU) == UNKNOWN_SLOTS
    assert Offer(pools=(HEAD,)).slots({"CPU": 3}) == 2
