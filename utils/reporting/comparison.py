"""Comparison of runs: the arguments that differ, the samples whose decision changed, and the metrics of each class."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import msgspec

from utils.metrics import mean_of_known
from utils.reporting.html_report.gallery import UNDECIDED, WRONG, outcome
from utils.reporting.html_report.page import render_page
from utils.reporting.results_json import ClassResults, Results, read_results
from utils.reporting.tables import HEADINGS, aligned, all_metrics, number, one_line

ABSENT = "absent"
PRINTED = 20  # changed samples on the terminal; the page has all
IGNORED = ("output_dir", "resume", "save_detector")  # arguments that do not affect the numbers and usually differ

Metrics = Mapping[str, float | None]  # by the keys of HEADINGS


class Row(NamedTuple):
    """Metrics of one run in one class."""

    class_name: str
    run: str
    cells: list[tuple[str, bool]]  # value, and True if it is the best and not all are equal


class Comparison(NamedTuple):
    """Comparison of runs, which are named A, B, C, …"""

    runs: dict[str, str]  # file and method by letter
    args: dict[str, list[str]]  # arguments and versions that differ, as text, by run
    # By class and path of the samples that a run decides differently from A: outcome and severity in each run.
    flips: dict[str, list[tuple[str, str]]]
    headings: list[tuple[str, str]]  # name and detail of each metric
    rows: list[Row]  # class by class, and the mean last
    remarks: list[str]  # sentences


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare results.json files; errors as in `read_results`."""
    letters = map("".join, product(["", *ascii_uppercase], ascii_uppercase))  # A to Z, AA to ZZ
    results = dict(zip(letters, map(read_results, paths), strict=False))
    names = list(dict.fromkeys(name for run in results.values() for name in run.classes))
    shared = [name for name in names if all(name in run.classes for run in results.values())]
    metrics = {
        name: {
            key: all_metrics(msgspec.structs.asdict(run.classes[name]))
            for key, run in results.items()
            if name in run.classes
        }
        for name in names
    }
    tables: list[tuple[str, Mapping[str, Metrics]]] = list(metrics.items())
    if len(names) > 1 and shared:
        tables.append(("Mean", _means([metrics[name] for name in shared], list(results))))
    kept = [key for key in HEADINGS if any(each[key] is not None for _, table in tables for each in table.values())]
    versions = _differing(
        [{f"version of {key}": run.versions[key] for key in run.versions} for run in results.values()]
    )
    files = zip(results.items(), paths, strict=True)
    return Comparison(
        {key: f"{path} ({run.args.get('method_name', '?')})" for (key, run), path in files},
        _differing([run.args for run in results.values()]) | versions,
        dict(flip for name in names for flip in _flips(name, [run.classes.get(name) for run in results.values()])),
        [HEADINGS[key] for key in kept],
        [row for name, table in tables for row in _rows(name, table, kept)],
        list(_remarks(names, shared, results)),
    )


def _means(classes: Sequence[Mapping[str, Metrics]], runs: Sequence[str]) -> dict[str, Metrics]:
    """Mean of each metric by run, over the classes in which all runs have a value."""
    complete = {key: [each for each in classes if all(each[run][key] is not None for run in runs)] for key in HEADINGS}
    return {run: {key: mean_of_known(each[run][key] for each in complete[key]) for key in HEADINGS} for run in runs}


def _rows(name: str, table: Mapping[str, Metrics], keys: Sequence[str]) -> list[Row]:
    """A row for each run; the best value of a metric is marked if three decimals show a difference."""
    best = {}
    for key in keys:
        known = sorted(value for row in table.values() if (value := row[key]) is not None)
        ends = [number(value) for value in (*known[:1], *known[-1:])]
        best[key] = ends[0 if key == "false_alarm_rate" else 1] if len(set(ends)) > 1 else ""
    cells = {run: [(number(row[key]), number(row[key]) == best[key]) for key in keys] for run, row in table.items()}
    return [Row(name, run, row) for run, row in cells.items()]


def _flips(name: str, entries: Sequence[ClassResults | None]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    runs = [_outcomes(entry) for entry in entries]
    for path, (first, _) in runs[0].items():
        pairs = [run.get(path, (ABSENT, "")) for run in runs]
        if first != UNDECIDED and any(_differ(first, kind) for kind, _ in pairs):
            yield f"{name}/{path}", pairs


def _differ(first: str, kind: str) -> bool:
    return kind not in (first, UNDECIDED, ABSENT)


def _outcomes(entry: ClassResults | None) -> dict[str, tuple[str, str]]:
    """Outcome and severity, as text, of each sample by path."""
    if entry is None:
        return {}
    threshold = entry.threshold.image if entry.threshold else None
    severities = ["" if each.severity is None else f"{each.severity:z.2f}" for each in entry.samples]
    kinds = [outcome(each.label, each.score, threshold) for each in entry.samples]
    return {each.path: pair for each, pair in zip(entry.samples, zip(kinds, severities, strict=True), strict=True)}


def _remarks(names: Sequence[str], shared: Sequence[str], results: Mapping[str, Results]) -> Iterator[str]:
    for key, run in results.items():
        if alone := [one_line(name) for name in names if name not in run.classes]:
            yield f"{key} lacks {', '.join(alone)}, so the means leave {'it' if len(alone) == 1 else 'them'} out."
    for name in shared:
        counts = {key: len(run.classes[name].samples) for key, run in results.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {key}" for key, count in counts.items())
            yield f"{one_line(name)} has different numbers of samples: {found}."
    if not shared:
        yield "The runs share no class."


def _differing(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    def text(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"

    keys = dict.fromkeys(key for run in runs for key in run if key not in IGNORED)
    texts = {key: [text(run, key) for run in runs] for key in keys}
    return {key: each for key, each in texts.items() if len(set(each)) > 1}


def flip_summary(comparison: Comparison) -> str:
    """Sentence that counts the decisions of each run that differ from those of the first."""
    sentences = []
    for position, run in list(enumerate(comparison.runs))[1:]:
        kinds = [pairs[position][0] for pairs in comparison.flips.values() if _differ(pairs[0][0], pairs[position][0])]
        wrong = sum(kind in WRONG for kind in kinds)
        detail = f": {len(kinds) - wrong} correctly, {wrong} wrongly" if kinds else ""
        sentences.append(f"{run} decides {len(kinds)} sample{'s' * (len(kinds) != 1)} differently from A{detail}.")
    return " ".join(sentences)


def comparison_page(comparison: Comparison) -> str:
    """Format the comparison as HTML."""
    title = "Comparison of " + ", ".join(comparison.runs)
    return render_page("comparison.html", title=title, comparison=comparison, summary=flip_summary(comparison))


def format_comparison(comparison: Comparison) -> str:
    """Format the comparison as aligned text."""
    header = ["", *comparison.runs]
    blocks = [[f"{key}: {one_line(name)}" for key, name in comparison.runs.items()]]
    args = [[one_line(key), *texts] for key, texts in comparison.args.items()]
    same = "All arguments and versions are the same."
    blocks.append(["Arguments that differ", *aligned([header, *args], str.ljust)] if args else [same])
    changed = [[one_line(name), *map(" ".join, pairs)] for name, pairs in comparison.flips.items()]
    blocks.append([flip_summary(comparison), *(aligned([header, *changed[:PRINTED]], str.ljust) if changed else [])])
    if len(changed) > PRINTED:
        blocks[-1].append(f"… and {len(changed) - PRINTED} more on the page")
    table = [["", "", *(name for name, _ in comparison.headings)]]
    for row in comparison.rows:
        table.append([one_line(row.class_name), row.run, *(text + ("*" if best else " ") for text, best in row.cells)])
    blocks.append(["Metrics, with * for the best of each class", *aligned(table)])
    blocks += [[remark] for remark in comparison.remarks]
    return "\n\n".join("\n".join(block) for block in blocks)
