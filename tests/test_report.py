"""Result tables and results.json: they can be read back, and older content is kept."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.errors import InputError
from utils.metrics import EXACT_LIMITS, mean_over_classes
from utils.reporting.latex import write_latex
from utils.reporting.results_json import package_versions, results_record
from utils.reporting.tables import Methods, append_tables, format_tables, result_line, write_csv
from utils.scans.json_records import write_record

FILES = ("image_rocauc_results.md", "pixel_rocauc_results.md", "aupro_results.md")
COMMAND = ["main.py", "--method_name", "DINO+Point_MAE"]
NOTE = "stand-in networks: the figures say nothing about M3DM"
BAGEL = {
    "image_rocauc": 0.99449,
    "pixel_rocauc": 0.9951,
    "au_pro": 0.97049,
    "au_pro_exact": {"0.3": 0.981, "0.1": 0.952, "0.05": 0.903, "0.01": 0.404},
}
CABLE_GLAND = {
    "image_rocauc": 0.90949,
    "pixel_rocauc": 0.9931,
    "au_pro": 0.97149,
    "au_pro_exact": {"0.3": 0.982, "0.1": 0.953, "0.05": 0.904, "0.01": 0.405},
}
CLASSES = {"bagel": BAGEL, "cable_gland": CABLE_GLAND}
NOTHING = {**dict.fromkeys(("image_rocauc", "pixel_rocauc", "au_pro")), "au_pro_exact": dict.fromkeys(EXACT_LIMITS)}


def read_tables(path: Path) -> list[list[list[str]]]:
    """Tables of a Markdown file as rows of cells; every row must be as wide as its header."""
    tables: list[list[list[str]]] = []
    previous = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]
            if not previous.startswith("|"):
                assert previous == "", "a table must follow an empty line"
                tables.append([])
            elif len(tables[-1]) == 1 and set(line) <= set("|-:"):
                previous = line
                continue
            tables[-1].append(cells)
            assert len(cells) == len(tables[-1][0])
        previous = line
    return tables


def append(folder: Path, classes: dict = CLASSES, exact_headline: bool = False, note: str | None = None) -> None:
    append_tables(folder, {"DINO+Point_MAE": {None: classes}}, COMMAND, exact_headline, note)


def test_one_row_per_method_with_three_decimals(tmp_path: Path) -> None:
    append(tmp_path)
    (table,) = read_tables(tmp_path / "image_rocauc_results.md")
    # mean of unrounded values: 0.95197; the mean of rounded ones would be 0.9515
    assert table == [["Method", "bagel", "cable_gland", "Mean"], ["DINO+Point_MAE", "0.994", "0.909", "0.952"]]
    (table,) = read_tables(tmp_path / "pixel_rocauc_results.md")
    assert table[1][1:] == ["0.995", "0.993", "0.994"]


@pytest.mark.parametrize("exact_headline", [False, True])
def test_au_pro_rows_name_limit_and_curve(tmp_path: Path, exact_headline: bool) -> None:
    append(tmp_path, exact_headline=exact_headline)
    (table,) = read_tables(tmp_path / "aupro_results.md")
    rows = {row[0].removeprefix("DINO+Point_MAE, "): row[1:] for row in table[1:]}
    assert rows == {
        "limit 0.3, 100 thresholds": ["0.970", "0.971", "0.971"],
        "limit 0.3, exact curve": ["0.981", "0.982", "0.982"],
        "limit 0.1, exact curve": ["0.952", "0.953", "0.952"],
        "limit 0.05, exact curve": ["0.903", "0.904", "0.903"],
        "limit 0.01, exact curve": ["0.404", "0.405", "0.405"],
    }
    assert next(iter(rows)) == ("limit 0.3, exact curve" if exact_headline else "limit 0.3, 100 thresholds")


def test_tables_of_two_runs_accumulate(tmp_path: Path) -> None:
    append(tmp_path)
    first = {name: (tmp_path / name).read_text() for name in FILES}
    append(tmp_path, {"rope": BAGEL})
    for name in FILES:
        text = (tmp_path / name).read_text()
        assert text.startswith(first[name].rstrip("\n"))
        assert "\n\n\n" not in text
        assert [table[0] for table in read_tables(tmp_path / name)] == [
            ["Method", "bagel", "cable_gland", "Mean"],
            ["Method", "rope", "Mean"],
        ]
        headings = re.findall(r"^## \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d · DINO\+Point_MAE$", text, re.MULTILINE)
        assert len(headings) == 2
        assert text.count(f"\n    {shlex.join(COMMAND)}\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)  # no temporary file is left


def test_older_text_without_a_final_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / FILES[0]).write_text("my own remark")
    append(tmp_path)
    assert (tmp_path / FILES[0]).read_text().startswith("my own remark\n\n## ")


def test_failed_write_keeps_the_older_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(InputError, match=r"_results.md cannot be written \(no space left.*Free disk space"):
        append(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_names_and_commands_cannot_break_a_table(tmp_path: Path) -> None:
    odd = "a|b`c\\d\n<i>*"
    command = ["main.py", "--note", "one | two ``` three\n| four |", os.fsdecode(b"caf\xe9")]
    append_tables(tmp_path, {"x|y": {0: {odd: BAGEL, "rope": BAGEL}}}, command, False, "a |\n# b")
    for name in FILES:
        indented = re.findall(r"^    (.*)", (tmp_path / name).read_text(), re.MULTILINE)
        assert shlex.split("\n".join(indented))[:3] == command[:3]
        (table,) = read_tables(tmp_path / name)
        assert table[0] == ["Method", "a|b`c\\d <i>*", "rope", "Mean"]
        assert table[1][0].startswith("x|y")
        assert "\na \\| # b\n" in (tmp_path / name).read_text()


def test_every_table_has_the_note(tmp_path: Path) -> None:
    append(tmp_path, note=NOTE)
    assert all((tmp_path / name).read_text().count(NOTE) == 1 for name in FILES)
    assert format_tables({"DINO": {0: CLASSES}}, False, NOTE).count(NOTE) == 3
    assert NOTE not in format_tables({"DINO": {0: CLASSES}}, False)


def test_undefined_metrics_are_shown_and_explained(tmp_path: Path) -> None:
    append(tmp_path, {"bagel": BAGEL, "foam": {**NOTHING, "image_rocauc": 0.5}, "rope": NOTHING})
    (table,) = read_tables(tmp_path / "image_rocauc_results.md")
    assert table[1][1:] == ["0.994", "0.500", "n/a", "0.747"]
    assert "left out of the mean" in (tmp_path / "aupro_results.md").read_text()
    append(tmp_path / "whole")
    assert "n/a" not in (tmp_path / "whole" / "aupro_results.md").read_text()


def test_text_tables_match_the_files(tmp_path: Path) -> None:
    append(tmp_path, exact_headline=True)
    blocks = format_tables({"DINO+Point_MAE": {0: CLASSES}}, exact_headline=True).split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == ["I-AUROC", "P-AUROC", "AU-PRO"]
    for block, name in zip(blocks, FILES, strict=True):
        lines = block.splitlines()[1:]
        assert [re.split(r" {2,}", line) for line in lines] == read_tables(tmp_path / name)[0]
        assert len({len(line) for line in lines}) == 1  # aligned


def test_empty_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class"):
        append(tmp_path, {})
    with pytest.raises(ValueError, match="no class"):
        append_tables(tmp_path, {}, COMMAND, False)
    assert not list(tmp_path.iterdir())


# several methods

METHODS = {"DINO": {0: {"bagel": BAGEL, "rope": NOTHING}}, "Point|MAE": {0: {"bagel": CABLE_GLAND, "rope": BAGEL}}}


def test_methods_share_a_table(tmp_path: Path) -> None:
    """Each method has a row, in the given order, with the mean of its own classes."""
    append_tables(tmp_path, METHODS, COMMAND, False)
    for name, rows in {
        FILES[0]: [["DINO", "0.994", "n/a", "0.994"], ["Point|MAE", "0.909", "0.994", "0.952"]],
        FILES[1]: [["DINO", "0.995", "n/a", "0.995"], ["Point|MAE", "0.993", "0.995", "0.994"]],
    }.items():
        (table,) = read_tables(tmp_path / name)
        assert table == [["Method", "bagel", "rope", "Mean"], *rows]


@pytest.mark.parametrize("exact_headline", [False, True])
def test_au_pro_of_all_methods_is_grouped_by_curve(tmp_path: Path, exact_headline: bool) -> None:
    append_tables(tmp_path, METHODS, COMMAND, exact_headline)
    (table,) = read_tables(tmp_path / FILES[2])
    published, exact = "limit 0.3, 100 thresholds", "limit 0.3, exact curve"
    kinds = [exact, published] if exact_headline else [published, exact]
    kinds += [f"limit {limit}, exact curve" for limit in ("0.1", "0.05", "0.01")]
    assert [row[0] for row in table[1:]] == [f"{method}, {kind}" for kind in kinds for method in METHODS]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows[f"DINO, {published}"] == ["0.970", "n/a", "0.970"]
    assert rows[f"Point|MAE, {published}"] == ["0.971", "0.970", "0.971"]
    assert rows["DINO, limit 0.01, exact curve"] == ["0.404", "n/a", "0.404"]
    assert rows["Point|MAE, limit 0.01, exact curve"] == ["0.405", "0.404", "0.405"]


def test_heading_names_all_methods(tmp_path: Path) -> None:
    append_tables(tmp_path, METHODS, COMMAND, False)
    for name in FILES:
        text = (tmp_path / name).read_text()
        assert len(re.findall("^## ", text, re.MULTILINE)) == 1
        assert re.search(r"^## \d{4}-\S+ \S+ · DINO, Point\\\|MAE$", text, re.MULTILINE)
        assert text.count("left out of the mean") == 1


def test_resumed_run_replaces_its_own_last_table(tmp_path: Path) -> None:
    """Tables of other values stay, and so do equal ones of a run that was not resumed."""
    other = {"DINO": {0: {"bagel": CABLE_GLAND}}}
    for methods, resumed, count in [
        (METHODS, False, 1),
        (METHODS, True, 1),
        (other, True, 2),
        (other, False, 3),
        (other, True, 3),
        (METHODS, True, 4),
    ]:
        append_tables(tmp_path, methods, COMMAND, False, "a note", resumed)
        for name in FILES:
            assert len(read_tables(tmp_path / name)) == count, (methods, resumed)


def test_older_table_that_is_not_text_does_not_lose_the_new_one(tmp_path: Path) -> None:
    (tmp_path / FILES[0]).write_bytes(b"# caf\xe9\n")
    append_tables(tmp_path, METHODS, COMMAND, False)
    assert (tmp_path / FILES[0]).read_text().startswith("# caf\\xe9\n\n## ")


def test_text_tables_of_several_methods_match_the_files(tmp_path: Path) -> None:
    append_tables(tmp_path, METHODS, COMMAND, True)
    for block, name in zip(format_tables(METHODS, exact_headline=True).split("\n\n"), FILES, strict=True):
        lines = block.splitlines()[1:-1]  # between title and remark
        assert [re.split(r" {2,}", line) for line in lines] == read_tables(tmp_path / name)[0]


# several seeds

SEEDS: Methods = {
    "DINO": {
        0: {"bagel": NOTHING | {"image_rocauc": 0.9, "pixel_rocauc": 0.5}, "rope": NOTHING | {"image_rocauc": 0.5}},
        1: {"bagel": NOTHING | {"image_rocauc": 0.8, "pixel_rocauc": None}, "rope": NOTHING | {"image_rocauc": 0.6}},
        4: {"bagel": NOTHING | {"image_rocauc": 0.7, "pixel_rocauc": None}, "rope": NOTHING | {"image_rocauc": 0.7}},
    },
}  # fmt: skip


def test_cells_of_several_seeds_are_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    append_tables(tmp_path, SEEDS, COMMAND, False)
    (table,) = read_tables(tmp_path / FILES[0])
    assert table[1] == ["DINO", "0.800 ± 0.100", "0.600 ± 0.100", "0.700 ± 0.000"]
    (table,) = read_tables(tmp_path / FILES[1])
    assert table[1] == ["DINO", "0.500", "n/a", "0.500"]  # one value has no deviation


def test_results_csv_has_rows_for_seeds_and_their_mean_and_deviation(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path, SEEDS)
    assert [(row["class"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("bagel", "rope") for seed in ("0", "1", "4", "mean", "std")
    ]
    of_bagel = [row["image_rocauc"] for row in rows[:5]]
    assert [float(each) for each in of_bagel] == pytest.approx([0.9, 0.8, 0.7, 0.8, 0.1])
    assert [row["pixel_rocauc"] for row in rows[:5]] == ["0.5", "", "", "0.5", ""]


def test_latex_tables_are_escaped_and_hold_formulas(tmp_path: Path) -> None:
    odd = r"50%_a&b #$~^{\}"
    write_latex(
        tmp_path / "tables.tex", {"x_y": {0: {odd: BAGEL}, 1: {odd: CABLE_GLAND}}}, ["main.py\n"], False, "1 % ---a"
    )
    text = (tmp_path / "tables.tex").read_text()
    assert text.startswith("% 'main.py\\n'\n\n\\begin{table}\n")
    assert text.count(r"\toprule") == text.count(r"\end{tabular}") == len(FILES)
    assert r"\caption{P-AUROC. 1 \% -{}-{}-a}" in text
    name = r"50\%\_a\&b \#\$\textasciitilde{}\textasciicircum{}\{\textbackslash{}\}"
    assert rf"Method & {name} & Mean \\" in text
    assert r"x\_y & $0.952 \pm 0.060$ & $0.952 \pm 0.060$ \\" in text
    assert r"x\_y & $0.994 \pm 0.001$ & $0.994 \pm 0.001$ \\" in text


# result line and results.json


def test_result_line() -> None:
    assert result_line("bagel", BAGEL, exact_headline=False) == (
        "bagel: I-AUROC 0.994, P-AUROC 0.995, AU-PRO 0.970 (limit 0.3, 100 thresholds)"
    )
    assert result_line("bagel", BAGEL, exact_headline=True).endswith("AU-PRO 0.981 (limit 0.3, exact curve)")
    assert "I-AUROC n/a" in result_line("rope", NOTHING, exact_headline=False)


def test_results_file_reads_back_unrounded(tmp_path: Path) -> None:
    samples = [{"path": "test/hole/000", "label": np.int64(1), "score": np.float32(0.1)}]
    classes = {"bagel": {**BAGEL, "image_rocauc": np.float64(1 / 3), "samples": samples}, "rope": NOTHING}
    args = {"dataset_path": Path("datasets"), "seed": 0, "class_name": ("bagel", "rope"), "blr": np.ones(2)}
    write_record(tmp_path / "results.json", results_record(COMMAND, args, classes))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["schema", "command", "args", "versions", "classes", "mean"]
    assert results["schema"] == 2
    assert results["command"] == COMMAND
    assert results["args"] == {"dataset_path": "datasets", "seed": 0, "class_name": ["bagel", "rope"], "blr": [1, 1]}
    assert results["versions"] == package_versions()
    assert results["classes"]["bagel"]["image_rocauc"] == 1 / 3
    assert results["classes"]["bagel"]["samples"] == [
        {"path": "test/hole/000", "label": 1, "score": float(np.float32(0.1))}
    ]
    assert results["classes"]["rope"] == NOTHING
    assert results["mean"] == mean_over_classes(classes)


@pytest.mark.parametrize("bad", [float("nan"), np.float32("inf")])
def test_results_file_refuses_values_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    write_record(tmp_path / "results.json", results_record(COMMAND, {}, CLASSES))
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_record(
            tmp_path / "results.json", results_record(COMMAND, {}, {"bagel": {**BAGEL, "peak_memory_mb": bad}})
        )
    assert (tmp_path / "results.json").read_text() == before


def test_results_file_refuses_other_types(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        write_record(tmp_path / "results.json", {"args": {"x": {1}}})
    assert not (tmp_path / "results.json").exists()


def test_package_versions() -> None:
    versions = package_versions()
    assert versions["numpy"] == np.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "torchvision", "timm", "scipy", "scikit-learn", "open3d", "pillow"} < set(versions)


def test_package_versions_do_not_import_the_packages() -> None:
    code = "import sys\nfrom utils.reporting.results_json import package_versions\npackage_versions()\n"
    code += "print(*{'torch', 'timm', 'open3d'} & set(sys.modules))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.reporting.results_json.DISTRIBUTIONS", ("no-such-distribution",))
    assert package_versions()["no-such-distribution"] is None


def csv_rows(folder: Path, methods: Methods) -> list[dict[str, str]]:
    write_csv(folder / "results.csv", methods)
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_csv_has_a_row_for_each_class_and_method(tmp_path: Path) -> None:
    figures = BAGEL | {"split": "test", "threshold": {"image": 0.5, "source": "validation"}, "samples": [{}, {}]}
    unmeasured = NOTHING | {"split": "train", "threshold": None, "samples": [{}]}
    methods = {"DINO": {7: {"bagel": figures, 'a "b", c\n': unmeasured}}, "Fusion": {None: {"bagel": figures}}}
    rows = csv_rows(tmp_path, methods)
    assert [(row["class"], row["method"], row["seed"]) for row in rows] == [
        ("bagel", "DINO", "7"), ('a "b", c\n', "DINO", "7"), ("bagel", "Fusion", ""),
    ]  # fmt: skip
    assert float(rows[0]["image_rocauc"]) == BAGEL["image_rocauc"]
    assert float(rows[0]["au_pro_exact_0.05"]) == BAGEL["au_pro_exact"]["0.05"]
    assert (rows[0]["threshold_image"], rows[0]["threshold_source"], rows[0]["samples"]) == ("0.5", "validation", "2")
    assert (rows[1]["image_rocauc"], rows[1]["threshold_image"], rows[1]["samples"]) == ("", "", "1")
