"""Which processes of a run do what: groups of them, and the classes of each group."""

import logging
from collections.abc import Mapping

from utils.distributed import world_size

logger = logging.getLogger(__name__)

PARALLEL = ("auto", "classes", "samples")
# The share of a class's time that more processes do not shorten: SVMs, metrics, report and the selection among the
# coreset's candidates. Measured, see docs/SCALING.md.
ALONE = 0.1


def divide_classes(parallel: str, costs: Mapping[str, float]) -> list[list[str]]:
    """The classes of each group of processes, each group's in the order of `costs`.

    "classes" makes as many groups as there are classes or processes, "samples" makes one, and "auto" as many as let the
    last class end soonest, by `duration`.

    Args:
        parallel: one of PARALLEL.
        costs: what each class takes a process, in any unit.
    """
    most = max(1, min(len(costs), world_size()))
    if parallel == "auto":
        groups = min(range(1, most + 1), key=lambda count: duration(costs, count, world_size()))
    else:
        groups = most if parallel == "classes" else 1
    if world_size() > 1:
        logger.info("%d processes, %d class%s at a time", world_size(), groups, "es" * (groups > 1))
    return assign(costs, groups)


def assign(costs: Mapping[str, float], groups: int) -> list[list[str]]:
    """The longest class first, each to the group that has least to do (Graham, 1969)."""
    load = [0.0] * groups
    assigned: list[list[str]] = [[] for _ in load]
    for name in sorted(costs, key=lambda each: -costs[each]):
        least = load.index(min(load))
        load[least] += costs[name]
        assigned[least].append(name)
    return [[name for name in costs if name in chosen] for chosen in assigned]


def duration(costs: Mapping[str, float], groups: int, processes: int) -> float:
    """When the last group is done, in the unit of `costs`; within a group by Amdahl's law."""
    longest = max((sum(costs[name] for name in chosen) for chosen in assign(costs, groups)), default=0.0)
    return longest * (ALONE + (1 - ALONE) / (processes // groups))
