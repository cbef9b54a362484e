"""What machines a cluster has and may start, and what of a worker's request they can hold. Pure; knows no Ray."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

#: Two shares of one GPU that add up to all but this much of it count as all of it (1/3 three times).
SLACK = 1e-9


#: Workers that are asked for at once where nobody knows how many machines there may be.
UNKNOWN_SLOTS = 8


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Machines of one kind: how many run, and how many there may be at most (as many as run without an autoscaler).

    `gpu_bytes`: what one GPU of theirs holds, None where nobody knows.
    """

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    running: int = 0
    most: int = 0
    gpu_bytes: int | None = None

    def workers(self, need: Mapping[str, float]) -> int:
        """How many workers one such machine holds."""
        return min((int(self.resources.get(name, 0) / many + SLACK) for name, many in need.items() if many), default=0)

    def __str__(self) -> str:
        has = ", ".join(f"{self.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        count = f"{self.running} running" + (f", at most {self.most}" if self.most != self.running else "")
        return f"{self.name} ({has}; {count})"


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a cluster has on offer. `complete`: whether the pools are all there are, or an autoscaler may know others.

    `refused`: requests of which the autoscaler itself says that nothing it could start would hold them.
    """

    pools: tuple[Pool, ...]
    complete: bool = True
    refused: tuple[Mapping[str, float], ...] = ()

    @property
    def gpu_bytes(self) -> int | None:
        """What the smallest GPU holds; None where there is none, one is not known, or others may be started."""
        held = [pool.gpu_bytes for pool in self.pools if pool.resources.get("GPU")]
        known = [one for one in held if one is not None]
        return min(known) if self.complete and known and len(known) == len(held) else None

    def workers_beside_a_gpu(self, threads: int) -> int:
        """How many workers of so many cores find cores beside one GPU, on the machine with the fewest; 1 or more."""
        with_gpu = [pool.resources for pool in self.pools if pool.resources.get("GPU")]
        return max(1, min((int(has.get("CPU", 0) / has["GPU"] / threads) for has in with_gpu), default=1))

    def slots(self, need: Mapping[str, float]) -> int:
        """How many workers there can be at once, started or not; UNKNOWN_SLOTS where pools may not be known."""
        most = sum(pool.workers(need) * max(pool.most, pool.running) for pool in self.pools)
        return max(most, 1) if self.complete else max(most, UNKNOWN_SLOTS)

    def impossible(self, need: Mapping[str, float]) -> str | None:
        """Why no worker can ever be started, naming the pools; None where one may be."""
        told = any(all(one.get(name, 0) == many for name, many in need.items()) for one in self.refused)
        if not told and (not self.complete or any(pool.workers(need) for pool in self.pools)):
            return None
        pools = "; ".join(map(str, self.pools)) or "none"
        return f"no machine of this cluster can ever hold a worker, which needs {asked_for(need)}; its pools: {pools}"

    def waiting(self, need: Mapping[str, float], *, workers: int) -> str:
        """What workers wait for while the machines that run hold fewer than wanted; empty where they hold them all."""
        able = [pool for pool in self.pools if pool.workers(need)]
        held = sum(pool.running * pool.workers(need) for pool in able)
        if held >= workers:
            return ""
        what = "a GPU" if need.get("GPU") else "a machine"
        running = sum(pool.running for pool in able)
        if not able:
            return f"waiting for {what}: 0 machines started"
        per_machine = max(pool.workers(need) for pool in able)
        most = sum(max(pool.most, pool.running) for pool in able)
        missing = -((held - workers) // per_machine)
        wanted = running + missing if not self.complete else min(running + missing, most)
        return f"waiting for {what}: {running} of {wanted} nodes started" if running < wanted else ""


def pools_of(
    nodes: Sequence[Mapping[str, Any]],
    types: Mapping[str, Pool] | None,
    *,
    gpu_bytes: Callable[[Mapping[str, str], Mapping[str, float]], int | None] = lambda _labels, _resources: None,
) -> tuple[Pool, ...]:
    """The pools of the machines that run and of the node types on offer.

    `nodes`: as `ray.nodes()` gives them. `types`: those on offer by name, None without an autoscaler. A machine belongs
    to the type that its label names. `gpu_bytes`: what a GPU holds of machines with such labels and resources.
    """
    alive = [node for node in nodes if node.get("Alive")]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for node in alive:
        group = (node.get("Labels") or {}).get("ray.io/node-group") or ""
        has = node["Resources"]
        kinds = [name.partition(":")[2] for name in sorted(has) if name.startswith("accelerator_type:")]
        shape = ", ".join([f"{has.get('CPU', 0):g} CPU", *kinds])
        name = group if types and group in types else f"{group or 'machines'} of {shape}"
        groups.setdefault(name, []).append(node)
    pools = [replace(pool, running=len(groups.pop(name, ()))) for name, pool in (types or {}).items()]
    for name, members in groups.items():
        has = {"resources": members[0]["Resources"], "labels": members[0].get("Labels") or {}}
        pools.append(Pool(name=name, **has, running=len(members), most=len(members)))
    return tuple(replace(pool, gpu_bytes=gpu_bytes(pool.labels, pool.resources)) for pool in pools)


def types_of(config: Mapping[str, Any]) -> dict[str, Pool]:
    """The node types of a file for Ray's cluster launcher, of which none is known to run (of the head there is one)."""
    head, every = config.get("head_node_type"), config.get("max_workers", 2)
    return {
        name: Pool(
            name=name,
            resources=row.get("resources") or {},
            labels=row.get("labels") or {},
            most=1 if name == head else row.get("max_workers", every),
        )
        for name, row in (config.get("available_node_types") or {}).items()
    }


def asked_for(need: Mapping[str, float]) -> str:
    """{"CPU": 1, "GPU": 0.5} -> "1 CPU, 0.5 GPU"."""
    return ", ".join(f"{many:g} {name}" for name, many in need.items())
