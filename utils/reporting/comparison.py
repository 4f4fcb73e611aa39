"""Two runs side by side: the metrics of each class, their differences, and what the runs did not have in common."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from utils.errors import InputError
from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS
from utils.reporting.text_tables import UNDEFINED, aligned, number, one_line
from utils.scans.files import cannot_read

# Title of each metric by its place in a class's entry of results.json.
METRICS: dict[tuple[str, ...], str] = {
    ("image_rocauc",): "I-AUROC",
    ("pixel_rocauc",): "P-AUROC",
    ("au_pro",): f"AU-PRO, limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds",
    **{("au_pro_exact", limit): f"AU-PRO, limit {limit}, exact curve" for limit in EXACT_LIMITS},
    ("f1",): "F1 at its best threshold",
    ("precision",): "Precision at the calibrated threshold",
    ("recall",): "Recall at the calibrated threshold",
    ("false_alarm_rate",): "False-alarm rate at the calibrated threshold (lower is better)",
}
LOWER_IS_BETTER = {("false_alarm_rate",)}


class Pair(NamedTuple):
    """A figure of both runs; None where it is undefined."""

    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a


class MetricDifference(NamedTuple):
    """One metric of the classes that both runs have."""

    title: str
    sign: int  # 1: more is better, -1: less is
    classes: dict[str, Pair]
    mean: Pair  # over the classes where both have a value
    averaged: int  # how many these are


class Comparison(NamedTuple):
    """Run B against run A."""

    names: tuple[str, str]  # files and methods
    metrics: list[MetricDifference]
    only: tuple[list[str], list[str]]  # classes that only A, only B has
    sizes: dict[str, tuple[int, int]]  # numbers of test parts, of the classes where they differ
    args: dict[str, tuple[str, str]]  # arguments that differ, as text
    versions: dict[str, tuple[str, str]]  # likewise


def read_results(path: Path | str, schema: int) -> dict[str, Any]:
    """Read a results.json.

    Raises:
        InputError: it cannot be read, is no results.json, is of another schema than `schema`, or a metric in it is no
            number from 0 to 1.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        found = "is a folder" if path.is_dir() else "is not there"
        raise InputError(f"{path} {found}: name the results.json that main.py has left in its --output_dir")
    try:
        results = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({one_line(str(error))}): name a results.json that main.py has left"
        ) from error
    if not isinstance(results, dict) or "schema" not in results:
        raise InputError(f"{path} is no results.json, for it has no schema: name one that main.py has left")
    if results["schema"] != schema:
        raise InputError(
            f"{path} has schema {results['schema']!r}, expected {schema}: compare runs of one version of main.py"
        )
    _check(path, results)
    return results


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _check(path: Path, results: Mapping[str, Any]) -> None:
    for key in ("args", "versions", "classes"):
        if not isinstance(results.get(key), dict):
            raise InputError(f"{path} is no results.json of main.py, for it has no {key}: restore it, or run again")
    for name, entry in results["classes"].items():
        for place, title in METRICS.items():
            value = _at(entry, place)
            if value is not None and not _is_share(value):
                raise InputError(
                    f"{path}: {title} of {name} is {value!r:.40}, expected a number from 0 to 1 or null: run it again"
                )


def _is_share(value: object) -> bool:
    """Whether it is a number from 0 to 1; an area may exceed 1 by rounding."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 + 1e-9


def _at(entry: Any, place: tuple[str, ...]) -> Any:
    """What stands at a place of nested mappings, None where there is nothing."""
    for key in place:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def compare(path_a: Path | str, path_b: Path | str, schema: int) -> Comparison:
    """Compare two results.json files; errors as in `read_results`."""
    a, b = read_results(path_a, schema), read_results(path_b, schema)
    names = tuple(f"{path} ({run['args'].get('method_name', '?')})" for path, run in ((path_a, a), (path_b, b)))
    both = [name for name in a["classes"] if name in b["classes"]]
    return Comparison(
        (names[0], names[1]),
        list(_differences(a["classes"], b["classes"], both)),
        ([name for name in a["classes"] if name not in both], [name for name in b["classes"] if name not in both]),
        {name: sizes for name in both if len(set(sizes := (_parts(a, name), _parts(b, name)))) == 2 and all(sizes)},
        _differing(a["args"], b["args"]),
        _differing(a["versions"], b["versions"]),
    )


def _parts(results: Mapping[str, Any], name: str) -> int:
    """How many test parts a class has, 0 where its entry does not list them."""
    samples = _at(results["classes"][name], ("samples",))
    return len(samples) if isinstance(samples, list) else 0


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], names: list[str]) -> Iterator[MetricDifference]:
    """Of every metric that either run has for a class."""
    for place, title in METRICS.items():
        pairs = {name: Pair(_at(a[name], place), _at(b[name], place)) for name in names}
        if all(pair == (None, None) for pair in pairs.values()):
            continue
        defined = [pair for pair in pairs.values() if pair.difference is not None]
        mean = Pair(*np.mean(np.array(defined, dtype=float), axis=0).tolist()) if defined else Pair(None, None)
        yield MetricDifference(title, -1 if place in LOWER_IS_BETTER else 1, pairs, mean, len(defined))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    def text(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], ensure_ascii=False) if key in values else "not there"

    keys = dict.fromkeys([*a, *b])
    return {key: (text(a, key), text(b, key)) for key in keys if text(a, key) != text(b, key)}


def signed(value: float | None) -> str:
    """A difference with its sign; one that rounds to nothing has none."""
    if value is None:
        return UNDEFINED
    return "0.000" if round(value, 3) == 0 else f"{value:+.3f}"


def format_comparison(comparison: Comparison) -> str:
    """The comparison as aligned text."""
    blocks = [[f"A: {one_line(comparison.names[0])}", f"B: {one_line(comparison.names[1])}"]]
    for metric in comparison.metrics:
        rows = [["", "A", "B", "B - A"]]
        rows += [_cells(one_line(name), pair) for name, pair in metric.classes.items()]
        rows.append(_cells(mean_label(metric), metric.mean))
        blocks.append([metric.title, *aligned(rows)])
    blocks += [[remark] for remark in remarks(comparison)]
    for title, differing in (("Arguments", comparison.args), ("Versions", comparison.versions)):
        if differing:
            blocks.append([f"{title} that differ:", *(f"  {key}: {a} -> {b}" for key, (a, b) in differing.items())])
    return "\n\n".join("\n".join(block) for block in blocks)


def _cells(label: str, pair: Pair) -> list[str]:
    return [label, number(pair.a), number(pair.b), signed(pair.difference)]


def mean_label(metric: MetricDifference) -> str:
    left_out = metric.averaged < len(metric.classes)
    return f"Mean of the {metric.averaged} that both have" if left_out else "Mean"


def remarks(comparison: Comparison) -> list[str]:
    """Sentences on what is not compared."""
    said = [
        f"Only in {run}, and in no mean: {', '.join(map(one_line, names))}."
        for run, names in zip("AB", comparison.only, strict=True)
        if names
    ]
    said += [f"{one_line(name)} has {a} test parts in A, {b} in B." for name, (a, b) in comparison.sizes.items()]
    if not comparison.metrics:
        said.append("The runs have no class in common, or no metric of one.")
    return said
