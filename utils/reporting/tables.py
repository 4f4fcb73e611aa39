"""Result tables of a run, as Markdown files, as aligned text and as CSV."""

import csv
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from utils.metrics import (
    EXACT_LIMITS,
    REFERENCE_LIMIT,
    REFERENCE_THRESHOLDS,
    deviation_of_known,
    mean_of_known,
    mean_over_classes,
)
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
# By method and seed, all of the same classes; the seed of a run without --seeds is None.
Methods = Mapping[str, Mapping[int | None, Classes]]


class Table(NamedTuple):
    """A table of one metric, for all output formats."""

    file_name: str
    title: str
    rows: list[list[str]]  # header first; cells not escaped
    remarks: list[str]  # sentences below the table


def number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def spread(values: Sequence[float | None]) -> str:
    """Mean of the known values and, if there are several, ± their sample standard deviation."""
    deviation = deviation_of_known(values)
    return number(mean_of_known(values)) + ("" if deviation is None else f" ± {number(deviation)}")


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
    for table in result_tables(methods, exact_headline, note):
        path = folder / table.file_name
        older = path.read_text("utf-8", "backslashreplace").rstrip("\n") if path.exists() else f"# {table.title}"
        code = [f"    {line}" for line in shlex.join(command).splitlines()]
        heading = [f"## {now} · {escape_markdown(', '.join(methods))}", "", *code, ""]
        header, *rows = [f"| {' | '.join(map(escape_markdown, row))} |" for row in table.rows]
        lines = [header, "|---|" + "---:|" * (len(table.rows[0]) - 1), *rows]
        for remark in table.remarks:
            lines += ["", escape_markdown(remark)]
        earlier, _, last = older.rpartition("\n\n## ")
        if resumed and last.endswith("\n\n" + "\n".join(lines)):
            older = earlier
        with atomic_path(path) as temporary:
            text = older + "\n\n" + "\n".join([*heading, *lines]) + "\n"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path: Path, methods: Methods) -> None:
    """Write all figures of results.json, a row for each class, method and seed; undefined ones are empty.

    Several seeds of a class and method are followed by their mean and their sample standard deviation, with "mean" and
    "std" in place of the seed.
    """
    rows = []
    for method, seeds in methods.items():
        for name in next(iter(seeds.values())):
            figures = {seed: _flat(classes[name]) for seed, classes in seeds.items()}
            labeled: dict[Any, dict[str, Any]] = {**figures, **_summaries(list(figures.values()))}
            rows += [{"class": name, "method": method, "seed": seed, **row} for seed, row in labeled.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", -1, "utf-8", "backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a class by column: {"latency": {"p50": 1}} as {"latency_p50": 1}; for a list, its length."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{inner}": each for inner, each in value.items()}
        else:
            flat[key] = len(value) if isinstance(value, list) else value
    return flat


def _summaries(figures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over several seeds of the numbers by column; {} for one seed."""
    if len(figures) < 2:
        return {}
    columns = {key: [each.get(key) for each in figures] for key in figures[0]}
    numbers = {key: values for key, values in columns.items() if not any(isinstance(each, str) for each in values)}
    return {
        "mean": {key: mean_of_known(values) for key, values in numbers.items()},
        "std": {key: deviation_of_known(values) for key, values in numbers.items()},
    }


def format_tables(methods: Methods, exact_headline: bool, note: str | None = None) -> str:
    """Tables of `append_tables` as aligned text for the terminal: I-AUROC, P-AUROC, AU-PRO."""
    return "\n\n".join(
        "\n".join([table.title, *aligned(table.rows), *table.remarks])
        for table in result_tables(methods, exact_headline, note)
    )


def result_line(class_name: str, metrics: Mapping[str, Any], exact_headline: bool) -> str:
    """Metrics of one class on one line, with three decimals; without a test split, the severity of the good samples."""
    split = metrics.get("split", "test")
    if split != "test":
        known = [each["severity"] for each in metrics["samples"] if each["severity"] is not None]
        extent = f"severity {min(known):z.2f} to {max(known):z.2f}" if known else "no severity"
        count = len(metrics["samples"])
        return f"{class_name}: not tested; {count} good sample{'s' * (count != 1)} of the {split} split, {extent}"
    key, label = next(iter(_au_pro_labels(exact_headline).items()))
    return (
        f"{class_name}: I-AUROC {number(metrics['image_rocauc'])}, P-AUROC {number(metrics['pixel_rocauc'])}, "
        f"AU-PRO {number(all_metrics(metrics)[key])} ({label})"
    )


def result_tables(methods: Methods, exact_headline: bool, note: str | None) -> list[Table]:
    """Tables of I-AUROC, P-AUROC and AU-PRO: a row for each method, a column for each class, and the mean.

    With several seeds a cell is their mean ± sample standard deviation. Arguments as in `append_tables`.
    """
    seeds_of_first = next(iter(methods.values()), {})
    names = next(iter(seeds_of_first.values()), {})
    if not names:
        raise ValueError("There is no class to tabulate. Pass the metrics of at least one.")
    header = ["Method", *map(one_line, names), "Mean"]
    tables = []
    for title, labels in (
        ("I-AUROC", {"image_rocauc": ""}),
        ("P-AUROC", {"pixel_rocauc": ""}),
        ("AU-PRO", _au_pro_labels(exact_headline)),
    ):
        rows = [
            [f"{method}, {label}" if label else method, *_cells(seeds, key)]
            for key, label in labels.items()
            for method, seeds in methods.items()
        ]
        remarks = [one_line(note)] if note else []
        if any(UNDEFINED in row[1:] for row in rows):
            remarks.append(UNDEFINED_NOTE)
        tables.append(Table(FILE_NAMES[title], title, [header, *rows], remarks))
    return tables


def _cells(seeds: Mapping[int | None, Classes], key: str) -> list[str]:
    """A metric of each class, and its mean over the classes."""
    runs = [[*classes.values(), mean_over_classes(classes)] for classes in seeds.values()]
    return [spread([all_metrics(entry)[key] for entry in column]) for column in zip(*runs, strict=True)]


def _au_pro_labels(exact_headline: bool) -> dict[str, str]:
    """Limit and curve of each AU-PRO by its key in `all_metrics`, the headline first."""
    labels = {"au_pro": f"limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds"}
    labels |= {limit: f"limit {limit}, exact curve" for limit in EXACT_LIMITS}
    headline = EXACT_LIMITS[0] if exact_headline else "au_pro"
    return {headline: labels[headline]} | labels


def escape_markdown(text: str) -> str:
    """Escape one line of Markdown, so that nothing ends a table cell or opens code, emphasis or a tag."""
    return re.sub(r"([\\|`*<])", r"\\\1", one_line(text))
