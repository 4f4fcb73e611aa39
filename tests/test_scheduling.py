"""Division of classes over the processes of a run, checked by hand."""

import logging
from itertools import chain, product

import pytest

from runner import scheduling
from runner.scheduling import PARALLEL, assign, divide_classes, duration, group_sizes

TEN = {f"class {i}": 1.0 for i in range(10)}


@pytest.fixture(autouse=True)
def serial_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed serial fraction for the hand-computed seconds."""
    monkeypatch.setattr(scheduling, "SERIAL_FRACTION", 0.1)


def uneven(count: int) -> dict[str, float]:
    """Classes with costs in no order, some of them equal."""
    return {f"class {i}": float(1 + (7 * i) % 5) for i in range(count)}


# Assignment: longest class first, each to the group with the least work


@pytest.mark.parametrize(
    ("costs", "groups", "expected"),
    [
        # d 7 to the first, b 5 to the second, a 4 to the second (5 < 7), c 3 to the first (7 < 9), e 1 to the second.
        ({"a": 4, "b": 5, "c": 3, "d": 7, "e": 1}, 2, [["c", "d"], ["a", "b", "e"]]),
        # Greedy, not optimal: 3 3 | 2 2 2 would end at 6, this ends at 7.
        ({"a": 3, "b": 3, "c": 2, "d": 2, "e": 2}, 2, [["a", "c", "e"], ["b", "d"]]),
        # Ties go to the first class and the first group.
        ({"a": 2, "b": 2, "c": 2, "d": 2}, 3, [["a", "d"], ["b"], ["c"]]),
        ({"a": 1, "b": 9}, 2, [["b"], ["a"]]),
        ({"a": 1, "b": 9}, 1, [["a", "b"]]),
        ({"a": 1}, 3, [["a"], [], []]),
        ({}, 2, [[], []]),
    ],
)
def test_longest_class_goes_first_to_the_group_with_least_work(
    costs: dict[str, float], groups: int, expected: list[list[str]]
) -> None:
    assert assign(costs, [1] * groups) == expected
    assert assign(costs, [3] * groups) == expected


def test_class_goes_to_the_group_that_finishes_first() -> None:
    """A class takes its full cost on one process, 0.55 of it on two and 0.4 on three."""
    assert assign({"a": 10, "b": 4}, [1, 2]) == [["b"], ["a"]]
    # c 6 to the group of three (2.4); b 5 to the same group (2.4 + 2 = 4.4 < 5); a 4 to the single process (4 < 6).
    assert assign({"a": 4, "b": 5, "c": 6}, [1, 3]) == [["a"], ["b", "c"]]
    assert duration({"a": 4, "b": 5, "c": 6}, [1, 3]) == pytest.approx(4.4)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_every_class_is_assigned_once_and_in_order(parallel: str) -> None:
    for processes, count in product([1, 2, 3, 7, 16], [0, 1, 2, 5, 10]):
        case = f"{count} classes on {processes} processes"
        costs = uneven(count)
        groups = divide_classes(parallel, costs, processes)
        assert sorted(chain.from_iterable(groups)) == sorted(costs), case
        order = list(costs)
        for chosen in groups:
            assert chosen == sorted(chosen, key=order.index), case
        assert 1 <= len(groups) <= processes, case
        assert all(groups) or count == 0, case  # no group is idle
        sizes = group_sizes(processes, len(groups))
        assert sum(sizes) == processes, case
        assert all(sizes), case


# Number of groups


@pytest.mark.parametrize(
    ("processes", "count", "by_class"), [(1, 3, 1), (2, 3, 2), (3, 3, 3), (5, 3, 3), (8, 1, 1), (4, 0, 1), (2, 10, 2)]
)
def test_number_of_groups_by_class_and_by_sample(processes: int, count: int, by_class: int) -> None:
    costs = uneven(count)
    assert len(divide_classes("classes", costs, processes)) == by_class
    assert divide_classes("samples", costs, processes) == [list(costs)]


@pytest.mark.parametrize(
    ("costs", "processes", "seconds"),
    [
        # One class on two processes: 10 (0.1 + 0.9 / 2).
        ({"a": 10.0}, 2, [5.5]),
        # Three equal classes on two: 3 * 0.55, or two of them in sequence.
        (dict.fromkeys("abc", 1.0), 2, [1.65, 2.0]),
        # Ten on two: 10 * 0.55, or five each.
        (TEN, 2, [5.5, 5.0]),
        # Two on four: 2 (0.1 + 0.9 / 4), or each on two processes.
        (dict.fromkeys("ab", 1.0), 4, [0.65, 0.55]),
        # Three on four: 3 * 0.325; two groups of two, one of which has two classes; or one process each, or two.
        (dict.fromkeys("abc", 1.0), 4, [0.975, 1.1, 1.0]),
        # A long and a short class on three: (10 + 4) 0.4, or the long one on two processes.
        ({"a": 4.0, "b": 10.0}, 3, [5.6, 5.5]),
        # A long class and short ones on two: 14 * 0.55, or 10.
        ({"a": 10.0, "b": 2.0, "c": 2.0}, 2, [7.7, 10.0]),
        ({}, 2, [0.0]),
    ],
)
def test_auto_takes_the_fastest_number_of_groups(costs: dict[str, float], processes: int, seconds: list[float]) -> None:
    found = [duration(costs, group_sizes(processes, groups)) for groups in range(1, len(seconds) + 1)]
    assert found == pytest.approx(seconds)
    fastest = 1 + seconds.index(min(seconds))
    assert len(divide_classes("auto", costs, processes)) == fastest


def test_auto_equals_the_faster_mode() -> None:
    for costs, better in (({"a": 10.0}, "samples"), (dict.fromkeys("abc", 1.0), "samples"), (TEN, "classes")):
        assert divide_classes("auto", costs, 2) == divide_classes(better, costs, 2)
    assert divide_classes("auto", TEN, 2) != divide_classes("samples", TEN, 2)


def test_auto_depends_on_the_serial_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three equal classes on two processes: 3 (A + (1 - A) / 2) against 2 break even at A = 1 / 3."""
    costs = dict.fromkeys("abc", 1.0)
    for alone, groups in ((0.0, 1), (0.3, 1), (0.4, 2), (1.0, 2)):
        monkeypatch.setattr(scheduling, "SERIAL_FRACTION", alone)
        assert duration(costs, [2]) == pytest.approx(3 * (alone + (1 - alone) / 2))
        assert duration(costs, [1, 1]) == 2
        assert len(divide_classes("auto", costs, 2)) == groups


def test_division_is_logged_for_several_processes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    divide_classes("auto", TEN, 1)
    assert caplog.messages == []
    divide_classes("classes", TEN, 2)
    divide_classes("samples", TEN, 2)
    assert caplog.messages == ["2 processes, 2 classes at a time", "2 processes, 1 class at a time"]
