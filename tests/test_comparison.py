"""Comparison of two runs (python -m utils.report A B): metric differences, and what the runs do not share."""

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
from utils.reporting.comparison import compare, comparison_page, format_comparison, signed
from utils.reporting.results_json import read_results, results_record
from utils.scans.json_records import write_record

EVIL = "<script>alert(1)</script>"


def metrics(value: float | None, **changed: object) -> dict:
    exact = dict.fromkeys(("0.3", "0.1", "0.05", "0.01"), value)
    return {**dict.fromkeys(("image_rocauc", "pixel_rocauc", "au_pro"), value), "au_pro_exact": exact, **changed}


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


def test_differences_of_the_common_classes_and_their_mean(runs: tuple[Path, Path]) -> None:
    tables = blocks_of(format_comparison(compare(*runs)))
    assert tables["P-AUROC"] == [
        ["A", "B", "B - A"],
        ["bagel", "0.900", "0.950", "+0.050"],
        ["rope", "0.800", "0.700", "-0.100"],
        ["Mean", "0.850", "0.825", "-0.025"],
    ]
    assert tables["I-AUROC"][2] == ["rope", "0.800", "0.800", "0.000"]
    assert tables["AU-PRO, limit 0.3, 100 thresholds"][2:] == [
        ["rope", "0.800", "n/a", "n/a"],
        ["Mean of the 1 that both have", "0.900", "0.950", "+0.050"],
    ]
    assert "AU-PRO, limit 0.01, exact curve" in tables
    assert not any("Precision" in title for title in tables)  # neither run has it


def test_classes_flags_and_versions_that_differ_are_listed(runs: tuple[Path, Path]) -> None:
    text = format_comparison(compare(*runs))
    assert "Only in A, and left out of the means: foam." in text
    assert "Only in B, and left out of the means: tire." in text
    assert "  f_coreset: 0.1 -> 0.2" in text
    assert '  precision: absent -> "bf16"' in text
    assert re.search(r'  torch: ".*" -> "9\.9"', text)
    assert "method_name" not in text


def test_different_numbers_of_test_samples_are_named(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {"bagel": metrics(0.9, samples=[{}] * 7), "rope": metrics(0.9, samples=[{}] * 3)})
    b = write(tmp_path / "B", {"bagel": metrics(0.9, samples=[{}] * 5), "rope": metrics(0.9, samples=[{}] * 3)})
    comparison = compare(a, b)
    assert comparison.remarks == ["bagel has 7 test samples in A, 5 in B."]
    for text in (format_comparison(comparison), read_page(comparison_page(comparison)).text):
        assert comparison.remarks[0] in text
    old = write(tmp_path / "old", {"bagel": metrics(0.9)})
    assert compare(a, old).remarks == ["Only in A, and left out of the means: rope."]


def test_equal_runs_have_no_differences(runs: tuple[Path, Path]) -> None:
    comparison = compare(runs[0], runs[0])
    assert (comparison.remarks, comparison.args, comparison.versions) == ([], {}, {})
    assert all(pair.difference == 0 for metric in comparison.metrics for pair in metric.classes.values())
    assert "that differ:" not in format_comparison(comparison)


def test_metrics_of_only_one_run_have_no_difference(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {"bagel": metrics(0.9)})
    b = write(tmp_path / "B", {"bagel": metrics(0.9, f1=0.7, false_alarm_rate=0.1)})
    tables = blocks_of(format_comparison(compare(a, b)))
    assert tables["F1 at its best threshold"][1] == ["bagel", "n/a", "0.700", "n/a"]
    assert tables["F1 at its best threshold"][2] == ["Mean of the 0 that both have", "n/a", "n/a", "n/a"]


def test_runs_without_a_common_class_are_reported(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, {name: metrics(0.9)}) for name in ("A", "B"))
    comparison = compare(a, b)
    assert "share no class with a metric" in format_comparison(comparison)
    assert "share no class with a metric" in read_page(comparison_page(comparison)).text


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0004, "0.000"), (-0.0004, "0.000"), (-0.0006, "-0.001"), (None, "n/a")]
)
def test_differences_are_signed_and_rounded(value: float | None, expected: str) -> None:
    assert signed(value) == expected


# The page


def test_the_page_has_the_content_of_the_text(runs: tuple[Path, Path]) -> None:
    comparison = compare(*runs)
    page = comparison_page(comparison)
    text = read_page(page).text
    for metric in comparison.metrics:
        assert metric.title in text
        for pair in metric.classes.values():
            assert signed(pair.difference) in text
    assert "Only in A, and left out of the means: foam." in text
    assert "f_coreset 0.1 0.2" in text
    assert "script-src &#39;none&#39;" in page


def test_bars_show_sign_and_size_of_the_difference(runs: tuple[Path, Path]) -> None:
    page = comparison_page(compare(*runs))
    section = re.search(r"<h2>P-AUROC</h2>.*?</section>", page, re.DOTALL).group()
    assert re.findall(r'<i class="(\w+)" style="--share:([\d.]+)%">', section) == [
        ("up", "50.0"),
        ("down", "100.0"),
        ("down", "25.0"),
    ]


def test_bars_are_scaled_per_metric(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {"bagel": metrics(0.5, f1=0.5), "rope": metrics(0.5, f1=0.5)})
    b = write(tmp_path / "B", {"bagel": metrics(0.9, f1=0.52), "rope": metrics(0.7, f1=0.51)})
    page = comparison_page(compare(a, b))
    for title in ("P-AUROC", "F1 at its best threshold"):
        section = re.search(rf"<h2>{title}</h2>.*?</section>", page, re.DOTALL).group()
        assert re.findall(r"--share:([\d.]+)%", section) == ["100.0", "50.0", "75.0"]


def test_the_overview_has_the_difference_of_every_class_and_metric(runs: tuple[Path, Path]) -> None:
    comparison = compare(*runs)
    table = re.search('<table class="overview">(.*?)</table>', comparison_page(comparison), re.DOTALL).group(1)
    rows = [re.findall(r'<td class="(\w*)">(.*?)</td>', row) for row in table.split("<tr")[2:]]
    expected = [[*metric.classes.values(), metric.mean] for metric in comparison.metrics]
    assert [[text for _, text in row] for row in rows] == [
        [signed(pair.difference) for pair in row] for row in zip(*expected, strict=True)
    ]
    assert rows[1][:3] == [("", "0.000"), ("loss", "-0.100"), ("", "n/a")]
    assert rows[0][1] == ("gain", "+0.050")


def test_more_false_alarms_are_a_loss(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {"bagel": metrics(None, false_alarm_rate=0.1)})
    b = write(tmp_path / "B", {"bagel": metrics(None, false_alarm_rate=0.2)})
    page = comparison_page(compare(a, b))
    assert re.search(r'<td class="loss">\+0\.100<div class="delta"><i class="down"', page)


def test_text_is_escaped(tmp_path: Path) -> None:
    a = write(tmp_path / "A", {EVIL: metrics(0.9)}, {"method_name": EVIL, EVIL: 1})
    b = write(tmp_path / "B", {EVIL: metrics(0.8), "</td>" + EVIL: metrics(0.1)})
    page = comparison_page(compare(a, b))
    assert "<script" not in page
    assert read_page(page).text.count(EVIL) > 8


# The command


def test_the_command_prints_the_text_and_writes_the_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """The command, run in a new process from the checkout, prints the text and writes the page."""
    command = [sys.executable, "-m", "utils.report", *map(str, runs), "--output", str(tmp_path / "compare.html")]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=ROOT, env=strict, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    comparison = compare(*runs)
    assert done.stdout == f"{format_comparison(comparison)}\n\nwritten to {tmp_path / 'compare.html'}\n"
    assert (tmp_path / "compare.html").read_text() == comparison_page(comparison)


def test_a_file_that_is_no_results_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match=r"results\.json is missing\. Name a results\.json of main\.py\."):
        read_results(path)
    with pytest.raises(InputError, match=r"is a folder\. Name the results\.json in it\."):
        read_results(tmp_path)
    start = '{"schema": 1, "args": {}, "versions": {}'
    for content, expected in (
        ("{", "not JSON"),
        ('{"a": 1}', "no schema number"),
        ('{"schema": 2}', "newer version"),
        (start + "}", "missing required field `classes`"),
        (start + ', "classes": {"bagel": {"image_rocauc": "x"}}}', "got `str` at `classes[...].image_rocauc`"),
        (start + ', "classes": {"bagel": {"f1": -0.1}}}', ">= 0.0 at `classes[...].f1`"),
        (start + ', "classes": {"bagel": {"au_pro_exact": {"0.3": 2}}}}', "at `classes[...].au_pro_exact[...]`"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=re.escape(expected)):
            read_results(path)


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
    assert done.stdout == format_comparison(compare(*runs)) + "\n"


def test_a_class_name_that_is_no_valid_text_is_printed_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "A", {"caf\udce9\x1b": metrics(0.9)})
    done = call(tmp_path, path, path)
    assert done.returncode == 0, done.stderr
    assert "caf\\udce9\\x1b  0.900" in done.stdout
