"""Tables of a reproduction: our metrics of each method and class beside the published ones, and their difference."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from utils.metrics import REFERENCE_LIMIT, REFERENCE_THRESHOLDS, mean_of_known
from utils.reporting.html_report.page import render_page
from utils.reporting.html_report.published import Published, published_figures
from utils.reporting.results_json import Results
from utils.reporting.tables import Table, aligned, escape_markdown, number, spread

METRICS = {  # titles by key in results.json
    "image_rocauc": "I-AUROC",
    "pixel_rocauc": "P-AUROC",
    "au_pro": f"AU-PRO (limit {REFERENCE_LIMIT}, {REFERENCE_THRESHOLDS} thresholds)",
}
Runs = Mapping[str, Sequence[Results]]  # by method, one run for each seed


def paper_tables(runs: Runs) -> list[Table]:
    """I-AUROC, P-AUROC and AU-PRO of runs with the same classes.

    Each method has a row of our figures. Rows with the published figures and the difference follow if
    `published_figures` has some for the settings and samples of the run.
    """
    classes = list(next(iter(runs.values()))[0].classes)
    published = published_of(runs)
    tables = []
    for key, title in METRICS.items():
        rows = [["Method", "", *classes, "Mean"]]
        for method, of_seeds in runs.items():
            ours = [[getattr(run.classes[name], key) for run in of_seeds] for name in classes]
            ours.append([mean_of_known(of_seed) for of_seed in zip(*ours, strict=True)])
            rows.append([method, "ours", *map(spread, ours)])
            if known := published.get(method):
                figures = [known.classes[name].get(key) for name in classes] + [known.mean.get(key)]
                rows.append(["", "published", *("" if value is None else number(value) for value in figures)])
                rows.append(["", "difference", *map(_difference, ours, figures)])
        tables.append(Table("", title, rows, []))
    return tables


def published_of(runs: Runs) -> dict[str, Published]:
    """Published figures of the methods that have some."""
    found = {}
    for method, (first, *_) in runs.items():
        entries: dict[str, Any] = {name: msgspec.structs.asdict(entry) for name, entry in first.classes.items()}
        if figures := published_figures(first.args, entries):
            found[method] = figures
    return found


def _difference(values: Sequence[float | None], published: float | None) -> str:
    ours = mean_of_known(values)
    return "" if ours is None or published is None else f"{round(ours - published, 3) + 0.0:+.3f}"  # never -0.000


def remarks(runs: Runs, seeds: Sequence[int]) -> list[str]:
    """Sentences below the tables: sources of the published figures, methods without any, and seeds."""
    published = published_of(runs)
    found = [f"Published figures of {method}: {figures.source}." for method, figures in published.items()]
    if without := [method for method in runs if method not in published]:
        found.append(
            f"No published figures for {', '.join(without)}: either none are recorded, or dataset, classes, samples or "
            "settings differ from the paper's."
        )
    if len(seeds) > 1:
        found.append(f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}.")
    else:
        found.append(f"Seed {seeds[0]}.")
    return found


def tables_text(tables: Sequence[Table]) -> str:
    """Tables as aligned text for the terminal."""
    return "\n\n".join("\n".join([table.title, *aligned(table.rows)]) for table in tables)


def tables_markdown(tables: Sequence[Table], notes: Sequence[str], command: str) -> str:
    """Tables, notes and the command as Markdown."""
    blocks = ["# Reproduction of the paper's tables"]
    for table in tables:
        head, *rows = [f"| {' | '.join(map(escape_markdown, row))} |" for row in table.rows]
        blocks += [f"## {table.title}", "\n".join([head, "|---|---|" + "---:|" * (len(table.rows[0]) - 2), *rows])]
    code = "\n".join(f"    {line}" for line in command.splitlines())
    return "\n\n".join([*blocks, *map(escape_markdown, notes), code]) + "\n"


def tables_page(tables: Sequence[Table], notes: Sequence[str], command: str) -> str:
    """Tables, notes and the command as a page of HTML."""
    title = "Reproduction of the paper's tables"
    return render_page("paper.html", title=title, tables=tables, notes=notes, command=command)
