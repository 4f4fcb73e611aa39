"""Which processes of a run do what: groups of them, and the classes of each group."""

import logging
from collections.abc import Mapping, Sequence

from utils.distributed import share, world_size

logger = logging.getLogger(__name__)

PARALLEL = ("auto", "classes", "samples")
# The share of a class's time that more processes do not shorten, assumed: SVMs and metrics are a hundredth on two cores
# (docs/DISTRIBUTED.md), and more with faster networks; selection, report and unequal shares of samples come on top.
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
        count = min(range(1, most + 1), key=lambda count: duration(costs, group_sizes(count)))
    else:
        count = most if parallel == "classes" else 1
    if world_size() > 1:
        logger.info("%d processes, %d class%s at a time", world_size(), count, "es" * (count > 1))
    return assign(costs, group_sizes(count))


def group_sizes(count: int) -> list[int]:
    """How many processes each of `count` groups has, as utils.distributed.make_groups divides them."""
    return [len(share(world_size(), count, number)) for number in range(count)]


def assign(costs: Mapping[str, float], sizes: Sequence[int]) -> list[list[str]]:
    """The longest class first, each to the group of processes that would be done with it first (Graham, 1969)."""
    busy_until = [0.0] * len(sizes)
    assigned: list[list[str]] = [[] for _ in sizes]
    for name in sorted(costs, key=lambda each: -costs[each]):
        ends = [begin + costs[name] * time_share(size) for begin, size in zip(busy_until, sizes, strict=True)]
        first = ends.index(min(ends))
        busy_until[first] = ends[first]
        assigned[first].append(name)
    return [[name for name in costs if name in chosen] for chosen in assigned]


def duration(costs: Mapping[str, float], sizes: Sequence[int]) -> float:
    """When the last group is done, in the unit of `costs`."""
    assigned = zip(assign(costs, sizes), sizes, strict=True)
    return max(sum(costs[name] for name in chosen) * time_share(size) for chosen, size in assigned)


def time_share(processes: int) -> float:
    """What a class takes several processes, of what it takes one (Amdahl's law)."""
    return ALONE + (1 - ALONE) / processes
