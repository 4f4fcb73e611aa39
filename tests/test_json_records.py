"""JSON records: round trips, atomic writes, and one clear error for every kind of damage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import pytest

from utils.errors import InputError
from utils.scans.json_records import decode_record, read_record, write_record

FIX = "Fit the detector again"


@dataclass(frozen=True)
class Setting:
    rate: float = 0.1
    pair: tuple[int, int] = (1, 2)
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InputError(f"--rate is {self.rate}. Give at least 0.")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    settings: dict[str, Setting]
    note: str | None = None
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    title: str = msgspec.field(default="", name="heading")  # another name in the file


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_record(path, Entry, 2, FIX)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 300 + len(str(path))
    return message.removeprefix(f"{path} ")


def test_round_trip(tmp_path: Path) -> None:
    entry = Entry(2, {"a": Setting(0.3, (3, 4), "slow"), "\udcff": Setting()}, note="line\nbreak", title="x")
    write_record(tmp_path / "deep/er/record.json", entry)
    assert read_record(tmp_path / "deep/er/record.json", Entry, 2, FIX) == entry
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["record.json"]


def test_numpy_values_and_paths_are_written_plainly(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", {"a": np.float32(0.5), "b": np.arange(2), "c": Path("x/y")})
    assert (tmp_path / "record.json").read_text() == '{"a": 0.5, "b": [0, 1], "c": "x/y"}\n'


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), (set(), TypeError)]
)
def test_values_outside_json_are_not_written(tmp_path: Path, value: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        write_record(tmp_path / "record.json", {"a": value})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_record(tmp_path / "record.json", 1)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\). Free disk space"):
        write_record(tmp_path / "record.json", 2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1\n"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[bytes, str]] = [
        (b"", "is damaged (not JSON: Expecting value"),
        (b"\xff\xfe{}", "is damaged (not JSON: invalid start byte)"),
        (b"[" * 100_000, "is damaged (nested too deeply)"),
        (b'{"schema": NaN}', "is damaged (not JSON: NaN is not a finite number)"),
        (b'{"schema": 1e999}', "is damaged (not JSON: 1e999 is not a finite number)"),
        (b'{"schema": 2, "note": ' + b"1" * 5000, "is damaged (not JSON: Exceeds the limit"),
        (b"[]", "is damaged (no schema number)"),
        (b'{"schema": "2"}', "is damaged (no schema number)"),
        (b'{"schema": true}', "is damaged (no schema number)"),
        (b'{"schema": 1}', f"is from an older version (schema 1, expected 2). {FIX}."),
        (b'{"schema": 3}', "is from a newer version (schema 3, expected 2). Update this program."),
        (b'{"schema": 2}', f"is damaged (Object missing required field `settings`). {FIX}."),
        (b'{"schema": 2, "settings": {}, "count": 0}', "is damaged (Expected `int` >= 1 at `count`)"),
        (b'{"schema": 2, "settings": {"a": {"rate": "x"}}}', "(Expected `float`, got `str` at `settings[...].rate`)"),
        (b'{"schema": 2, "settings": {"a": {"rate": -1}}}', "(--rate is -1.0 at `settings[...]`)"),
        (b'{"schema": 2, "settings": {"a": {"pair": [1]}}}', "(Expected `array` of length 2, got 1"),
        (b'{"schema": 2, "settings": {"a": {"mode": "\\u001b[2J"}}}', "at `settings[...].mode`"),
        (b'{"schema": 2, "settings": {}, "\\u001b[2J\\n": 1}', "(Object contains unknown field `\\x1b[2J\\n`)"),
    ]
    for content, expected in cases:
        assert expected in refusal(tmp_path / "record.json", content), content


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"record\.json is missing\. {FIX}\."):
        read_record(tmp_path / "record.json", Entry, 2, FIX)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_record(tmp_path, Entry, 2, FIX)


def test_decode_record_needs_no_schema() -> None:
    kind: Any = dict[str, Setting]
    assert decode_record('{"a": {"rate": 1}}', kind, Path("record.jsonl"), FIX) == {"a": Setting(1.0)}
    with pytest.raises(InputError, match=r"record\.jsonl is damaged \(not JSON"):
        decode_record('{"a": {"ra', kind, Path("record.jsonl"), FIX)
