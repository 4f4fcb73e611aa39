"""Comparison of runs: the arguments that differ, the samples whose decision changed, and the metrics of each class."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from utils.errors import InputError
from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS, mean_of_known
from utils.reporting.html_report.gallery import UNDECIDED, WRONG, outcome
from utils.reporting.html_report.page import render_page
from utils.reporting.results_json import ClassResults, Results, read_results
from utils.reporting.tables import aligned, number, one_line

FALSE_ALARMS = ("False alarms", "less is better")
# Name and detail of the metrics, in the order of `_metrics`.
HEADINGS = [
    *(("I-AUROC", ""), ("P-AUROC", ""), ("AU-PRO", f"{REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds")),
    *((f"AU-PRO {limit}", "exact curve") for limit in EXACT_LIMITS),
    *(("F1", "best"), ("Precision", ""), ("Recall", ""), FALSE_ALARMS),
]
ABSENT = "absent"
PRINTED = 20  # changed samples on the terminal; the page has all
IGNORED = ("output_dir", "resume", "save_detector")  # arguments that do not affect the numbers and usually differ


class Row(NamedTuple):
    """Metrics of one run in one class; `best` marks those that no other run exceeds, if the runs differ."""

    class_name: str
    run: str
    values: list[float | None]
    best: list[bool]


class Flip(NamedTuple):
    """A sample that a later run decides otherwise than the first."""

    sample: str  # class and path
    outcomes: list[str]  # by run; "absent" where the run lacks the sample
    severities: list[float | None]  # likewise

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Outcome and severity, as text, by run."""
        texts = ["" if severity is None else f"{severity:.2f}" for severity in self.severities]
        return list(zip(self.outcomes, texts, strict=True))


class Comparison(NamedTuple):
    """Runs A, B, C, …"""

    runs: dict[str, str]  # file and method by letter
    args: dict[str, list[str]]  # arguments that differ, as text, by run
    flips: list[Flip]
    headings: list[tuple[str, str]]  # name and detail of each metric
    rows: list[Row]  # class by class, and the mean last
    remarks: list[str]  # sentences


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare results.json files; errors as in `read_results`."""
    if len(paths) > len(ascii_uppercase):
        raise InputError(f"{len(paths)} runs are too many for one table. Name at most {len(ascii_uppercase)}.")
    results = dict(zip(ascii_uppercase, map(read_results, paths), strict=False))
    names = list(dict.fromkeys(name for run in results.values() for name in run.classes))
    shared = [name for name in names if all(name in run.classes for run in results.values())]
    metrics = {
        name: {key: _metrics(run.classes[name]) for key, run in results.items() if name in run.classes}
        for name in names
    }
    rows = [row for name, by_run in metrics.items() for row in _rows(name, by_run)]
    if len(names) > 1 and shared:
        rows += _rows("Mean", _means([metrics[name] for name in shared], list(results)))
    kept = [k for k in range(len(HEADINGS)) if any(row.values[k] is not None for row in rows)]
    return Comparison(
        {
            key: f"{path} ({run.args.get('method_name', '?')})"
            for (key, run), path in zip(results.items(), paths, strict=True)
        },
        _differing([run.args for run in results.values()])
        | {f"version of {key}": texts for key, texts in _differing([run.versions for run in results.values()]).items()},
        [flip for name in names for flip in _flips(name, [run.classes.get(name) for run in results.values()])],
        [HEADINGS[k] for k in kept],
        [row._replace(values=[row.values[k] for k in kept], best=[row.best[k] for k in kept]) for row in rows],
        list(_remarks(names, shared, results)),
    )


def _metrics(entry: ClassResults) -> list[float | None]:
    exact = [entry.au_pro_exact.get(limit) for limit in EXACT_LIMITS]
    decisions = [entry.f1, entry.precision, entry.recall, entry.false_alarm_rate]
    return [entry.image_rocauc, entry.pixel_rocauc, entry.au_pro, *exact, *decisions]


def _means(classes: Sequence[Mapping[str, list[float | None]]], runs: Sequence[str]) -> dict[str, list[float | None]]:
    """Mean of each metric by run, over the classes in which all runs have a value."""
    complete = [
        [each for each in classes if all(each[run][k] is not None for run in runs)] for k in range(len(HEADINGS))
    ]
    return {run: [mean_of_known(each[run][k] for each in known) for k, known in enumerate(complete)] for run in runs}


def _rows(name: str, values: Mapping[str, list[float | None]]) -> list[Row]:
    """A row for each run; the best of a metric is marked unless three decimals show no difference."""
    best = []
    for k, heading in enumerate(HEADINGS):
        known = [value for row in values.values() if (value := row[k]) is not None]
        ends = [number(each) for each in (min(known), max(known))] if known else ["", ""]
        best.append("" if ends[0] == ends[1] else ends[heading != FALSE_ALARMS])
    return [
        Row(name, run, row, [value is not None and number(value) == best[k] for k, value in enumerate(row)])
        for run, row in values.items()
    ]


def _flips(name: str, entries: Sequence[ClassResults | None]) -> Iterator[Flip]:
    runs = [_outcomes(entry) for entry in entries]
    for path, (first, _) in runs[0].items():
        pairs = [run.get(path, (ABSENT, None)) for run in runs]
        if first != UNDECIDED and any(kind not in (first, UNDECIDED, ABSENT) for kind, _ in pairs):
            yield Flip(f"{name}/{path}", [kind for kind, _ in pairs], [severity for _, severity in pairs])


def _outcomes(entry: ClassResults | None) -> dict[str, tuple[str, float | None]]:
    """Outcome and severity of each sample by path."""
    if entry is None:
        return {}
    threshold = entry.threshold.image if entry.threshold else None
    return {each.path: (outcome(each.label, each.score, threshold), each.severity) for each in entry.samples}


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
    for number_of_run, run in list(enumerate(comparison.runs))[1:]:
        pairs = [(flip.outcomes[0], flip.outcomes[number_of_run]) for flip in comparison.flips]
        changed = [first for first, kind in pairs if kind not in (first, UNDECIDED, ABSENT)]
        better = sum(first in WRONG for first in changed)
        detail = f": {better} for the better, {len(changed) - better} for the worse" if changed else ""
        sentences.append(f"{run} decides {len(changed)} sample{'s' * (len(changed) != 1)} otherwise than A{detail}.")
    return " ".join(sentences)


def comparison_page(comparison: Comparison) -> str:
    """Format the comparison as HTML."""
    title = "Comparison of " + ", ".join(comparison.runs)
    return render_page("comparison.html", title=title, comparison=comparison, summary=flip_summary(comparison))


def format_comparison(comparison: Comparison) -> str:
    """Format the comparison as aligned text."""
    runs, flips = list(comparison.runs), comparison.flips
    blocks = [[f"{key}: {one_line(name)}" for key, name in comparison.runs.items()]]
    args = [[one_line(key), *texts] for key, texts in comparison.args.items()]
    blocks.append(
        ["Arguments that differ", *aligned([["", *runs], *args], str.ljust)] if args else ["No argument differs."]
    )
    changed = [[one_line(flip.sample), *(" ".join(pair).strip() for pair in flip.pairs)] for flip in flips[:PRINTED]]
    blocks.append([flip_summary(comparison), *(aligned([["", *runs], *changed], str.ljust) if changed else [])])
    if len(flips) > PRINTED:
        blocks[-1].append(f"… and {len(flips) - PRINTED} more on the page")
    table = [["", "", *(name for name, _ in comparison.headings)]]
    for row in comparison.rows:
        cells = [number(value) + "* "[not best] for value, best in zip(row.values, row.best, strict=True)]
        table.append([one_line(row.class_name), row.run, *cells])
    blocks.append(["Metrics, the best of each class with *", *aligned(table)])
    blocks += [[remark] for remark in comparison.remarks]
    return "\n\n".join("\n".join(block) for block in blocks)
