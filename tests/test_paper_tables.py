"""Tables of a reproduction: ours, published, difference, and mean and deviation over seeds."""

import pytest
from report_pages import read_page

from utils.reporting.html_report.published import CLASSES, PAPER_ARGS, TEST_SAMPLES
from utils.reporting.paper_tables import Runs, paper_tables, remarks, tables_markdown, tables_page, tables_text
from utils.reporting.results_json import ClassResults, Results, SampleScore

FULL, EVIL = "DINO+Point_MAE+Fusion", "<script>|x"


def run(method: str, value: float | None, missing: int = 0, names: tuple[str, ...] = CLASSES) -> Results:
    """Results with the paper's settings and test samples, minus `missing`, and the same value in every class."""
    args = PAPER_ARGS | {"method_name": method, "use_uff": True, "max_sample": 400}
    sample = SampleScore("test/good/000", 0, 0.0, None)
    classes = {
        name: ClassResults(value, value, value, samples=[sample] * (TEST_SAMPLES.get(name, 4) - missing))
        for name in names
    }
    return Results(2, args, {}, classes)


def rows_of(runs: Runs, table: int = 0) -> dict[str, list[str]]:
    """Cells of the rows of a table by "method row"."""
    rows, method = {}, ""
    for name, kind, *cells in paper_tables(runs)[table].rows[1:]:
        method = name or method
        rows[f"{method} {kind}"] = cells
    return rows


def test_difference_is_ours_minus_published() -> None:
    rows = rows_of({FULL: [run(FULL, 0.95)]})
    assert rows[f"{FULL} ours"] == ["0.950"] * 11
    assert rows[f"{FULL} published"][:2] == ["0.994", "0.909"]
    assert rows[f"{FULL} difference"][:2] == ["-0.044", "+0.041"]
    assert (rows[f"{FULL} published"][-1], rows[f"{FULL} difference"][-1]) == ("0.945", "+0.005")


def test_a_difference_that_rounds_to_zero_has_no_minus() -> None:
    assert rows_of({FULL: [run(FULL, 0.9086)]})[f"{FULL} difference"][1] == "+0.000"


def test_three_tables_with_their_own_published_figures() -> None:
    runs = {FULL: [run(FULL, 0.95)]}
    assert [table.title for table in paper_tables(runs)] == [
        "I-AUROC", "P-AUROC", "AU-PRO (limit 0.3, 100 thresholds)"
    ]  # fmt: skip
    assert [rows_of(runs, number)[f"{FULL} published"][-1] for number in range(3)] == ["0.945", "0.992", "0.964"]


def test_several_seeds_give_mean_and_sample_deviation() -> None:
    runs = {FULL: [run(FULL, value) for value in (0.9, 0.92, 0.94)]}
    rows = rows_of(runs)
    assert rows[f"{FULL} ours"] == ["0.920 ± 0.020"] * 11
    assert rows[f"{FULL} difference"][0] == "-0.074"
    assert "Mean ± standard deviation over the seeds 3, 4, 5." in remarks(runs, [3, 4, 5])


@pytest.mark.parametrize(
    ("method", "missing", "names"),
    [("DINO", 0, CLASSES), (FULL, 1, CLASSES), (FULL, 0, ("gasket",))],
    ids=["method", "samples", "classes"],
)
def test_unknown_figures_and_other_settings_have_no_published_rows(
    method: str, missing: int, names: tuple[str, ...]
) -> None:
    runs = {method: [run(method, 0.95, missing, names)]}
    assert list(rows_of(runs)) == [f"{method} ours"]
    assert remarks(runs, [0])[0].startswith(f"No published figures for {method}: ")


def test_undefined_metrics() -> None:
    rows = rows_of({FULL: [run(FULL, None)]})
    assert rows[f"{FULL} ours"] == ["n/a"] * 11
    assert rows[f"{FULL} difference"] == [""] * 11


def test_texts_hold_the_figures_and_their_sources() -> None:
    runs = {FULL: [run(FULL, 0.95)], "DINO": [run("DINO", 0.85)]}
    tables, notes = paper_tables(runs), remarks(runs, [0])
    page = read_page(tables_page(tables, notes, "python -m runner.reproduce"))
    for text in (page.text, tables_markdown(tables, notes, "python -m runner.reproduce")):
        for part in ("0.850", "0.994", "-0.044", "CVPR 2023", "No published figures for DINO", "python -m runner"):
            assert part in text
    assert page.count("table") == 3
    assert "DINO+Point_MAE+Fusion ours 0.950" in " ".join(tables_text(tables).split())


def test_names_are_escaped() -> None:
    tables = paper_tables({"DINO": [run("DINO", 0.9, names=(EVIL,))]})
    page = tables_page(tables, [EVIL], EVIL)
    assert EVIL not in page
    assert read_page(page).text.count(EVIL) == 5
    assert r"\<script>\|x | Mean |" in tables_markdown(tables, [], "")
