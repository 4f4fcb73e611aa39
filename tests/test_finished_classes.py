"""Files of finished classes: they are read back unchanged, and other or damaged files are refused safely."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cleaning_runs import unprivileged
from msgspec.structs import replace
from report_pages import (
    ARGS,
    COMMAND,
    NOTE,
    made_up_class,
    made_up_page,
    made_up_sample,
    made_up_samples,
    read_page,
    samples_of,
)

from feature_extractors.config import DetectorConfig
from runner.finished_classes import FREE_FLAGS, SCHEMA, class_file, read_class, write_class
from runner.settings import applied_flags, make_parser
from utils.errors import InputError
from utils.reporting.html_report import report_page as report_page_module
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import report_page
from utils.reporting.messages import escape_controls
from utils.reporting.results_json import results_record
from utils.scans.json_records import write_record

FLAGS = ARGS | {"img_size": 224, "f_coreset": 0.1, "random_state": None, "rgb_checkpoint": Path("a/b.pth")}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u2028"
EVIL_NAME = EVIL.replace("/", "")  # a folder name has no slash
FIX = "Delete it to compute its class again."


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock, so that two pages show the same date."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Stopped":
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(report_page_module, "datetime", Stopped)


def round_trip(folder: Path, report: ClassReport) -> ClassReport:
    """Write a report and read it back."""
    write_class(folder, report, FLAGS)
    read = read_class(folder, report.name, FLAGS)
    assert read is not None
    return read


def content_of(folder: Path, report: ClassReport) -> dict[str, Any]:
    write_class(folder, report, FLAGS)
    return json.loads(class_file(folder, report.name).read_text())


def put(folder: Path, content: object, name: str = "gasket") -> Path:
    """Write any content as a class's file."""
    path = class_file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def refused(folder: Path, name: str = "gasket") -> str:
    """One-line error of reading a class, which names its file."""
    with pytest.raises(InputError) as caught:
        read_class(folder, name, FLAGS)
    message = str(caught.value)
    assert str(class_file(folder, name)) in message
    assert "\n" not in message
    return message


# Round trips

REPORTS: dict[str, dict[str, Any]] = {
    "complete": {},
    "nothing shown": {"limit": 0},
    "no image": {"limit": 2, "image": False},
    "no cloud": {"limit": 2, "cloud": False},
    "neither": {"limit": 2, "image": False, "cloud": False},
    "not calibrated": {"limit": 2, "threshold": None},
    "only good samples": {"threshold": None, "f1": None, "f1_threshold": None},
    "only defective samples": {"limit": 2},
    "one bank": {"limit": 2},
    "other names": {"name": "Führung 3 & 4"},
    "markup": {"name": EVIL_NAME},
}
SAMPLES = {
    "only good samples": lambda: [made_up_sample(f"test/good/{i:03d}", 0.1 * i) for i in range(4)],
    "only defective samples": lambda: [made_up_sample(f"test/hole/{i:03d}", 0.1 * i) for i in range(4)],
    "one bank": lambda: made_up_samples(banks=("rgb",)),
    "other names": lambda: [made_up_sample(f"test/h\udcff/{i}", 0.3 * i) for i in range(3)],
    "markup": lambda: [made_up_sample(f"test/{EVIL_NAME}/{i}", 0.3 * i) for i in range(3)],
}


@cache
def report_of(which: str) -> ClassReport:
    return made_up_class(evaluated=SAMPLES.get(which, made_up_samples)(), **REPORTS[which])


@pytest.mark.parametrize("which", REPORTS)
def test_a_class_is_read_back_unchanged(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    assert round_trip(tmp_path, report) == replace(report, samples=json.loads(json.dumps(report.samples)))
    assert [path.name for path in class_file(tmp_path, report.name).parent.iterdir()] == [f"{report.name}.json"]


@pytest.mark.parametrize("which", REPORTS)
def test_report_and_results_of_a_class_read_back_are_byte_equal(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    page = made_up_page(report)
    assert made_up_page(round_trip(tmp_path, report)) == page
    assert len(samples_of(page)) == len(report.samples)
    record = results_record(COMMAND, ARGS, {report.name: report.entry})
    write_record(tmp_path / "a" / "results.json", record)
    write_record(
        tmp_path / "b" / "results.json",
        results_record(COMMAND, ARGS, {report.name: round_trip(tmp_path, report).entry}),
    )
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


def test_each_class_has_its_own_file(tmp_path: Path) -> None:
    for name in ("gasket", "bracket"):
        write_class(tmp_path, made_up_class(name, limit=0), FLAGS)
    assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == ["bracket.json", "gasket.json"]
    for name in ("gasket", "bracket"):
        read = read_class(tmp_path, name, FLAGS)
        assert read is not None
        assert read.name == name


def test_a_class_without_a_file_is_none(tmp_path: Path) -> None:
    assert read_class(tmp_path / "nowhere", "gasket", FLAGS) is None
    assert read_class(tmp_path, "gasket", FLAGS) is None
    write_class(tmp_path, made_up_class("bracket", limit=0), FLAGS)
    assert read_class(tmp_path, "gasket", FLAGS) is None


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes").touch()
    with pytest.raises(InputError, match=r"classes/gasket\.json cannot be written"):
        write_class(tmp_path, made_up_class(limit=0), FLAGS)


# Flags


def test_changed_flags_that_affect_results_are_refused_and_named(tmp_path: Path) -> None:
    flags = vars(make_parser().parse_args([])) | {"precision": "fp32"}
    free, binding = set(FREE_FLAGS), ("dataset_path", "max_sample", "target_fpr", "detector_dtype", "save_preds")
    assert free < set(flags)
    assert free.isdisjoint(binding)
    assert free & set(applied_flags(DetectorConfig())) == {
        "point_ops"
    }  # the only free flag of the detector's configuration
    report = made_up_class(limit=0)
    write_class(tmp_path, report, flags)
    for name in flags:
        changed = flags | {name: "another"}
        if name in FREE_FLAGS:
            assert read_class(tmp_path, "gasket", changed) is not None, name
            continue
        with pytest.raises(InputError) as caught:
            read_class(tmp_path, "gasket", changed)
        message = str(caught.value)
        before = None if flags[name] is None else flags[name] if isinstance(flags[name], list) else str(flags[name])
        assert message.startswith(f"{class_file(tmp_path, 'gasket')} was computed with {name} {before}, now another. ")
        assert message.endswith("Use the same flags, or omit --resume.")


def test_all_flags_that_differ_are_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    with pytest.raises(InputError, match=r"computed with f_coreset 0\.1, now 0\.2, img_size 224, now 112\. Use"):
        read_class(tmp_path, "gasket", FLAGS | {"img_size": 112, "f_coreset": 0.2, "output_dir": "elsewhere"})


def test_a_flag_of_only_one_of_the_runs_is_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    for changed in (FLAGS | {"new_flag": 3}, {name: value for name, value in FLAGS.items() if name != "img_size"}):
        with pytest.raises(InputError, match=r"new_flag None, now 3|img_size 224, now None"):
            read_class(tmp_path, "gasket", changed)


def test_flags_in_a_file_are_shown_in_one_short_line(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    put(tmp_path, content | {"flags": content["flags"] | {"img_size": "\x1b[2J\nerror: none\n" * 1000}})
    message = refused(tmp_path)
    assert "img_size" in message
    assert "\x1b" not in message
    assert len(message) < 600 + len(str(tmp_path))


# Damaged files


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    valid = content_of(tmp_path, made_up_class(limit=1, cloud=False))
    text = json.dumps(valid)
    report = valid["report"]
    cases: list[tuple[object, str]] = [
        (text[: len(text) // 3], "not JSON"),
        ([], "no schema number"),
        (valid | {"flags": [["name", "gasket"]]}, "Expected `object`, got `array` at `flags`"),
        ({key: value for key, value in valid.items() if key != "report"}, "missing required field `report`"),
        (valid | {"report": report | {"name": 3}}, "at `report.name`"),
        (valid | {"report": report | {"pro": [[0, None], [0, 1]]}}, "at `report.pro[0][1]`"),
        (valid | {"report": report | {"samples": [3]}}, "at `report.samples[0]`"),
        (valid | {"report": report | {"entry": {}}}, "does not match its checksum"),
    ]
    for content, expected in cases:
        path = put(tmp_path, content)
        if isinstance(content, str):
            path.write_text(content)
        message = refused(tmp_path)
        assert "is damaged" in message, expected
        assert expected in message
        assert message.endswith(FIX)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    put(tmp_path, content | {"schema": SCHEMA + 1})
    assert f"newer version (schema {SCHEMA + 1}, expected {SCHEMA})" in refused(tmp_path)


def test_a_class_under_another_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, content_of(tmp_path, made_up_class("bracket", limit=0)))
    assert "gasket.json is damaged" in refused(tmp_path)


def test_a_file_without_read_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folders
        root = Path(folder)
        write_class(root, made_up_class(limit=0), FLAGS)
        for path in (root, root / "classes"):
            path.chmod(0o777)
        class_file(root, "gasket").chmod(0)
        with unprivileged():
            assert "gasket.json cannot be read (Permission denied). Allow access to it" in refused(root)


# Malicious files


@cache
def plain() -> ClassReport:
    """Valid report that shows two samples with images."""
    return made_up_class(evaluated=made_up_samples(4), limit=2, cloud=False)


def page_of(report: ClassReport) -> str:
    return report_page(results_record(COMMAND, ARGS, {report.name: report.entry}), [report], NOTE)


def assert_no_foreign_markup(page: str) -> None:
    """Assert that a page has no element or attribute that the page of a valid file lacks."""
    read, valid = read_page(page), read_page(page_of(plain()))
    # A shown cloud adds the 3D script.
    assert [attrs for tag, attrs in read.tags if tag == "script" and attrs.get("id") != "plotly"] == [
        attrs for tag, attrs in valid.tags if tag == "script"
    ]
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in valid.tags} | {"p", "small"}
    assert {each for _, attrs in read.tags for each in attrs} <= {each for _, attrs in valid.tags for each in attrs}


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in JSON; of a list only the first item."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(content: dict[str, Any], place: tuple[Any, ...], value: object) -> dict[str, Any]:
    content = copy.deepcopy(content)
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return content


@pytest.mark.parametrize("value", [EVIL, "", None, True, -1, float("nan"), [], {}], ids=repr)
def test_any_changed_value_is_detected(tmp_path: Path, value: object) -> None:
    content = content_of(tmp_path, plain())
    for place in places(content["report"], ("report",)):
        other = changed(content, place, value)
        path = put(tmp_path, other)
        if json.dumps(other) != json.dumps(content):
            assert refused(tmp_path).startswith(f"{path} is damaged (")


@pytest.mark.parametrize("value", [EVIL, [EVIL], {EVIL: EVIL}, {EVIL: 1.0}], ids=repr)
def test_a_forged_file_adds_no_markup_to_the_page(tmp_path: Path, value: object) -> None:
    """A file with a forged value and a matching checksum gives no page, or a page without new markup."""
    content = content_of(tmp_path, plain())
    broken, pages = [], 0
    for place in places(content["report"], ("report",)):
        put(tmp_path, forged(changed(content, place, value)))
        try:
            report = read_class(tmp_path, "gasket", FLAGS)
            assert report is not None
            page = page_of(report)
        except Exception:  # any kind of refusal
            continue
        pages += 1
        try:
            assert_no_foreign_markup(page)
        except AssertionError:
            broken.append(".".join(map(str, place[1:])))
    assert pages > 0
    assert broken == []


def forged(content: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(content["report"]).encode()).hexdigest()
    return content | {"report_sha256": digest}


def test_texts_of_a_forged_file_are_escaped(tmp_path: Path) -> None:
    """All free texts of a file are shown as text, not as markup."""
    content = content_of(tmp_path, plain())
    report = content["report"]
    report["entry"]["threshold"]["source"] = EVIL
    for sample in report["samples"]:
        sample |= {
            "path": EVIL,
            "defect": EVIL,
            "outcome": EVIL,
            "truth": EVIL,
            "view": {"name": EVIL, "image": EVIL},
        }
        sample["maps"] = dict.fromkeys([EVIL, "fused"], EVIL)
    put(tmp_path, forged(content))
    read = read_class(tmp_path, "gasket", FLAGS)
    assert read is not None
    page = page_of(read)
    assert_no_foreign_markup(page)
    assert EVIL not in page
    assert escape_controls(EVIL) in {sample["path"] for sample in samples_of(page)}
    assert "<script>alert(1)</script>" in read_page(page).text
