"""What a run leaves to read: the markdown tables, the same tables as text, and results.json.

As a script it puts two runs side by side:

    python -m utils.report A/results.json B/results.json --output compare.html
"""

import argparse
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from utils.errors import InputError, exit_on_input_error
from utils.metrics import EXACT_LIMITS, REFERENCE_LIMIT, REFERENCE_THRESHOLDS, mean_over_classes
from utils.reporting.comparison import compare, format_comparison
from utils.reporting.html_report.comparison_page import write_comparison
from utils.reporting.text_tables import UNDEFINED, aligned, number, one_line, printable
from utils.scans.files import atomic_path

SCHEMA = 1
DISTRIBUTIONS = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "open3d", "pillow")
UNDEFINED_NOTE = f"{UNDEFINED}: undefined for want of defective or of good data; left out of the mean."

Classes = Mapping[str, Mapping[str, Any]]  # {class: metrics of utils.metrics.evaluate}
Methods = Mapping[str, Classes]  # {name of the method: its classes}, all of the same classes


class _Table(NamedTuple):
    file_name: str
    title: str
    rows: list[list[str]]  # the header first; cells as they are, not escaped
    remarks: list[str]  # sentences below the table


def append_tables(
    output_dir: Path | str,
    methods: Methods,
    command: Sequence[str],
    exact_headline: bool,
    note: str | None = None,
) -> None:
    """Append one table of this run to each of image_rocauc_, pixel_rocauc_ and aupro_results.md in `output_dir`.

    Each has a row of every method and stands under a heading with date and command. exact_headline puts the exact
    AU-PRO first instead of the 100-threshold one; every row says which it is. `note` is a sentence that every table
    carries. Older tables are kept, and a reader never meets a file half written.
    """
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    for table in _tables(methods, exact_headline, note):
        path = Path(output_dir) / table.file_name
        older = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else f"# {table.title}"
        lines = [f"## {now} · {_escape(', '.join(methods))}", "", *_fenced(shlex.join(command)), ""]
        lines += [_markdown_row(table.rows[0]), "|---|" + "---:|" * (len(table.rows[0]) - 1)]
        lines += [_markdown_row(row) for row in table.rows[1:]]
        for remark in table.remarks:
            lines += ["", _escape(remark)]
        with atomic_path(path) as temporary:  # backslashreplace: a command line may hold bytes that are no text
            temporary.write_text(older + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells, each column as wide as its widest cell."""
    print("\n".join(aligned(rows, str.ljust)))


def format_tables(methods: Methods, exact_headline: bool, note: str | None = None) -> str:
    """The tables of `append_tables` as aligned text for the terminal: I-AUROC, P-AUROC, AU-PRO."""
    return "\n\n".join(
        "\n".join([table.title, *aligned(table.rows), *table.remarks])
        for table in _tables(methods, exact_headline, note)
    )


def result_line(class_name: str, metrics: Mapping[str, Any], exact_headline: bool) -> str:
    """One class on one line, three decimals, AU-PRO with the word which of the two curves it is from."""
    label, headline = _au_pro_rows([metrics], exact_headline)[0]
    return (
        f"{class_name}: I-AUROC {number(metrics['image_rocauc'])}, P-AUROC {number(metrics['pixel_rocauc'])}, "
        f"AU-PRO {number(headline[0])} ({label})"
    )


def results_record(command: Sequence[str], args: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """The content of results.json, schema 1: what ran, with which versions, each class and the mean over classes."""
    return {
        "schema": SCHEMA,
        "command": list(command),
        "args": dict(args),
        "versions": package_versions(),
        "classes": {name: dict(metrics) for name, metrics in classes.items()},
        "mean": mean_over_classes(classes),
    }


def write_results(output_dir: Path | str, results: Mapping[str, Any]) -> None:
    """Write `results_record` as results.json, unrounded; paths become strings, NumPy values plain ones.

    Raises ValueError for NaN and infinity, which JSON cannot hold, TypeError for what is no data; nothing is written.
    """
    text = json.dumps(results, indent=1, allow_nan=False, default=plain_json)
    with atomic_path(Path(output_dir) / "results.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the figures; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _installed_version(name) for name in DISTRIBUTIONS}


@cache
def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tables(methods: Methods, exact_headline: bool, note: str | None) -> list[_Table]:
    names = next(iter(methods.values()), {})
    if not names:
        raise ValueError("there is no class to tabulate; expected the metrics of at least one")
    header = ["Method", *names, "Mean"]
    columns = {method: [*classes.values(), mean_over_classes(classes)] for method, classes in methods.items()}

    def cells(label: str, values: Sequence[float | None]) -> list[str]:
        return [one_line(label), *map(number, values)]

    def plain_rows(key: str) -> list[list[str]]:
        return [cells(method, [metrics[key] for metrics in of_method]) for method, of_method in columns.items()]

    # The methods side by side, one way of computing AU-PRO after the other.
    areas = {method: _au_pro_rows(of_method, exact_headline) for method, of_method in columns.items()}
    area_rows = [
        cells(f"{method}, {label}", values)
        for kind in zip(*areas.values(), strict=True)
        for method, (label, values) in zip(areas, kind, strict=True)
    ]
    tables = []
    for file_name, title, rows in (
        ("image_rocauc_results.md", "I-AUROC", plain_rows("image_rocauc")),
        ("pixel_rocauc_results.md", "P-AUROC", plain_rows("pixel_rocauc")),
        ("aupro_results.md", "AU-PRO", area_rows),
    ):
        remarks = [one_line(note)] if note else []
        if any(UNDEFINED in row[1:] for row in rows):
            remarks.append(UNDEFINED_NOTE)
        tables.append(_Table(file_name, title, [[one_line(name) for name in header], *rows], remarks))
    return tables


def _au_pro_rows(columns: Sequence[Mapping[str, Any]], exact_headline: bool) -> list[tuple[str, list[float | None]]]:
    """(which AU-PRO, its value in each column), the headline first."""
    published = (
        f"limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds",
        [column["au_pro"] for column in columns],
    )
    exact = [
        (f"limit {limit}, exact curve", [column["au_pro_exact"][limit] for column in columns]) for limit in EXACT_LIMITS
    ]
    return [exact[0], published, *exact[1:]] if exact_headline else [published, *exact]


def _escape(text: str) -> str:
    """One line of Markdown in which nothing ends a table cell or opens code, emphasis or a tag."""
    return re.sub(r"([\\|`*<])", r"\\\1", one_line(text))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _fenced(code: str) -> list[str]:
    """A code block around text that may itself hold backticks: the fence is longer than any run of them."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return [f"{fence}text", code, fence]


def plain_json(value: object) -> object:
    """What json asks for a value it does not know."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r}")


def check_output(path: Path, inputs: Sequence[Path]) -> None:
    """Raises InputError where a page at `path` would replace a folder or a file that is read."""
    if path.is_dir():
        raise InputError(
            f"--output {path} is a folder, expected a file: name one in it, such as {path / 'compare.html'}"
        )
    if path.resolve() in [each.resolve() for each in inputs]:
        raise InputError(f"--output {path} is one of the two results.json files, and would replace it: choose another")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare two runs class by class.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", type=Path, metavar="A/results.json", help="the run that B is measured against")
    parser.add_argument("b", type=Path, metavar="B/results.json", help="another run")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the comparison as a page")
    args = parser.parse_args()
    with exit_on_input_error():
        check_output(args.output, (args.a, args.b))
        comparison = compare(args.a, args.b, SCHEMA)
        print(printable(format_comparison(comparison)))
        try:
            write_comparison(args.output, comparison)
        except OSError as error:
            raise InputError(f"{args.output} cannot be written ({error.strerror}): choose another --output") from None
        print(printable(f"\nwritten to {args.output}"))


if __name__ == "__main__":
    main()
