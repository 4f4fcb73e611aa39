"""Pages from the templates in assets/: escaped, self-contained, and without scripts other than their own."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.reporting.tables import UNDEFINED, number
from utils.scans.files import atomic_path

ASSETS = Path(__file__).parent / "assets"


@cache
def environment() -> Environment:
    """Templates of assets/; every value that they print is escaped."""
    loader = FileSystemLoader(ASSETS)
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["number"] = number
    found.filters["place"] = "{:.1f}".format  # a coordinate of a chart
    found.globals["undefined"] = UNDEFINED
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}  # of the filter tojson
    return found


@cache
def asset(name: str) -> str:
    """Text of a file in assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


def render_page(template: str, script: str = "", later_scripts: Sequence[str] = (), **values: Any) -> str:
    """Render a template that extends page.html, with `values`.

    `script` runs at the end of the page, and starts `later_scripts` on request. The Content-Security-Policy allows
    them by their hashes, and forbids any other script and all requests.
    """
    sources = " ".join(script_hash(each) for each in (script, *later_scripts) if each) or "'none'"
    own = {"style": Markup(asset("page.css")), "script": Markup(script)}  # noqa: S704 (files of this project)
    return environment().get_template(template).render(own | values, script_sources=sources)


def script_hash(script: str) -> str:
    """Name of an inline script in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def write_page(path: Path | str, text: str) -> None:
    """Write a page atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # undecodable bytes of file names
