"""The files of finished classes: what is kept comes back, and what is no such file is refused and does no harm."""

import copy
import json
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cleaning_runs import unprivileged
from report_pages import (
    ARGS,
    COMMAND,
    NOTE,
    made_up_class,
    made_up_page,
    made_up_part,
    made_up_parts,
    parts_of,
    read_page,
)

from feature_extractors.config import DetectorConfig
from runner import finished_classes
from runner.finished_classes import FREE_FLAGS, SCHEMA, class_file, read_class, write_class
from runner.settings import applied_flags, parse_args
from utils.errors import InputError
from utils.report import results_record, write_results
from utils.reporting.html_report import report_page as report_page_module
from utils.reporting.html_report.class_report import ClassReport
from utils.reporting.html_report.report_page import report_page

FLAGS = ARGS | {"img_size": 224, "f_coreset": 0.1, "random_state": None, "rgb_checkpoint": Path("a/b.pth")}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u2028"
EVIL_NAME = EVIL.replace("/", "")  # of a folder
MEND = "delete it, and its class is computed anew"


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
    "no photo": {"limit": 2, "photo": False},
    "no cloud": {"limit": 2, "cloud": False},
    "neither": {"limit": 2, "photo": False, "cloud": False},
    "not calibrated": {"limit": 2, "threshold": None},
    "only good parts": {"threshold": None, "f1": None, "f1_threshold": None},
    "only defective parts": {"limit": 2},
    "one bank": {"limit": 2},
    "other names": {"name": "Führung 3 & 4"},
    "markup": {"name": EVIL_NAME},
}
PARTS = {
    "only good parts": lambda: [made_up_part(f"test/good/{i:03d}", 0.1 * i) for i in range(4)],
    "only defective parts": lambda: [made_up_part(f"test/hole/{i:03d}", 0.1 * i) for i in range(4)],
    "one bank": lambda: made_up_parts(banks=("rgb",)),
    "other names": lambda: [made_up_part(f"test/h\udcff/{i}", 0.3 * i) for i in range(3)],
    "markup": lambda: [made_up_part(f"test/{EVIL_NAME}/{i}", 0.3 * i) for i in range(3)],
}


@cache
def report_of(which: str) -> ClassReport:
    return made_up_class(parts=PARTS.get(which, made_up_parts)(), **REPORTS[which])


@pytest.mark.parametrize("which", REPORTS)
def test_what_is_kept_of_a_class_comes_back(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    read = kept(tmp_path, report)
    assert [path.name for path in class_file(tmp_path, report.name).parent.iterdir()] == [f"{report.name}.json"]
    assert (read.name, read.decision, read.outcomes, read.total) == (
        report.name, report.decision, dict(report.outcomes), report.total,
    )  # fmt: skip
    assert read.entry == json.loads(json.dumps(report.entry))
    assert read.parts == json.loads(json.dumps(report.parts))
    pairs = [(read.good_scores, report.good_scores), (read.defective_scores, report.defective_scores)]
    for of_read, of_report in ((read.roc, report.roc), (read.pro, report.pro)):
        assert (of_read is None) == (of_report is None)
        pairs += zip(of_read or (), of_report or (), strict=True)
    for ours, expected in pairs:
        assert ours.dtype == np.float64
        np.testing.assert_array_equal(ours, expected, strict=True)


@pytest.mark.parametrize("which", REPORTS)
def test_a_page_of_what_came_back_is_the_same_byte_by_byte(tmp_path: Path, which: str) -> None:
    report = report_of(which)
    page = made_up_page(report)
    assert made_up_page(kept(tmp_path, report)) == page
    assert len(parts_of(page)) == len(report.parts)
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


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    before = class_file(tmp_path, "gasket").read_bytes()

    def fail(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(InputError, match=r"gasket\.json cannot be written \(No space left .*: free disk space"):
            write_class(tmp_path, made_up_class(limit=1), FLAGS)
    assert [path.name for path in (tmp_path / "classes").iterdir()] == ["gasket.json"]
    assert class_file(tmp_path, "gasket").read_bytes() == before
    write_class(tmp_path, made_up_class(limit=1), FLAGS)
    assert class_file(tmp_path, "gasket").read_bytes() != before


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes").touch()
    with pytest.raises(InputError, match=r"classes/gasket\.json cannot be written"):
        write_class(tmp_path, made_up_class(limit=0), FLAGS)
    assert "cannot be read" in refused(tmp_path)


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
        assert message.startswith(f"{class_file(tmp_path, 'gasket')} was computed with {name} {was}, now another: ")
        assert message.endswith("give --resume the flags of the run that it goes on with, or leave it out")


def test_all_flags_that_differ_are_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    with pytest.raises(InputError, match=r"computed with f_coreset 0\.1, now 0\.2, img_size 224, now 112: give"):
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


# Files that are none


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    write_class(tmp_path, made_up_class(limit=1), FLAGS)
    path = class_file(tmp_path, "gasket")
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(share * len(data))])
    assert refused(tmp_path) == f"{path} is damaged: {MEND}"


@pytest.mark.parametrize(
    "content",
    [b"gasket", b"\xff\xfe\x00", b"\0" * 4096, b"<html>404</html>", b"[" * 100_000, b"{" * 100_000, b"{} {}"],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, {}).write_bytes(content)
    assert refused(tmp_path).endswith(f" is damaged: {MEND}")


@pytest.mark.parametrize("content", [[], {}, None, 3, "text", {"schema": None}, {"schema": []}, {"schema": "1"}])
def test_what_is_another_schema_is_refused(tmp_path: Path, content: object) -> None:
    path = put(tmp_path, content)
    assert refused(tmp_path) == f"{path} is no file of schema {SCHEMA}: {MEND}"


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    put(tmp_path, content | {"schema": SCHEMA + 1})
    assert f"is no file of schema {SCHEMA}" in refused(tmp_path)


def test_a_missing_key_and_one_too_many_are_refused(tmp_path: Path) -> None:
    content = content_of(tmp_path, made_up_class(limit=0))
    assert set(content["report"]) == set(ClassReport._fields)
    for key in ("flags", "report"):
        put(tmp_path, {name: value for name, value in content.items() if name != key})
        assert refused(tmp_path).endswith(f" is damaged: {MEND}")
    for key in ClassReport._fields:
        put(tmp_path, content | {"report": {name: each for name, each in content["report"].items() if name != key}})
        assert refused(tmp_path).endswith(f" is damaged: {MEND}"), key
    put(tmp_path, content | {"report": content["report"] | {"more": 1}})
    assert refused(tmp_path).endswith(f" is damaged: {MEND}")


@pytest.mark.parametrize("value", [[], 3, "text", None, [["name", "gasket"]]])
@pytest.mark.parametrize("key", ["flags", "report"])
def test_parts_of_another_type_are_refused(tmp_path: Path, key: str, value: object) -> None:
    put(tmp_path, content_of(tmp_path, made_up_class(limit=0)) | {key: value})
    assert refused(tmp_path).endswith(f" is damaged: {MEND}")


OTHER_TYPES: list[tuple[str, object]] = [
    ("name", 3),
    ("name", None),
    ("entry", None),
    ("entry", []),
    ("entry", {}),
    ("entry", {"samples": []}),
    ("decision", 3),
    ("decision", "ab"),
    ("decision", [0.5]),
    ("decision", ["text", "text"]),
    ("decision", [None, "text"]),
    ("decision", {"threshold": 0.5, "source": "text"}),
    ("outcomes", None),
    ("outcomes", []),
    ("outcomes", {"hit": "3"}),
    ("outcomes", {"hit": None}),
    ("roc", 3),
    ("roc", "ab"),
    ("roc", [[0, 1]]),
    ("roc", [[0, 1], [0]]),
    ("roc", [[0, "text"], [0, 1]]),
    ("roc", [[0, None], [0, 1]]),
    ("pro", {"0": [0], "1": [1]}),
    ("good_scores", None),
    ("good_scores", "text"),
    ("good_scores", ["text"]),
    ("good_scores", [None]),
    ("defective_scores", [{}]),
    ("parts", {}),
    ("parts", None),
    ("parts", [3]),
    ("parts", [{}]),
]


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    sound = content_of(tmp_path, made_up_class(limit=1, cloud=False))
    for field, value in OTHER_TYPES:
        path = put(tmp_path, sound | {"report": sound["report"] | {field: value}})
        assert refused(tmp_path) == f"{path} is damaged: {MEND}", (field, value)


def test_a_class_under_another_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, content_of(tmp_path, made_up_class("bracket", limit=0)))
    assert refused(tmp_path).endswith(f"gasket.json is damaged: {MEND}")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_class(tmp_path, made_up_class(limit=0), FLAGS)
    class_file(tmp_path, "gasket").chmod(0)
    with unprivileged():
        message = refused(tmp_path)
    assert message.endswith("cannot be read (Permission denied): make it and the folders above it readable")


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    class_file(tmp_path, "gasket").mkdir(parents=True)
    assert "gasket.json cannot be read (Is a directory)" in refused(tmp_path)


# Files that mean harm


@cache
def plain() -> ClassReport:
    """A sound one, of two parts whose pictures are shown."""
    return made_up_class(parts=made_up_parts(4), limit=2, cloud=False)


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
            assert refused(tmp_path) == f"{path} is damaged: {MEND}"


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
    return content | {"report_sha256": finished_classes._checksum(content["report"])}


def test_texts_of_a_file_are_shown_as_text(tmp_path: Path) -> None:
    """All that are free to say anything, at once."""
    content = content_of(tmp_path, plain())
    report = content["report"]
    report["decision"][1] = report["entry"]["threshold"]["source"] = EVIL
    for part in report["parts"]:
        part |= {"path": EVIL, "defect": EVIL, "outcome": EVIL, "truth": EVIL, "view": {"name": EVIL, "picture": EVIL}}
        part["maps"] = dict.fromkeys([EVIL, "fused"], EVIL)
    put(tmp_path, forged(content))
    read = read_class(tmp_path, "gasket", FLAGS)
    assert read is not None
    page = page_of(read)
    assert_no_foreign_markup(page)
    assert EVIL not in page
    assert EVIL in {part["path"] for part in parts_of(page)}
    assert "<script>alert(1)</script>" in read_page(page).text
