"""The files of finished classes: what is kept comes back, and what is no such file is refused and does no harm."""

import copy
import hashlib
import json
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
from runner.settings import applied_flags, parse_args
from utils.errors import InputError
from utils.reporting.html_report import report_page as report_page_module
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import report_page
from utils.reporting.results_json import results_record, write_results

FLAGS = ARGS | {"img_size": 224, "f_coreset": 0.1, "random_state": None, "rgb_checkpoint": Path("a/b.pth")}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u2028"
EVIL_NAME = EVIL.replace("/", "")  # of a folder
MEND = "Delete it to compute its class again."


@pytest.fixture(autouse=True)
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two pages say the same date."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Stopped":
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(report_page_module, "datetime", Stopped)


def kept(folder: Path, report: ClassReport) -> ClassReport:
    """What comes back of a report."""
    write_class(folder, report, FLAGS)
    read = read_class(folder, report.name, FLAGS)
    assert read is not None
    return read


def content_of(folder: Path, report: ClassReport) -> dict[str, Any]:
    write_class(folder, report, FLAGS)
    return json.loads(class_file(folder, report.name).read_text())


def put(folder: Path, content: object, name: str = "gasket") -> Path:
    """A file of any content in the place of a class's."""
    path = class_file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def refused(folder: Path, name: str = "gasket") -> str:
    """What reading a class ends with: one sentence that names its file."""
    with pytest.raises(InputError) as caught:
        read_class(folder, name, FLAGS)
    message = str(caught.value)
    assert str(class_file(folder, name)) in message
    assert "\n" not in message
    return message


# Kept and read again

REPORTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "nothing shown": {"limit": 0},
    "no image": {"limit": 2, "image": False},
    "no cloud": {"limit": 2, "cloud": False},
    "neither": {"limit": 2, "image": False, "cloud": False},
    "not calibrated": {"limit": 2, "threshold": None},
    "only good parts": {"threshold": None, "f1": None, "f1_threshold": None},
    "only defective parts": {"limit": 2},
    "one bank": {"limit": 2},
    "other names": {"name": "Führung 3 & 4"},
    "markup": {"name": EVIL_NAME},
}
PARTS = {
    "only good parts": lambda: [made_up_sample(f"test/good/{i:03d}", 0.1 * i) for i in range(4)],
    "only defective parts": lambda: [made_up_sample(f"test/hole/{i:03d}", 0.1 * i) for i in range(4)],
    "one bank": lambda: made_up_samples(banks=("rgb",)),
    "other names": lambda: [made_up_sample(f"test/h\udcff/{i}", 0.3 * i) for i in range(3)],
    "markup": lambda: [made_up_sample(f"test/{EVIL_NAME}/{i}", 0.3 * i) for i in range(3)],
}


@cache
def report_of(which: str) -> ClassReport:
    return made_up_class(evaluated=PARTS.get(which, made_up_samples)(), **REPORTS[which])


@pytest.mark.parametrize("which", REPORTS)
def test_what_is_kept_of_a_class_comes_back(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    assert kept(tmp_path, report) == replace(report, samples=json.loads(json.dumps(report.samples)))
    assert [path.name for path in class_file(tmp_path, report.name).parent.iterdir()] == [f"{report.name}.json"]


@pytest.mark.parametrize("which", REPORTS)
def test_a_page_of_what_came_back_is_the_same_byte_by_byte(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    page = made_up_page(report)
    assert made_up_page(kept(tmp_path, report)) == page
    assert len(samples_of(page)) == len(report.samples)
    record = results_record(COMMAND, ARGS, {report.name: report.entry})
    write_results(tmp_path / "a", record)
    write_results(tmp_path / "b", results_record(COMMAND, ARGS, {report.name: kept(tmp_path, report).entry}))
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


def test_classes_lie_beside_one_another(tmp_path: Path) -> None:
    for name in ("gasket", "bracket"):
        write_class(tmp_path, made_up_class(name, limit=0), FLAGS)
    assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == ["bracket.json", "gasket.json"]
    for name in ("gasket", "bracket"):
        read = read_class(tmp_path, name, FLAGS)
        assert read is not None
        assert read.name == name


def test_a_class_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_class(tmp_path / "nowhere", "gasket", FLAGS) is None
    assert read_class(tmp_path, "gasket", FLAGS) is None
    write_class(tmp_path, made_up_class("bracket", limit=0), FLAGS)
    assert read_class(tmp_path, "gasket", FLAGS) is None


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes").touch()
    with pytest.raises(InputError, match=r"classes/gasket\.json cannot be written"):
        write_class(tmp_path, made_up_class(limit=0), FLAGS)


# Flags


def test_flags_that_the_figures_hang_on_are_refused_and_named(tmp_path: Path) -> None:
    flags = vars(parse_args([])) | {"precision": "fp32"}
    free, binding = set(FREE_FLAGS), ("dataset_path", "max_sample", "target_fpr", "detector_dtype", "save_preds")
    assert free < set(flags)
    assert free.isdisjoint(binding)
    assert free & set(applied_flags(DetectorConfig())) == {"point_ops"}  # of all that a detector computes with
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
        was = None if flags[name] is None else flags[name] if isinstance(flags[name], list) else str(flags[name])
        assert message.startswith(f"{class_file(tmp_path, 'gasket')} was computed with {name} {was}, now another. ")
        assert message.endswith("Use the same flags, or omit --resume.")


def test_all_flags_that_differ_are_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    with pytest.raises(InputError, match=r"computed with f_coreset 0\.1, now 0\.2, img_size 224, now 112\. Use"):
        read_class(tmp_path, "gasket", FLAGS | {"img_size": 112, "f_coreset": 0.2, "output_dir": "elsewhere"})


def test_a_flag_that_only_one_of_both_runs_has_is_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    for changed in (FLAGS | {"new_flag": 3}, {name: value for name, value in FLAGS.items() if name != "img_size"}):
        with pytest.raises(InputError, match=r"new_flag None, now 3|img_size 224, now None"):
            read_class(tmp_path, "gasket", changed)


def test_flags_in_a_file_are_told_in_one_line(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    put(tmp_path, content | {"flags": content["flags"] | {"img_size": "\x1b[2J\nerror: none\n" * 1000}})
    message = refused(tmp_path)
    assert "img_size" in message
    assert "\x1b" not in message
    assert len(message) < 600 + len(str(tmp_path))


# Damaged files


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    sound = content_of(tmp_path, made_up_class(limit=1, cloud=False))
    text = json.dumps(sound)
    report = sound["report"]
    cases: list[tuple[object, str]] = [
        (text[: len(text) // 3], "not JSON"),
        ([], "no schema number"),
        (sound | {"flags": [["name", "gasket"]]}, "Expected `object`, got `array` at `flags`"),
        ({key: value for key, value in sound.items() if key != "report"}, "missing required field `report`"),
        (sound | {"report": report | {"name": 3}}, "at `report.name`"),
        (sound | {"report": report | {"decision": ["text", "text"]}}, "at `report.decision[0]`"),
        (sound | {"report": report | {"decision": [0.5]}}, "at `report.decision`"),
        (sound | {"report": report | {"outcomes": {"hit": "3"}}}, "at `report.outcomes[...]`"),
        (sound | {"report": report | {"roc": [[0, None], [0, 1]]}}, "at `report.roc[0][1]`"),
        (sound | {"report": report | {"good_scores": [None]}}, "at `report.good_scores[0]`"),
        (sound | {"report": report | {"parts": [3]}}, "at `report.parts[0]`"),
        (sound | {"report": report | {"entry": {}}}, "does not match its checksum"),
    ]
    for content, said in cases:
        path = put(tmp_path, content)
        if isinstance(content, str):
            path.write_text(content)
        message = refused(tmp_path)
        assert "is damaged" in message, said
        assert said in message
        assert message.endswith(MEND)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    put(tmp_path, content | {"schema": SCHEMA + 1})
    assert f"newer version (schema {SCHEMA + 1}, expected {SCHEMA})" in refused(tmp_path)


def test_a_class_under_another_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, content_of(tmp_path, made_up_class("bracket", limit=0)))
    assert "gasket.json is damaged" in refused(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    class_file(tmp_path, "gasket").chmod(0)
    with unprivileged():
        message = refused(tmp_path)
    assert message.endswith("cannot be read (Permission denied). Make it and the folders above it readable.")


# Files that mean harm


@cache
def plain() -> ClassReport:
    """A sound one, of two samples whose pictures are shown."""
    return made_up_class(evaluated=made_up_samples(4), limit=2, cloud=False)


def page_of(report: ClassReport) -> str:
    return report_page(results_record(COMMAND, ARGS, {report.name: report.entry}), [report], NOTE)


def assert_no_foreign_markup(page: str) -> None:
    """It has no element or attribute that the page of a sound file lacks."""
    read, sound = read_page(page), read_page(page_of(plain()))
    # A shown cloud brings the 3D script with it.
    assert [attrs for tag, attrs in read.tags if tag == "script" and attrs.get("id") != "plotly"] == [
        attrs for tag, attrs in sound.tags if tag == "script"
    ]
    assert {tag for tag, _ in read.tags} <= {tag for tag, _ in sound.tags} | {"p", "small"}
    assert {each for _, attrs in read.tags for each in attrs} <= {each for _, attrs in sound.tags for each in attrs}


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value lies in JSON; of a list only the first."""
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
def test_a_change_anywhere_is_noticed(tmp_path: Path, value: object) -> None:
    """Every single value of a sound file, replaced."""
    content = content_of(tmp_path, plain())
    for place in places(content["report"], ("report",)):
        other = changed(content, place, value)
        path = put(tmp_path, other)
        if json.dumps(other) != json.dumps(content):
            assert refused(tmp_path).startswith(f"{path} is damaged (")


@pytest.mark.parametrize("value", [EVIL, [EVIL], {EVIL: EVIL}, {EVIL: 1.0}], ids=repr)
def test_a_forged_file_cannot_break_out_of_the_page(tmp_path: Path, value: object) -> None:
    """Of who knows how its checksum is computed: no report may come of it, but none that shows more than text."""
    content = content_of(tmp_path, plain())
    broken, pages = [], 0
    for place in places(content["report"], ("report",)):
        put(tmp_path, forged(changed(content, place, value)))
        try:
            report = read_class(tmp_path, "gasket", FLAGS)
            assert report is not None
            page = page_of(report)
        except Exception:  # of whatever kind
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


def test_texts_of_a_file_are_shown_as_text(tmp_path: Path) -> None:
    """All that are free to say anything, at once."""
    content = content_of(tmp_path, plain())
    report = content["report"]
    report["decision"][1] = report["entry"]["threshold"]["source"] = EVIL
    for sample in report["parts"]:
        sample |= {
            "path": EVIL,
            "defect": EVIL,
            "outcome": EVIL,
            "truth": EVIL,
            "view": {"name": EVIL, "picture": EVIL},
        }
        sample["maps"] = dict.fromkeys([EVIL, "fused"], EVIL)
    put(tmp_path, forged(content))
    read = read_class(tmp_path, "gasket", FLAGS)
    assert read is not None
    page = page_of(read)
    assert_no_foreign_markup(page)
    assert EVIL not in page
    assert EVIL in {sample["path"] for sample in samples_of(page)}
    assert "<script>alert(1)</script>" in read_page(page).text
