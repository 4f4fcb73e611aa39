"""Division of a run's classes among groups of processes."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

logger = logging.getLogger(__name__)

PARALLEL = ("auto", "classes", "samples")
# Assumed fraction of a class's time that more processes do not shorten: SVMs, metrics, report (docs/DISTRIBUTED.md).
SERIAL_FRACTION = 0.1


def divide_classes(parallel: str, costs: Mapping[str, float], processes: int) -> list[list[str]]:
    """Classes of each group of processes. `costs` maps each class to its time on one process; groups keep its order.

    "samples" makes one group, "classes" as many as there are classes or processes, whichever are fewer, and "auto" the
    number of groups that finishes soonest.
    """
    most = max(1, min(len(costs), processes))
    if parallel == "auto":
        count = min(range(1, most + 1), key=lambda count: duration(costs, group_sizes(processes, count)))
    else:
        count = most if parallel == "classes" else 1
    if processes > 1:
        logger.info("%d processes, %d class%s at a time", processes, count, "es" * (count > 1))
    return assign(costs, group_sizes(processes, count))


def group_sizes(processes: int, count: int) -> list[int]:
    """Number of processes in each of `count` groups, as utils.distributed.make_groups divides them."""
    ends = [processes * number // count for number in range(count + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def assign(costs: Mapping[str, float], sizes: Sequence[int]) -> list[list[str]]:
    """Assign classes, the longest first, each to the group that would finish it first (Graham, 1969)."""
    busy_until = [0.0] * len(sizes)
    assigned: list[list[str]] = [[] for _ in sizes]
    for name in sorted(costs, key=lambda each: -costs[each]):
        ends = [begin + costs[name] * time_share(size) for begin, size in zip(busy_until, sizes, strict=True)]
        first = ends.index(min(ends))
        busy_until[first] = ends[first]
        assigned[first].append(name)
    return [[name for name in costs if name in chosen] for chosen in assigned]


def duration(costs: Mapping[str, float], sizes: Sequence[int]) -> float:
    """Time until the last group finishes, in the unit of `costs`."""
    assigned = zip(assign(costs, sizes), sizes, strict=True)
    return max(sum(costs[name] for name in chosen) * time_share(size) for chosen, size in assigned)


def time_share(processes: int) -> float:
    """Time of a class on several processes, relative to one (Amdahl's law)."""
    return SERIAL_FRACTION + (1 - SERIAL_FRACTION) / processes
