"""Result tables of a run for a LaTeX document with the package booktabs."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.reporting.messages import escape_controls
from utils.reporting.tables import Methods, Table, one_line, result_tables
from utils.scans.files import atomic_path

LATEX_NAME = "tables.tex"
SPECIAL = {
    **{each: f"\\{each}" for each in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def write_latex(path: Path, methods: Methods, command: Sequence[str], exact_headline: bool, note: str = "") -> None:
    """Write the tables of a run, in place of those of the run before. Arguments as in `append_tables`."""
    comment = f"% {one_line(escape_controls(shlex.join(command)))}"
    tables = [_latex(table) for table in result_tables(methods, exact_headline, note)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join([comment, *tables]) + "\n", encoding="utf-8", errors="backslashreplace")


def _latex(table: Table) -> str:
    header, *rows = ([_escape(cell) for cell in row] for row in table.rows)
    caption = " ".join([f"{table.title}.", *table.remarks])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            _row(header),
            r"\midrule",
            *map(_row, rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"


def _escape(text: str) -> str:
    """Escape one line of LaTeX. A mean and its deviation become one formula."""
    found = re.fullmatch(r"([\d.]+) ± ([\d.]+)", text)
    if found:
        return rf"${found[1]} \pm {found[2]}$"
    escaped = "".join(SPECIAL.get(each, each) for each in escape_controls(text))
    return re.sub("-(?=-)", "-{}", escaped)  # LaTeX would print a dash
