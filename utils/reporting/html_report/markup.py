"""What every page shares: escaping, the shell with its Content-Security-Policy, numbers and bars."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Template

from utils.reporting.text_tables import UNDEFINED, number
from utils.scans.files import atomic_path

ASSETS = Path(__file__).parent / "assets"


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


@cache
def asset(name: str) -> str:
    """The text of a file in assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


def data_element(name: str, data: object) -> str:
    """Data for the script of the page, as JSON in which no tag can begin or end."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    text = re.sub("[\ud800-\udfff]", lambda found: f"\\\\u{ord(found[0]):x}", text)  # as `write_page` writes it
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def script_hash(script: str) -> str:
    """How a Content-Security-Policy names an inline script that may run."""
    digest = hashlib.sha256(script.encode("utf-8", errors="surrogatepass")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page(title: str, body: str, script: str = "", later_scripts: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup, every text in it escaped already.
        script: runs at the end of the body.
        later_scripts: what `script` may run on request, named in the policy by their hashes; nothing else may run.
    """
    allowed = [script_hash(each) for each in (script, *later_scripts) if each]
    policy = (
        f"default-src 'none'; script-src {' '.join(allowed) or chr(39) + 'none' + chr(39)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return Template(asset("page.html")).substitute(
        policy=policy,
        title=escape(title),
        style=asset("page.css"),
        body=body,
        script=f'<script type="module">{script}</script>' if script else "",
    )


def write_page(path: Path | str, text: str) -> None:
    """Write a page so that a browser never meets half of it."""
    with atomic_path(path) as temporary:  # backslashreplace: a command line may hold bytes that are no text
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def bar_cell(value: float | None, beside: str = "", kind: str = "more") -> str:
    """A table cell with a figure in [0, 1] and a bar of that length.

    `beside` is a remark in plain text; `kind` "less" colors the bar of a figure of which less is better.
    """
    remark = f"<small>{escape(beside)}</small>" if beside else ""
    if value is None:
        return f'<td class="undefined">{UNDEFINED}{remark}</td>'
    return f'<td style="--share:{100 * value:.1f}%"><span class="bar {kind}">{number(value)}</span>{remark}</td>'
