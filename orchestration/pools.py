"""What machines a cluster has and may start, and what of a worker's request they can hold. Pure; knows no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Two shares of one GPU that add up to all but this much of it count as all of it (1/3 three times).
SLACK = 1e-9


#: Workers that are asked for at once where nobody knows how many machines there may be.
UNKNOWN_SLOTS = 8


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Machines of one kind: how many run, and how many there may be at most (as many as run without an autoscaler)."""

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)
    running: int = 0
    most: int = 0

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
    nodes: Sequence[Mapping[str, Any]], types: Mapping[str, tuple[Mapping[str, float], int]] | None
) -> tuple[Pool, ...]:
    """The pools of the machines that run and of the node types on offer.

    `nodes`: as `ray.nodes()` gives them. `types`: by name the resources and the most there may be; None without an
    autoscaler. A machine belongs to the type that its label names.
    """
    alive = [node for node in nodes if node.get("Alive")]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for node in alive:
        group = (node.get("Labels") or {}).get("ray.io/node-group") or ""
        shape = {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}
        name = group if types and group in types else f"{group or 'machines'} of {shape['CPU']:g} CPU"
        groups.setdefault(name, []).append(node)
    pools = [
        Pool(name=name, resources=dict(resources), running=len(groups.pop(name, ())), most=most)
        for name, (resources, most) in (types or {}).items()
    ]
    for name, members in groups.items():
        pools.append(Pool(name=name, resources=members[0]["Resources"], running=len(members), most=len(members)))
    return tuple(pools)


def types_of(config: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, float], int]]:
    """The node types of a file for Ray's cluster launcher: resources, and how many there may be (the head: one)."""
    head, every = config.get("head_node_type"), config.get("max_workers", 2)
    return {
        name: (row.get("resources") or {}, 1 if name == head else row.get("max_workers", every))
        for name, row in (config.get("available_node_types") or {}).items()
    }


def asked_for(need: Mapping[str, float]) -> str:
    """{"CPU": 1, "GPU": 0.5} -> "1 CPU, 0.5 GPU"."""
    return ", ".join(f"{many:g} {name}" for name, many in need.items())
