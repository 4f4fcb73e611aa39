"""Comparison of runs (python -m utils.report A B …): arguments, decisions and metrics that differ."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cleaning_runs import call_script
from conftest import ROOT
from report_pages import read_page

from utils import report
from utils.errors import InputError
from utils.reporting.comparison import PRINTED, Row, compare, comparison_page, format_comparison
from utils.reporting.results_json import read_results, results_record
from utils.scans.json_records import write_record

EVIL = "<script>alert(1)</script>"


def metrics(value: float | None, **changed: object) -> dict:
    exact = dict.fromkeys(("0.3", "0.1", "0.05", "0.01"), value)
    return {**dict.fromkeys(("image_rocauc", "pixel_rocauc", "au_pro"), value), "au_pro_exact": exact, **changed}


def scores(*values: float) -> list[dict]:
    """Samples of results.json; every second one is defective."""
    return [
        {"path": f"test/{('good', 'hole')[i % 2]}/{i:03d}", "label": i % 2, "score": value, "severity": value / 0.5}
        for i, value in enumerate(values)
    ]


def write(folder: Path, classes: dict, args: dict | None = None, **changed: object) -> Path:
    record = results_record(["main.py"], {"method_name": "DINO", **(args or {})}, classes)
    write_record(folder / "results.json", record | changed)
    return folder / "results.json"


@pytest.fixture(name="runs")
def runs_fixture(tmp_path: Path) -> tuple[Path, Path]:
    a = write(tmp_path / "A", {"bagel": metrics(0.9), "rope": metrics(0.8), "foam": metrics(0.1)}, {"f_coreset": 0.1})
    b = write(
        tmp_path / "B",
        {"bagel": metrics(0.95), "rope": metrics(0.7, image_rocauc=0.8, au_pro=None), "tire": metrics(0.99)},
        {"f_coreset": 0.2, "precision": "bf16"},
        versions={"python": "3.11", "torch": "9.9"},
    )
    return a, b


def call(folder: Path, *arguments: object, output: str | None = None) -> "subprocess.CompletedProcess[str]":
    output = str(folder / "compare.html") if output is None else output
    return call_script(report.main, *arguments, "--output", output)


def blocks_of(text: str) -> dict[str, list[list[str]]]:
    """Tables of the text by title."""
    blocks = {}
    for block in text.split("\n\n"):
        title, *lines = block.splitlines()
        blocks[title] = [re.split(r" {2,}", line.strip()) for line in lines]
    return blocks


def metric(rows: list[Row], column: int) -> dict[tuple[str, str], tuple[str, bool]]:
    """Value of a metric by class and run, and whether it is marked as the best."""
    return {(row.class_name, row.run): row.cells[column] for row in rows}


def test_metrics_of_every_class_and_run_with_the_best_marked(runs: tuple[Path, Path]) -> None:
    comparison = compare([*runs, runs[0]])
    assert comparison.headings[1] == ("P-AUROC", "")
    assert metric(comparison.rows, 1) == {
        ("bagel", "A"): ("0.900", False),
        ("bagel", "B"): ("0.950", True),
        ("bagel", "C"): ("0.900", False),
        ("rope", "A"): ("0.800", True),
        ("rope", "B"): ("0.700", False),
        ("rope", "C"): ("0.800", True),
        ("foam", "A"): ("0.100", False),
        ("foam", "C"): ("0.100", False),
        ("tire", "B"): ("0.990", False),
        ("Mean", "A"): ("0.850", True),
        ("Mean", "B"): ("0.825", False),
        ("Mean", "C"): ("0.850", True),
    }
    table = blocks_of(format_comparison(comparison))["Metrics, with * for the best of each class"]
    assert table[0][:3] == ["I-AUROC", "P-AUROC", "AU-PRO"]
    assert table[2] == ["bagel", "B", *["0.950*"] * 7]
    assert not any("Precision" in heading for heading, _ in comparison.headings)  # no run has it


def test_a_mean_covers_the_classes_for_which_all_runs_have_a_value(runs: tuple[Path, Path]) -> None:
    assert metric(compare(runs).rows, 2)["Mean", "A"] == ("0.900", False)  # B has no AU-PRO of rope


def test_equal_three_decimals_are_not_marked(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, {"bagel": metrics(value)}) for name, value in (("A", 0.9), ("B", 0.9004)))
    assert not any(best for row in compare([a, b]).rows for _, best in row.cells)


def test_fewer_false_alarms_are_the_best(tmp_path: Path) -> None:
    a, b = (
        write(tmp_path / name, {"bagel": metrics(None, false_alarm_rate=rate)})
        for name, rate in (("A", 0.1), ("B", 0.2))
    )
    assert metric(compare([a, b]).rows, 0) == {("bagel", "A"): ("0.100", True), ("bagel", "B"): ("0.200", False)}


def test_runs_after_z_have_two_letters(runs: tuple[Path, Path]) -> None:
    assert list(compare([runs[0]] * 28).runs)[24:] == ["Y", "Z", "AA", "AB"]


def test_arguments_and_versions_that_differ_come_first(runs: tuple[Path, Path]) -> None:
    text = format_comparison(compare(runs))
    table = blocks_of(text)["Arguments that differ"]
    assert ["f_coreset", "0.1", "0.2"] in table
    assert ["precision", "absent", '"bf16"'] in table
    assert any(row[0] == "version of torch" and row[2] == '"9.9"' for row in table)
    assert "method_name" not in text and "output_dir" not in text
    assert text.index("Arguments that differ") < text.index("differently from A") < text.index("Metrics")
    page = read_page(comparison_page(compare(runs))).text
    assert page.index("f_coreset 0.1 0.2") < page.index("differently from A") < page.index("P-AUROC")


def flipped(folder: Path) -> list[Path]:
    """Three runs: good, hole, good, hole at a threshold of 0.5."""
    of_run = {"A": (0.1, 0.4, 0.7, 0.9), "B": (0.6, 0.8, 0.7, 0.9), "C": (0.1, 0.4, 0.2)}
    return [
        write(folder / name, {"bagel": metrics(0.9, samples=scores(*values), threshold={"image": 0.5})})
        for name, values in of_run.items()
    ]


def test_samples_decided_otherwise_than_in_the_first_run_are_listed(tmp_path: Path) -> None:
    comparison = compare(flipped(tmp_path))
    assert comparison.flips == {
        "bagel/test/good/000": [("correct pass", "0.20"), ("false alarm", "1.20"), ("correct pass", "0.20")],
        "bagel/test/hole/001": [("miss", "0.80"), ("hit", "1.60"), ("miss", "0.80")],
        "bagel/test/good/002": [("false alarm", "1.40"), ("false alarm", "1.40"), ("correct pass", "0.40")],
    }
    for text in (format_comparison(comparison), read_page(comparison_page(comparison)).text):
        assert "B decides 2 samples differently from A: 1 correctly, 1 wrongly." in text
        assert "C decides 1 sample differently from A: 1 correctly, 0 wrongly." in text
        assert all(" ".join(pairs[1]) in text for pairs in comparison.flips.values())


def test_the_terminal_shows_the_first_of_many_changed_samples(tmp_path: Path) -> None:
    count = PRINTED + 3
    a, b = (
        write(tmp_path / name, {"bagel": metrics(0.9, samples=scores(*[score] * count), threshold={"image": 0.5})})
        for name, score in (("A", 0.1), ("B", 0.9))
    )
    comparison = compare([a, b])
    assert format_comparison(comparison).count("test/") == PRINTED
    assert "… and 3 more on the page" in format_comparison(comparison)
    assert read_page(comparison_page(comparison)).text.count("test/") == count


def test_no_decision_is_compared_without_a_threshold(tmp_path: Path) -> None:
    samples = [each | {"severity": None} for each in scores(0.1, 0.9)]
    undecided = write(tmp_path / "D", {"bagel": metrics(0.9, samples=samples)})
    decided = flipped(tmp_path)[0]
    assert compare([decided, undecided]).flips == compare([undecided, decided]).flips == {}


def test_classes_and_samples_that_only_some_runs_have_are_named(runs: tuple[Path, Path], tmp_path: Path) -> None:
    text = format_comparison(compare(runs))
    assert "A lacks tire, so the means leave it out." in text
    assert "B lacks foam, so the means leave it out." in text
    remark = "bagel has different numbers of samples: 4 in A, 3 in B."
    first, _, third = flipped(tmp_path)
    comparison = compare([first, third])
    assert comparison.remarks == [remark]
    assert remark in read_page(comparison_page(comparison)).text


def test_equal_runs_have_no_differences(tmp_path: Path) -> None:
    path = flipped(tmp_path)[0]
    comparison = compare([path, path])
    assert (comparison.remarks, comparison.args, comparison.flips) == ([], {}, {})
    assert not any(best for row in comparison.rows for _, best in row.cells)
    assert "All arguments and versions are the same." in format_comparison(comparison)


def test_runs_without_a_common_class_are_reported(tmp_path: Path) -> None:
    comparison = compare([write(tmp_path / name, {name: metrics(0.9)}) for name in ("A", "B")])
    assert "The runs share no class." in format_comparison(comparison)
    assert "Mean" not in read_page(comparison_page(comparison)).text


# The page


def test_the_page_has_every_value_and_no_script(runs: tuple[Path, Path]) -> None:
    comparison = compare(runs)
    page = comparison_page(comparison)
    rows = re.findall(r"<tr(?: class=\"first\")?><th scope=\"row\">.*?</tr>", page.split("<h2>Metrics</h2>")[1])
    assert [re.findall(r"<td(?: class=\"best\")?>(.*?)</td>", row)[1:] for row in rows] == [
        [text for text, _ in row.cells] for row in comparison.rows
    ]
    assert page.count('class="best"') == sum(best for row in comparison.rows for _, best in row.cells) > 0
    assert "script-src &#39;none&#39;" in page


def test_text_is_escaped(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {EVIL: metrics(0.9)}, {"method_name": EVIL, EVIL: 1})
    b = write(tmp_path / "B", {EVIL: metrics(0.8), "</td>" + EVIL: metrics(0.1)})
    page = comparison_page(compare([a, b]))
    assert "<script" not in page
    assert read_page(page).text.count(EVIL) > 6


# The command


def test_the_command_prints_the_text_and_writes_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The command, run in a new process from the checkout, prints the text and writes the page."""
    command = [sys.executable, "-m", "utils.report", *map(str, runs), "--output", str(tmp_path / "compare.html")]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=ROOT, env=strict, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    comparison = compare(runs)
    assert done.stdout == f"{format_comparison(comparison)}\n\nwritten to {tmp_path / 'compare.html'}\n"
    assert (tmp_path / "compare.html").read_text() == comparison_page(comparison)


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match=r"results\.json is missing\. Name a results\.json of main\.py\."):
        read_results(path)
    with pytest.raises(InputError, match=r"is a folder\. Name the results\.json in it\."):
        read_results(tmp_path)
    start = '{"schema": 2, "args": {}, "versions": {}'
    for content, expected in (
        ("{", "not JSON"),
        ('{"a": 1}', "no schema number"),
        ('{"schema": 99}', "newer version"),
        (start + "}", "missing required field `classes`"),
        (start + ', "classes": {"bagel": {"image_rocauc": "x"}}}', "got `str` at `classes[...].image_rocauc`"),
        (start + ', "classes": {"bagel": {"f1": -0.1}}}', ">= 0.0 at `classes[...].f1`"),
        (start + ', "classes": {"bagel": {"au_pro_exact": {"0.3": 2}}}}', "at `classes[...].au_pro_exact[...]`"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=re.escape(expected)):
            read_results(path)


def test_a_single_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = call(tmp_path, runs[0])
    assert done.returncode == 2
    assert "is the only run. Add the results.json of another run." in done.stderr


def test_a_missing_file_ends_the_command_with_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = call(tmp_path, runs[0], tmp_path / "none.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("report.py: error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("output", "expected"),
    [("", "is a folder"), (".", "is a folder"), ("/", "is a folder"), ("B/x/../results.json", "would replace one of")],
)
def test_an_output_that_is_a_folder_or_an_input_is_refused(
    runs: tuple[Path, Path], tmp_path: Path, output: str, expected: str
) -> None:
    before = runs[1].read_text()
    (runs[1].parent / "x").mkdir()
    done = call(tmp_path, *runs, output=str(tmp_path / output) if output.startswith("B") else output)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert runs[1].read_text() == before


def test_the_text_is_printed_even_if_the_page_cannot_be_written(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = call(tmp_path, *runs, output=str(runs[0] / "compare.html"))
    assert done.returncode == 2
    assert "compare.html cannot be written (File exists)" in done.stderr
    assert done.stdout == format_comparison(compare(runs)) + "\n"


def test_a_class_name_that_is_no_valid_text_is_printed_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "A", {"caf\udce9\x1b": metrics(0.9)})
    done = call(tmp_path, path, path)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9\\x1b  A" in done.stdout
