"""report.html: its content, escaping of all text, security policy, and atomic writing."""

import base64
import gzip
import hashlib
import html
import re
from pathlib import Path

import numpy as np
import pytest
from report_pages import (
    COMMAND,
    entry_of,
    made_up_class,
    made_up_page,
    made_up_sample,
    made_up_samples,
    read_page,
    samples_of,
)

from utils.au_pro import area_to_limit, pro_curve, thin_curve
from utils.errors import InputError
from utils.metrics import EXACT_LIMITS, PRO_LIMIT
from utils.reporting.html_report.charts import LEFT, RIGHT, Axis, curve_chart, strip_plot
from utils.reporting.html_report.class_report import ClassReport, decide, report_class
from utils.reporting.html_report.gallery import CLOUD_POINTS, UNDECIDED, WRONG
from utils.reporting.html_report.page import ASSETS, asset, environment, script_hash
from utils.reporting.html_report.published import CLASSES, PAPER_ARGS, TEST_SAMPLES, published_figures
from utils.reporting.html_report.report_page import write_report
from utils.reporting.messages import escape_controls
from utils.reporting.results_json import results_record

PAPER = {
    "method_name": "DINO+Point_MAE+Fusion", "use_uff": True, "protocol": "reference", "dataset_type": "mvtec3d",
    "rgb_backbone_name": "vit_base_patch8_224_dino", "xyz_backbone_name": "Point_MAE", "point_norm": "cloud",
    "img_size": 224, "group_size": 128, "num_group": 1024, "f_coreset": 0.1, "coreset_eps": 0.9, "max_sample": 400,
    "ocsvm_nu": 0.5, "ocsvm_maxiter": 1000, "precision": "fp32", "train_feature_dtype": "fp32",
    "rgb_checkpoint": None, "xyz_checkpoint": None,
    "asy_memory_bank": None, "rm_zero_for_project": False, "xyz_s_lambda": 1.0, "rgb_s_lambda": 0.1,
    "fusion_s_lambda": 1.0, "xyz_smap_lambda": 1.0, "rgb_smap_lambda": 0.1, "fusion_smap_lambda": 1.0,
}  # fmt: skip
EVIL = "<script>alert(1)</script>\"'&Ω\u2028"


def policy_of(page: str) -> str:
    return next(dict(attrs)["content"] for tag, attrs in read_page(page).tags if "http-equiv" in attrs)


def rows_of(page: str, table: str) -> dict[str, list[str]]:
    """Cells of a table of the page as text, by row header."""
    body = re.search(rf'<table class="{table}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL).group(1)
    rows = {}
    for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL):
        head, *cells = (read_page(cell).text for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL))
        rows[head] = cells
    return rows


# Content


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["gasket"], "data/parts", "parts: gasket"),
        (["gasket", "bracket"], "parts/", "parts: gasket, bracket"),
        (["a", "b", "c", "d", "e"], ".", "mvtec3d: 5 classes"),
    ],
)
def test_the_title_is_the_dataset_and_its_classes(names: list[str], path: str, expected: str) -> None:
    page = made_up_page(*(made_up_class(name, limit=0) for name in names), args={"dataset_path": path})
    assert f"<h1>{expected}</h1>" in page
    assert f"<title>{expected}</title>" in page


def tiles_of(page: str) -> dict[str, str]:
    """Number and explanation of each tile, by name."""
    found = re.findall(r'<div class="tile \w*"><b>(.*?)</b>(.*?)</p></div>', page)
    return {name: read_page(rest).text for name, rest in found}


def test_the_tiles_answer_first() -> None:
    samples = [made_up_sample(f"test/good/{i}", 0.4 + 0.2 * i) for i in range(3)]  # two of them above 0.5
    samples += [made_up_sample(f"test/hole/{i}", 0.9 - 0.1 * i) for i in range(5)]  # the last at 0.5
    page = made_up_page(made_up_class("gasket", samples, limit=0), made_up_class("bracket", samples, limit=0))
    tiles = tiles_of(page)
    assert list(tiles) == ["Samples", "Misses", "False alarms", "I-AUROC", "AU-PRO"]
    assert tiles["Samples"] == "16 6 good and 10 defective samples of the test split."
    assert tiles["Misses"].startswith("2 of 10 Defective samples")
    assert tiles["False alarms"].startswith("4 of 6 Good samples")
    assert re.match(r"0\.\d{3} Chance .* Mean of the classes\.", tiles["I-AUROC"])
    assert page.index("tiles") < page.index("<h2") < page.index("<details>")


def untested_class() -> ClassReport:
    samples = [made_up_sample(f"train/good/{i:03d}", 0.1 * i) for i in range(5)]
    nothing = dict.fromkeys(("f1", "f1_threshold", "precision", "recall", "false_alarm_rate"))
    entry = entry_of(samples) | nothing | {"split": "train"}
    assert entry["image_rocauc"] is entry["au_pro"] is None
    unmarked = [each._replace(mask=None) for each in samples]
    return report_class("gasket", entry, unmarked, None, lambda i: None, lambda i: None, 24)


def test_a_class_without_a_test_split_has_a_page() -> None:
    page = made_up_page(untested_class())
    text = "Good samples of the train split. Without a test split, nothing is measured."
    assert tiles_of(page) == {"Samples": f"5 {text}"}
    assert "There is no test split" in page and "misses" not in read_page(page).text.split("Samples 5 of the 5")[0]
    assert len(samples_of(page)) == page.count('class="dot ') == 5


def test_a_class_without_a_test_split_is_not_counted_among_others() -> None:
    tiles = tiles_of(made_up_page(made_up_class("bracket", limit=0), untested_class()))
    text = "6 good and 6 defective samples of the test split. Classes without one are left out."
    assert tiles["Samples"] == f"12 {text}"
    assert "of 6" in tiles["False alarms"]
    assert "Mean" not in tiles["I-AUROC"]


def test_the_details_show_method_backbones_and_command() -> None:
    text = read_page(made_up_page(made_up_class(limit=0))).text
    for expected in ("DINO+Point_MAE", "rgb efficientnet_lite0, xyz FPFH", "Protocol: reference", "mvtec3d", "parts"):
        assert expected in text
    assert " ".join(COMMAND) in text
    assert f"numpy {np.__version__}" in text


def test_the_summary_has_every_metric_of_every_class_and_the_mean() -> None:
    one, other = made_up_class("gasket", limit=0), made_up_class("bracket", made_up_samples(20), limit=0, precision=0.5)
    page = made_up_page(one, other)
    rows = rows_of(page, "figures")
    assert list(rows) == ["gasket", "bracket", "Mean"]
    for each in (one, other):
        expected = [each.entry[key] for key in ("image_rocauc", "pixel_rocauc", "au_pro")]
        expected += [each.entry["au_pro_exact"][limit] for limit in EXACT_LIMITS]
        expected += [each.entry[key] for key in ("f1", "precision", "recall", "false_alarm_rate")]
        assert rows[each.name] == [f"{value:.3f}" for value in expected]
    assert rows["Mean"][0] == f"{(one.entry['image_rocauc'] + other.entry['image_rocauc']) / 2:.3f}"
    assert rows["Mean"][8] == "0.600"
    head = read_page(re.search("<thead>.*?</thead>", page).group()).text
    assert "AU-PRO 0.3, 100 thresholds" in head
    assert head.count("exact curve") == len(EXACT_LIMITS)


def test_every_class_has_charts_and_counts() -> None:
    each = made_up_class(limit=0)
    page = made_up_page(each, made_up_class("bracket", limit=0))
    read = read_page(page)
    assert read.count("svg") == 4
    labeled = [attrs for tag, attrs in read.tags if tag == "svg" or attrs.get("class") == "strip"]
    assert len(labeled) == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in labeled)
    assert page.count('class="line"') == 2 * 3  # good, hole, stain & dent
    assert page.count('class="dot ') == 2 * each.total
    assert sum(each.outcomes.values()) == each.total == 12
    for name, plural in (("miss", "misses"), ("false alarm", "false alarms"), ("hit", "hits")):
        count = each.outcomes[name]
        assert f"{count} {name if count == 1 else plural}" in read.text


def test_time_and_memory_are_shown() -> None:
    row = rows_of(made_up_page(made_up_class(limit=0)), "timing")["gasket"]
    text = read_page(made_up_page(made_up_class(limit=0, seconds={"extract": 1.0, "score": 1.0}))).text
    assert "Extract: features of training, validation and test samples" in text
    assert "Fuse:" not in text
    assert row == ["34.0 s", "20.5 s", "4.0 s", "2.5 s", "6.0 s", "1.0 s", "50 · 70 · 110 ms", "2.25 GiB"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, "Threshold: calibrated on 22 good samples of the validation split for a false-alarm rate of 0.01"),
        (None, "Threshold: not calibrated, but the threshold of the best F1 on these samples"),
    ],
)
def test_the_page_shows_the_source_of_the_threshold(threshold: float | None, expected: str) -> None:
    each = made_up_class(limit=0, threshold=threshold)
    assert expected in read_page(made_up_page(each)).text
    assert each.decision is not None
    assert each.decision.threshold == (0.45 if threshold is None else threshold)


@pytest.mark.parametrize(
    ("samples", "target_fpr", "source", "expected"),
    [
        (2, 0.01, "validation", "a false-alarm rate of 0.01, though so few samples allow 0.33 at best"),
        (98, 0.01, "validation", "a false-alarm rate of 0.01, though so few samples allow 0.01 at best"),
        (99, 0.01, "validation", "a false-alarm rate of 0.01"),
        (2, 0.5, "training", "a false-alarm rate of 0.5; training samples score low, so expect more false alarms"),
    ],
)
def test_the_threshold_source_notes_unreachable_rates_and_training_samples(
    samples: int, target_fpr: float, source: str, expected: str
) -> None:
    decision = decide(
        {"threshold": {"image": 1.0, "pixel": 2.0, "parts": samples, "target_fpr": target_fpr, "source": source}}
    )
    assert decision is not None
    _, _, rest = decision.source.partition(expected)
    assert expected in decision.source
    assert "so few" not in rest


def test_calibrated_metrics_without_a_threshold_are_undefined() -> None:
    rows = rows_of(made_up_page(made_up_class(limit=0, threshold=None)), "figures")
    assert rows["gasket"][-3:] == ["n/a"] * 3
    page = made_up_page(made_up_class(limit=0, threshold=None))
    assert "Precision, recall and false alarms need a calibrated threshold." in read_page(page).text
    assert "n/a" not in read_page(made_up_page(made_up_class(limit=0))).text


def test_undefined_metrics_are_explained() -> None:
    samples = [made_up_sample(f"test/good/{i:03d}", 0.1 * i) for i in range(4)]
    each = made_up_class("gasket", samples, threshold=None, f1=None, f1_threshold=None)
    page = made_up_page(each)
    text = read_page(page).text
    assert set(rows_of(page, "figures")["gasket"]) == {"n/a"}
    assert "n/a: it needs good and defective samples" in text
    assert "left out of the mean" in text
    assert "Precision is also undefined if no sample is called anomalous" in text
    assert each.decision is None
    assert {sample["outcome"] for sample in samples_of(page)} == {UNDECIDED}


# Published results


def published_class(name: str, fewer: int = 0) -> ClassReport:
    """Made-up class with the number of test samples of the paper's class, minus `fewer`."""
    count = TEST_SAMPLES.get(name, 100) - fewer
    samples = [{"path": f"test/{i % 2}/{i}", "label": i % 2, "score": 0.1, "severity": 0.0} for i in range(count)]
    return made_up_class(name, limit=0, samples=samples)


def test_published_results_are_shown_for_the_settings_of_the_paper() -> None:
    page = made_up_page(*map(published_class, CLASSES), args=PAPER)
    assert page.count("published 0.") == 3 * 11
    assert rows_of(page, "figures")["tire"][0].endswith("published 0.850")
    assert "CVPR 2023" in read_page(page).text


@pytest.mark.parametrize(
    ("changed", "classes"),
    [
        *(({key: "another"}, CLASSES) for key in (*PAPER_ARGS, "use_uff", "method_name")),
        ({"max_sample": 399}, CLASSES),
        ({}, ("gasket",)),
    ],
)
def test_no_published_results_are_shown_for_other_settings_or_classes(changed: dict, classes: tuple[str, ...]) -> None:
    entries = {name: {"samples": [{}] * TEST_SAMPLES.get(name, 100)} for name in classes}
    assert published_figures(PAPER | changed, entries) is None


@pytest.mark.parametrize("fewer", [0, 1])
def test_no_published_results_are_shown_for_other_numbers_of_samples(fewer: int) -> None:
    page = made_up_page(published_class("bagel"), published_class("rope", fewer), args=PAPER)
    shown = page.split("</style>")[1]
    assert (shown.count("published 0."), "CVPR" in shown) == ((0, False) if fewer else (6, True))
    assert sum(TEST_SAMPLES.values()) == 1197


# Gallery


def test_the_gallery_has_counts_and_filters() -> None:
    page = made_up_page(made_up_class("gasket", made_up_samples(30), limit=5), made_up_class("bracket", limit=4))
    text = read_page(page).text
    assert "5 of the 30 samples of gasket, 4 of the 12 samples of bracket." in text
    shown = samples_of(page)
    assert sorted(sample["class"] for sample in shown) == ["bracket"] * 4 + ["gasket"] * 5
    for name in ("class", "defect", "outcome"):
        select = re.search(rf'<select data-filter="{name}">(.*?)</select>', page).group(1)
        options = re.findall('value="(.*?)"', select)
        assert options[0] == ""
        assert {option.replace("&amp;", "&") for option in options[1:]} == {sample[name] for sample in shown}


def test_wrong_samples_of_all_classes_come_first() -> None:
    one, other = made_up_class("gasket", made_up_samples(30)), made_up_class("bracket", made_up_samples(20))
    shown = [
        (sample["class"], sample["outcome"] in WRONG, sample["path"]) for sample in samples_of(made_up_page(one, other))
    ]
    assert [wrong for _, wrong, _ in shown] == sorted((wrong for _, wrong, _ in shown), reverse=True)
    assert {name for name, wrong, _ in shown if wrong} == {"gasket", "bracket"}
    for each in (one, other):  # each class keeps the order of its gallery
        assert [path for name, _, path in shown if name == each.name] == [sample["path"] for sample in each.samples]


def test_a_page_without_gallery_has_no_scripts() -> None:
    page = made_up_page(made_up_class(limit=0))
    assert samples_of(page) == []
    for absent in ("<select", "<dialog", "<script", 'id="plotly"'):
        assert absent not in page
    assert "script-src 'none'" in policy_of(page)


@pytest.mark.parametrize("cloud", [True, False])
def test_the_3d_script_is_included_only_with_a_cloud(cloud: bool) -> None:
    page = made_up_page(made_up_class(limit=2, cloud=cloud))
    assert ('id="plotly"' in page) is cloud
    assert all((sample["cloud"] is not None) is cloud for sample in samples_of(page))


@pytest.mark.slow
def test_the_page_stays_small() -> None:
    samples = made_up_samples(60, side=224)
    page = made_up_page(made_up_class("gasket", samples, limit=24))
    assert len(samples_of(page)) == 24
    assert all(sample["cloud"]["points"] <= CLOUD_POINTS for sample in samples_of(page))
    assert len(page.encode()) < 6e6
    assert len(made_up_page(made_up_class("gasket", samples, limit=0))) < 1e5


# Safety


@pytest.mark.parametrize("where", ["class", "path", "command", "args", "note"])
def test_text_is_escaped(where: str) -> None:
    folder = EVIL.replace("/", "") if where == "path" else "hole"
    samples = [made_up_sample(f"test/{folder}/{i}", 0.2 * i) for i in range(3)]
    samples += [made_up_sample(f"test/good/{i}", 0.2 * i) for i in range(3)]
    each = made_up_class(EVIL if where == "class" else "gasket", samples)
    args = {"method_name": EVIL, "dataset_path": EVIL, "dataset_type": EVIL} if where == "args" else {}
    command = ["main.py", EVIL] if where == "command" else COMMAND
    page = made_up_page(each, args=args, note=EVIL if where == "note" else "note", command=command)
    read, plain = read_page(page), read_page(made_up_page(made_up_class()))
    assert "<script>alert" not in page
    assert read.count("script") == plain.count("script")
    assert {name for _, attrs in read.tags for name in attrs} == {name for _, attrs in plain.tags for name in attrs}
    assert f"{folder if where == 'path' else '<script>alert(1)</script>'}"[:16] in read.text
    assert {sample["defect"] for sample in samples_of(page)} == {escape_controls(folder), "good"}
    assert {sample["class"] for sample in samples_of(page)} == {escape_controls(each.name)}


def test_filters_and_data_show_undecodable_names_alike() -> None:
    each = made_up_class("caf\udce9", [made_up_sample(f"test/h\udcff/{i}", 0.3 * i) for i in range(3)])
    page = made_up_page(each, made_up_class()).encode(errors="backslashreplace").decode()
    options = list(map(html.unescape, re.findall('<option value="(.*?)"', page)))
    for sample in samples_of(page):
        assert {sample["class"], sample["defect"], sample["outcome"]} <= set(options)


def test_undecodable_names_are_written_escaped(tmp_path: Path) -> None:
    each = made_up_class("caf\udce9", limit=1)
    record = results_record(["main.py", "caf\udce9"], {}, {each.name: each.entry})
    write_report(tmp_path, record, [each])
    assert "caf\\udce9" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_templates_escape_every_value() -> None:
    assert environment().autoescape is True
    for path in ASSETS.iterdir():
        assert not re.search(r"\|\s*safe|autoescape", path.read_text()), path.name


def test_data_cannot_end_its_element() -> None:
    evil = "</script><!--<script>"
    each = made_up_class(evaluated=[made_up_sample(f"test/{evil.replace('/', '')}/{i}", 0.3 * i) for i in range(3)])
    page = made_up_page(each, made_up_class(evil))
    data = re.search(r'id="samples">(.*?)</script>', page).group(1)
    assert "<" not in data
    assert {sample["class"] for sample in samples_of(page)} == {"gasket", evil}


def test_the_policy_allows_only_the_scripts_of_the_page() -> None:
    page = made_up_page(made_up_class(limit=2))
    policy = policy_of(page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL).group(1)
    packed = re.search(r'<script type="text/plain" id="plotly">(.*?)</script>', page).group(1)
    library = gzip.decompress(base64.b64decode(packed)).decode()
    allowed = re.search(r"script-src ([^;]*)", policy).group(1).split()
    assert allowed == [script_hash(script), script_hash(library)]
    assert "plotly.js v" in library[:300]
    digest = base64.b64encode(hashlib.sha256(b"1").digest()).decode()
    assert script_hash("1") == f"'sha256-{digest}'"


def test_nothing_is_fetched() -> None:
    page = made_up_page(made_up_class(limit=2))
    head = page.split('<script type="text/plain"')[0]
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", head)
    assert "@import" not in asset("page.css")


def test_assets_are_included_unchanged() -> None:
    page = made_up_page(made_up_class(limit=2))
    for name in ("page.css", "report.js"):
        assert asset(name).rstrip() in page, name


# Writing


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = made_up_class("gasket", limit=0), made_up_class("bracket", limit=0)
    for classes in ([one], [one, other]):
        record = results_record(COMMAND, {}, {each.name: each.entry for each in classes})
        write_report(tmp_path / "results", record, classes)
        assert [path.name for path in (tmp_path / "results").iterdir()] == ["report.html"]
    before = (tmp_path / "results/report.html").read_text()
    assert "bracket" in before

    def fail(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(InputError, match=r"report\.html cannot be written \(disk full\)"):
        write_report(tmp_path / "results", record, [one])
    assert (tmp_path / "results/report.html").read_text() == before
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["report.html"]


# Curves and charts


def test_a_thinned_curve_keeps_its_area() -> None:
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 90, 90), dtype=np.uint8)
    masks[:, 20:40, 30:50] = masks[:, 60:64, 60:64] = 1
    maps = rng.random((3, 90, 90)) + 0.8 * masks
    fprs, pros = pro_curve(masks, maps)
    thin_fprs, thin_pros = thin_curve(fprs, pros, PRO_LIMIT)
    assert 50 < len(thin_fprs) <= 200
    assert (thin_fprs[0], thin_fprs[-1]) == (0, PRO_LIMIT)
    assert area_to_limit(thin_fprs, thin_pros, PRO_LIMIT) == pytest.approx(area_to_limit(fprs, pros), abs=2e-3)


def path_points(svg: str, kind: str) -> np.ndarray:
    return np.array(
        [pair.split() for pair in re.search(rf'class="{kind}" d="M([^"Z]*)', svg).group(1).split("L")], float
    )


def test_a_curve_is_drawn_to_scale() -> None:
    svg = curve_chart([0, 0.1, 0.2], [0, 0.5, 1], Axis(0, 0.2, (0, 0.1, 0.2), "x"), "y", "title <b>")
    points = path_points(svg, "curve")
    assert points[1] == pytest.approx((points[0] + points[2]) / 2, abs=0.06)
    assert points[2, 0] > points[0, 0]
    assert points[2, 1] < points[0, 1]
    assert 'aria-label="title &lt;b&gt;"' in svg


def note_of(svg: str) -> tuple[float, str]:
    x, anchor = re.search(r'class="note" x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">threshold', svg).groups()
    return float(x), anchor


@pytest.mark.parametrize(("x", "anchor"), [(0.0, "start"), (0.9, "end"), (1.0, "end")])
def test_the_label_of_a_point_is_inside_the_chart(x: float, anchor: str) -> None:
    svg = curve_chart([0, 1], [0, 1], Axis(0, 1, (0, 1), "x"), "y", "title", (x, x))
    assert note_of(svg)[1] == anchor
    assert LEFT < note_of(svg)[0] < RIGHT


def scored(*values: tuple[str, float | None]) -> list[dict]:
    """Samples of results.json from folder and severity; the scores are three times the severities, or 7."""
    return [
        {
            "path": f"test/{folder}/{i}",
            "label": int(folder != "good"),
            "score": 7.0 if value is None else 3 * value,
            "severity": value,
        }
        for i, (folder, value) in enumerate(values)
    ]


def test_a_strip_plot_has_a_row_for_each_folder_and_a_dot_for_each_sample() -> None:
    strip = strip_plot(scored(("hole", 2.0), ("good", 0.0), ("good", 1.5), ("dent", 0.5), ("hole", 1.0)), 3.0)
    assert [(row.name, row.note, row.defective) for row in strip.rows] == [
        ("good", "false alarms: 1 of 2", False), ("dent", "found: 0 of 1", True), ("hole", "found: 1 of 2", True)
    ]  # fmt: skip
    (first, *_), (second, *_) = strip.rows[2].dots
    assert [dot[2:] for dot in strip.rows[2].dots] == [("test/hole/4", "1"), ("test/hole/0", "2")]
    assert "severity" in strip.label
    ticks = {text: x for x, text in strip.ticks}
    assert list(ticks) == ["-1", "0", "1", "2", "3", "4", "5"]
    assert strip.threshold == ticks["1"] == first == pytest.approx((ticks["0"] + ticks["2"]) / 2)
    assert second == ticks["2"]
    assert strip.rows[0].dots[0][0] == ticks["0"]


def test_a_strip_plot_shows_extreme_severities_at_its_edges() -> None:
    strip = strip_plot(scored(("hole", 1e9), ("good", -1e9), ("good", 0.0)), 3.0)
    assert [x for x, *_ in strip.rows[0].dots] == [2.0, 18.0]
    assert [(x, text) for x, _, _, text in strip.rows[1].dots] == [(98.0, "1e+09")]


@pytest.mark.parametrize("threshold", [None, 7.0, 9.0, 1e300])
def test_a_strip_plot_without_severities_shows_scores(threshold: float | None) -> None:
    strip = strip_plot(scored(("hole", None), ("good", 1.0)), threshold)
    assert "image score" in strip.label
    assert strip.rows[0].dots[0][3] == "3"
    assert (strip.threshold is None) is (threshold is None)
    assert all(0 <= x <= 100 for row in strip.rows for x, *_ in row.dots)
    alone = strip_plot(scored(("hole", None)), None)
    assert alone.rows[0].note == "1 sample"
    assert 0 <= alone.rows[0].dots[0][0] <= 100
