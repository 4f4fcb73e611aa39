"""Result tables of a run, as Markdown files and as aligned text."""

import csv
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS, mean_over_classes
from utils.reporting.messages import escape_controls, show
from utils.scans.files import atomic_path

FILE_NAMES = {
    "I-AUROC": "image_rocauc_results.md", "P-AUROC": "pixel_rocauc_results.md", "AU-PRO": "aupro_results.md",
}  # fmt: skip
CSV_NAME = "results.csv"
UNDEFINED = "n/a"
UNDEFINED_NOTE = f"{UNDEFINED}: needs good and defective test samples; left out of the mean."

# Name and detail of each metric of a class, by its key in results.json.
HEADINGS = {
    "image_rocauc": ("I-AUROC", ""),
    "pixel_rocauc": ("P-AUROC", ""),
    "au_pro": ("AU-PRO", f"{REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds"),
    **{limit: (f"AU-PRO {limit}", "exact curve") for limit in EXACT_LIMITS},
    "f1": ("F1", "best threshold"),
    "precision": ("Precision", "at the threshold"),
    "recall": ("Recall", "at the threshold"),
    "false_alarm_rate": ("False alarms", "lower is better"),
}

Classes = Mapping[str, Mapping[str, Any]]  # metrics of utils.metrics.evaluate by class
Methods = Mapping[str, Classes]  # by method, all of the same classes


class _Table(NamedTuple):
    file_name: str
    title: str
    rows: list[list[str]]  # header first; cells not escaped
    remarks: list[str]  # sentences below the table


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def all_metrics(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics of a class or of the mean in results.json under the keys of HEADINGS; None where there is no value."""
    flat = {**entry, **entry["au_pro_exact"]}
    return {key: flat.get(key) for key in HEADINGS}


def one_line(text: str) -> str:
    return " ".join(text.split())


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.rjust) -> list[str]:
    """Lines with aligned columns, for terminals: the first column to the left, the others by `justify`."""
    rows = [[escape_controls(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(justify, row[1:], widths[1:])]).rstrip() for row in rows]


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in columns aligned to the left."""
    for line in aligned(rows, str.ljust):
        show(line)


def append_tables(
    folder: Path, methods: Methods, command: Sequence[str], exact_headline: bool, note: str = "", resumed: bool = False
) -> None:
    """Append a table of this run to image_rocauc_, pixel_rocauc_ and aupro_results.md; older tables stay.

    `command` stands above each table and `note` below. `exact_headline` puts the exact AU-PRO before the one of 100
    thresholds. A `resumed` run replaces the last table if both are equal, because the killed run wrote it.
    """
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    for table in _tables(methods, exact_headline, note):
        path = folder / table.file_name
        older = path.read_text("utf-8", "backslashreplace").rstrip("\n") if path.exists() else f"# {table.title}"
        code = [f"    {line}" for line in shlex.join(command).splitlines()]
        heading = [f"## {now} · {_escape(', '.join(methods))}", "", *code, ""]
        header, *rows = [f"| {' | '.join(map(_escape, row))} |" for row in table.rows]
        lines = [header, "|---|" + "---:|" * (len(table.rows[0]) - 1), *rows]
        for remark in table.remarks:
            lines += ["", _escape(remark)]
        earlier, _, last = older.rpartition("\n\n## ")
        if resumed and last.endswith("\n\n" + "\n".join(lines)):
            older = earlier
        with atomic_path(path) as temporary:
            text = older + "\n\n" + "\n".join([*heading, *lines]) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path: Path, methods: Methods) -> None:
    """Write all figures of results.json, a row for each class and method; a cell is empty where one is undefined."""
    rows = [
        {"class": name, "method": method, **_flat(entry)}
        for method, classes in methods.items()
        for name, entry in classes.items()
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", -1, "utf-8", "backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a class by column: {"latency": {"p50": 1}} as {"latency_p50": 1}; for samples, their number."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{inner}": each for inner, each in value.items()}
        else:
            flat[key] = len(value) if key == "samples" else value
    return flat


def format_tables(methods: Methods, exact_headline: bool, note: str | None = None) -> str:
    """Tables of `append_tables` as aligned text for the terminal: I-AUROC, P-AUROC, AU-PRO."""
    return "\n\n".join(
        "\n".join([table.title, *aligned(table.rows), *table.remarks])
        for table in _tables(methods, exact_headline, note)
    )


def result_line(class_name: str, metrics: Mapping[str, Any], exact_headline: bool) -> str:
    """Metrics of one class on one line, with three decimals; without a test split, the severity of the good samples."""
    split = metrics.get("split", "test")
    if split != "test":
        known = [each["severity"] for each in metrics["samples"] if each["severity"] is not None]
        extent = f"severity {min(known):z.2f} to {max(known):z.2f}" if known else "no severity"
        count = len(metrics["samples"])
        return f"{class_name}: not tested; {count} good sample{'s' * (count != 1)} of the {split} split, {extent}"
    label, headline = _au_pro_rows([metrics], exact_headline)[0]
    return (
        f"{class_name}: I-AUROC {number(metrics['image_rocauc'])}, P-AUROC {number(metrics['pixel_rocauc'])}, "
        f"AU-PRO {number(headline[0])} ({label})"
    )


def _tables(methods: Methods, exact_headline: bool, note: str | None) -> list[_Table]:
    names = next(iter(methods.values()), {})
    if not names:
        raise ValueError("There is no class to tabulate. Pass the metrics of at least one.")
    columns = {method: [*classes.values(), mean_over_classes(classes)] for method, classes in methods.items()}
    rows: dict[str, list[list[str]]] = {}
    for title, key in (("I-AUROC", "image_rocauc"), ("P-AUROC", "pixel_rocauc")):
        rows[title] = [[method, *(number(each[key]) for each in of_method)] for method, of_method in columns.items()]
    rows["AU-PRO"] = []
    areas = [_au_pro_rows(of_method, exact_headline) for of_method in columns.values()]
    for same_curve in zip(*areas, strict=True):  # all methods of one AU-PRO, then all of the next
        for method, (label, values) in zip(columns, same_curve, strict=True):
            rows["AU-PRO"].append([f"{method}, {label}", *map(number, values)])
    header = ["Method", *map(one_line, names), "Mean"]
    tables = []
    for title, of_metric in rows.items():
        remarks = [one_line(note)] if note else []
        if any(UNDEFINED in row[1:] for row in of_metric):
            remarks.append(UNDEFINED_NOTE)
        tables.append(_Table(FILE_NAMES[title], title, [header, *of_metric], remarks))
    return tables


def _au_pro_rows(columns: Sequence[Mapping[str, Any]], exact_headline: bool) -> list[tuple[str, list[float | None]]]:
    """Label and values by column of each AU-PRO, the headline first."""
    published = f"limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds", [each["au_pro"] for each in columns]
    exact = [(f"limit {key}, exact curve", [each["au_pro_exact"][key] for each in columns]) for key in EXACT_LIMITS]
    return [exact[0], published, *exact[1:]] if exact_headline else [published, *exact]


def _escape(text: str) -> str:
    """Escape one line of Markdown, so that nothing ends a table cell or opens code, emphasis or a tag."""
    return re.sub(r"([\\|`*<])", r"\\\1", one_line(text))
