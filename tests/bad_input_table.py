"""Print a table of bad flags and faults over all scripts: kind, script, exit code, message, traceback.

python tests/bad_input_table.py
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_entry_points import FAULTS, SCRIPTS, exit_of, numeric_flags, parser_of, raise_

from utils.command_line import Parser


def row(kind: str, script: str, *flags: str) -> tuple[str, str, str, str, str]:
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            code = str(exit_of(script, *flags))
    except Exception as error:  # would be a traceback
        return kind, script, "1", repr(error), "yes"
    lines = stderr.getvalue().splitlines() or [""]
    return kind, script, code, lines[-1], "yes" if "Traceback" in stderr.getvalue() else "no"


def main() -> None:
    rows = []
    for script in SCRIPTS:
        rows += [row("unknown flag", script, "--no_such_flag"), row("escape code", script, "--no_such\x1b[2J\nflag")]
        for action in numeric_flags(parser_of(script)):
            for value in ("many", "-1e400", "nan", "9" * 25):
                rows.append(row(f"--{action.dest} {value}", script, f"{action.option_strings[0]}={value}"))
        for error, _ in FAULTS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Parser, "parse_args", lambda *_, error=error: raise_(error))
                rows.append(row(ascii(error)[:40], script))
    print("| kind | script | exit code | message | traceback? |\n|---|---|---|---|---|")
    for each in rows:
        print(f"| {' | '.join(each)} |")
    bad = [each for each in rows if each[2] != "2" or each[4] != "no"]
    print(
        f"\n{len({each[0] for each in rows})} kinds, {len(rows)} runs, {len(bad)} without exit code 2 and one sentence"
    )


if __name__ == "__main__":
    main()
