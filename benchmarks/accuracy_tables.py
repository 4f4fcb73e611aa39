"""Markdown tables of the accuracy benchmark."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.accuracy_features import Trial

BASE = "reference"  # protocol that the others are compared with
METRICS = ("I-AUROC", "P-AUROC", "AU-PRO 0.3", "AU-PRO 0.01")

Key = tuple[str, str, str]  # name of a trial, method, variant of the protocol
Results = Mapping[Key, Sequence[float]]  # in the order of METRICS
Rows = dict[tuple[str, ...], Sequence[str]]


def means_table(results: Results, trials: Sequence[Trial], methods: Sequence[str], variants: Sequence[str]) -> str:
    """Mean over the classes of every method and variant, with the deviation over the seeds."""
    rows: Rows = {}
    for method, variant in itertools.product(methods, variants):
        by_seed: dict[int | None, list[Trial]] = {}
        for each in trials:
            if (each.name, method, variant) in results:
                by_seed.setdefault(each.seed, []).append(each)
        means = [values_of(results, group, method, variant).mean(axis=0) for group in by_seed.values()]
        if means:
            rows[f"`{method}`", variant] = [_with_deviation(column) for column in np.array(means).T]
    return _table(("method", "protocol"), rows)


def differences_table(results: Results, trials: Sequence[Trial], method: str, variants: Sequence[str]) -> str:
    """Mean difference of each variant from `reference` in the same trial, with its standard error."""
    rows: Rows = {(variant,): _differences(results, trials, method, variant) for variant in variants if variant != BASE}
    return _table(("protocol",), {name: cells for name, cells in rows.items() if cells})


def classes_table(results: Results, trials: Sequence[Trial], method: str, variant: str) -> str:
    """Mean difference of a variant from `reference` in each class, with its standard error over the seeds."""
    names = list(dict.fromkeys(each.class_name for each in trials))
    groups: dict[tuple[str, ...], list[Trial]] = {
        (name,): [each for each in trials if each.class_name == name] for name in names
    }
    rows: Rows = {name: _differences(results, group, method, variant) for name, group in groups.items()}
    return _table(("class",), {name: cells for name, cells in rows.items() if cells})


def values_of(results: Results, trials: Sequence[Trial], method: str, variant: str) -> np.ndarray:
    """Metrics of each trial, and their mean: (N, 5)."""
    values = np.array([results[each.name, method, variant] for each in trials]).reshape(-1, len(METRICS))
    return np.column_stack([values, values.mean(axis=1)])


def _differences(results: Results, trials: Sequence[Trial], method: str, variant: str) -> list[str]:
    """Cells of a row of differences from BASE; [] if no trial was measured with both."""
    both = [t for t in trials if (t.name, method, variant) in results and (t.name, method, BASE) in results]
    difference = values_of(results, both, method, variant) - values_of(results, both, method, BASE)
    return [_with_error(column) for column in difference.T] if both else []


def _with_deviation(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _with_error(values: np.ndarray) -> str:
    error = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{values.mean():+.3f}{error}"


def _table(names: Sequence[str], rows: Rows) -> str:
    columns = (*METRICS, "mean of the four")
    lines = [f"| {' | '.join((*names, *columns))} |", f"|{'---|' * len(names)}{'---:|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join((*name, *cells))} |" for name, cells in rows.items())])
