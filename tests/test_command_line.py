"""Command-line parser of the scripts: help, version, usage errors, and flags as dataclasses."""

from dataclasses import dataclass

import pytest

from utils import command_line
from utils.command_line import Parser, from_flags, version


@dataclass(frozen=True)
class Settings:
    side: int
    name: str
    doubled: int


@pytest.fixture(name="parser")
def parser_fixture() -> Parser:
    parser = Parser("Draw squares.\n\n    squares.py --side 3")
    parser.prog = "squares.py"
    parser.add_argument("--side", type=int, default=0, help="side, pixels")
    parser.add_argument("--name", help="name of the square")
    parser.add_argument("--filled", action="store_true", help="fill the square")
    return parser


def test_help_shows_defaults_where_there_are_some(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 0
    assert "squares.py --side 3" in lines
    assert "--side SIDE side, pixels (default: 0)" in lines
    assert "--name NAME name of the square" in lines
    assert "--filled fill the square" in lines


@pytest.mark.parametrize("flags", ["--size 3", "--side x", "--sid 3", "surplus"])
def test_a_wrong_flag_prints_two_lines(parser: Parser, capsys: pytest.CaptureFixture[str], flags: str) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(flags.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert usage == "usage: squares.py [--flag value ...]  (--help lists all flags)"
    assert error.startswith("squares.py: error: ")


def test_a_usage_error_names_the_positional_arguments(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    parser.add_argument("colors", metavar="COLORS.json")
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err.startswith("usage: squares.py COLORS.json [--flag value ...]")


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_only_rank_0_prints_a_usage_error(
    parser: Parser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for rank, lines in (("0", 2), ("1", 0)):
        monkeypatch.setenv(variable, rank)
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(["--size", "3"])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_version_equals_the_citation_file(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"squares.py {version()}\n"
    number = version().split()[0]
    assert f"\nversion: {number}\n" in (command_line.ROOT / "CITATION.cff").read_text()
    assert len(number.split(".")) == 3


def test_given_flags_are_the_flags_on_the_command_line(parser: Parser) -> None:
    for argv, given in (([], set()), (["--side", "0"], {"side"}), (["--filled", "--name", "a"], {"filled", "name"})):
        assert parser.given_flags(argv) == given, argv


def test_flags_become_the_fields_of_the_same_names(parser: Parser) -> None:
    args = parser.parse_args(["--side", "3", "--name", "a"])
    assert from_flags(Settings, args, doubled=6) == Settings(side=3, name="a", doubled=6)
    assert from_flags(Settings, args, doubled=6, name="b").name == "b"
