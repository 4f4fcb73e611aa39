"""One list of bad values and faults, applied to every script. To cover a new script, add a line to SCRIPTS."""

import argparse
import errno
import importlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import pytest
from conftest import ROOT

from utils import command_line
from utils.command_line import Parser
from utils.errors import InputError
from utils.reporting.messages import escape_controls, exit_on_error, show

SCRIPTS = {  # module: its shortest valid command
    "main": [],
    "fusion_pretrain": [],
    "predict": ["--detector", "d", "--rgb", "a.png"],
    "utils.preprocessing": ["data"],
    "utils.convert": ["scans", "--output", "parts/bracket/train/good"],
    "utils.preprocess_eyecandies": ["--dataset_path", "data", "--target_dir", "out"],
    "utils.synthetic": ["out"],
    "utils.report": ["a.json", "b.json"],
    "runner.reproduce": ["--dataset_path", "data"],
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


def exit_of(script: str, *flags: str) -> int:
    """Exit code of a script's main in this process."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *SCRIPTS[script], *flags])
        module.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def parser_of(script: str) -> Parser:
    """Parser of a script."""
    found: list[Parser] = []

    class FoundError(Exception):
        pass

    def keep(self: Parser, *_: object) -> None:
        found.append(self)
        raise FoundError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FoundError):
        patch.setattr(Parser, "parse_args", keep)
        importlib.import_module(script).main(SCRIPTS[script])
    return found[0]


def numeric_flags(parser: Parser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.type in (int, float) and action.choices is None]


def test_every_script_is_listed() -> None:
    paths = [*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("runner/*.py")]
    scripts = {path for path in paths if 'if __name__ == "__main__":\n' in path.read_text()}
    assert {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in scripts} == set(SCRIPTS)


@every_script
def test_every_number_has_bounds_that_its_default_keeps(script: str) -> None:
    parser = parser_of(script)
    assert {action.dest for action in numeric_flags(parser)} == parser.bounds.keys()
    for action in numeric_flags(parser):
        low, high = parser.bounds[action.dest]
        assert math.isfinite(low) and math.isfinite(high)
        defaults = action.default if isinstance(action.default, list) else [action.default]
        assert all(value is None or low <= value <= high for value in defaults), action.dest


@every_script
def test_a_number_out_of_its_bounds_is_refused(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = parser_of(script)
    for action in numeric_flags(parser):
        low, high = parser.bounds[action.dest]
        above = str(2 * high) if action.type is float else str(int(high) + 1)
        below = str(low - 1 - abs(low)) if action.type is float else str(int(low) - 1)
        for value in (above, below, *(("nan", "inf", "-inf") if action.type is float else ())):
            code = exit_of(script, f"{action.option_strings[0]}={value}")
            usage, error = capsys.readouterr().err.splitlines()
            assert code == 2
            assert usage.startswith("usage: ")
            assert f"error: --{action.dest} is {action.type(value)}. Give a number from {low} to {high}." in error


@every_script
def test_words_in_place_of_a_number_are_refused(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    for action in numeric_flags(parser_of(script)):
        for value in ("", "many", "0x10", "1,5", "\x1b[2J"):
            assert exit_of(script, f"{action.option_strings[0]}={value}") == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert f"invalid {action.type.__name__} value" in error
            assert error.isprintable()


@every_script
def test_control_characters_in_flags_are_shown_escaped(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(script, "--no_such\x1b[2J\nflag") == 2
    assert "--no_such\\x1b[2J\\nflag" in capsys.readouterr().err


def raise_(error: BaseException) -> None:
    raise error


# Errors, each with words of its message.
FAULTS: list[tuple[BaseException, str]] = [
    (InputError("a.png is blue. Paint it."), "error: a.png is blue. Paint it."),
    (OSError(errno.ENOSPC, "No space left on device", "a"), "a cannot be read or written (No space left on device)"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "Shorten the name"),
    (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "Remove the link that leads back to itself"),
    (PermissionError(errno.EACCES, "Permission denied", "a\x1b"), "a\\x1b cannot be read or written"),
    (OSError("Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: no disk"), "(OSError: no disk)"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "There is not enough memory."),
    (MemoryError(), "There is not enough memory."),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"), "There is not enough memory."),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "There is not enough memory."),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "characters that are not UTF-8"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (RuntimeError("Symlink loop from '/a'"), "A link leads back to itself (Symlink loop from '/a')"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "A worker process was killed"),
    (BrokenProcessPool("A process in the process pool was terminated abruptly"), "A worker process was killed"),
]


@every_script
def test_faults_end_with_one_sentence(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, words in FAULTS:
        monkeypatch.setattr(Parser, "parse_args", lambda *_, error=error: raise_(error))
        assert exit_of(script) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith(f"{script}.py: error: ")
        assert words in line
        assert line.endswith(".")
        assert line.isprintable()


@every_script
def test_ctrl_c_in_an_import_ends_quietly(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:  # as the compiled module of open3d does
            raise ImportError("initialization failed") from interrupt

    monkeypatch.setattr(Parser, "parse_args", fail)
    assert exit_of(script) == 130
    assert "interrupted" in capsys.readouterr().err


@every_script
def test_other_errors_keep_their_traceback(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), RuntimeError("another one")):
        monkeypatch.setattr(Parser, "parse_args", lambda *_, error=error: raise_(error))
        with pytest.raises(type(error)):
            importlib.import_module(script).main([])


@every_script
def test_debug_shows_the_traceback(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_fail(*args: object) -> None:
        parse(*args)
        raise MemoryError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_fail)
    for flags, shown in (([], False), (["--debug"], True), ([], False)):
        assert exit_of(script, *flags) == 2
        assert ("Traceback" in capsys.readouterr().err) == shown


# Streams


def in_gate(function: Callable[[], None], stdout: io.TextIOBase, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as stop, exit_on_error():
        function()
        raise SystemExit(0)
    return int(stop.value.code or 0)


def test_stdout_takes_every_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="ascii")
    assert in_gate(lambda: show("gröfe \udcff \x1b[2J\n"), stdout, monkeypatch) == 0
    assert written.getvalue() == rb"gr\xf6fe \udcff \x1b[2J\n" + b"\n"


def test_a_full_disk_behind_stdout_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with os.fdopen(os.open("/dev/full", os.O_WRONLY), "w") as stdout:
        assert in_gate(lambda: print("text"), stdout, monkeypatch) == 2
    assert "stdout cannot be read or written (No space left on device)" in capfd.readouterr().err


def test_log_records_are_escaped(caplog: pytest.LogCaptureFixture) -> None:
    with exit_on_error():
        logging.getLogger("any").warning("%s was read", "a\x1b[2J\nb.png")
    assert caplog.messages == ["a\\x1b[2J\\nb.png was read"]


def test_escaping_keeps_printable_text() -> None:
    assert escape_controls("größe 名 e\u0301.png") == "größe 名 e\u0301.png"
    assert (os.cpu_count() or 1) <= command_line.MOST_WORKERS
