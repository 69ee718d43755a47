"""Puts HTML pages together: each becomes one file that holds its style sheet, script and data.

    base.html                  head of every page, and the order of its parts
    NAME.html                  title and body of a page
    shared.css, NAME.css       its style sheet: what all pages share, then what only this page has
    shared.js, NAME.js         its script, likewise

The content security policy in base.html forbids every network request. Model text reaches a page as JSON in a script
block that the browser does not run, and the script writes it into the document as text, never as markup.

Left out on purpose: a build step, a JavaScript framework, minified sources.
"""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
)


def render(name: str, blocks: dict[str, str]) -> str:
    """The text of the page `name` ("report" or "trace") as one HTML document.

    blocks: {element id: JSON text made by to_json}; the page's script reads each with `block(id)`. Raises ValueError if
    a block holds "<", since "</script>" would end the block and "<!--" would change how the browser reads it.
    """
    for element_id, text in blocks.items():
        if "<" in text:
            raise ValueError(f"page {name!r}, block {element_id!r}: '<' is not escaped; make the text with to_json")
    # Style sheets and scripts are variables, not templates: "}}" and "{#" mean other things in them.
    css, js = (
        Markup("\n".join((FOLDER / f"{part}.{kind}").read_text(encoding="utf-8") for part in ("shared", name)))
        for kind in ("css", "js")
    )
    blocks = {element_id: Markup(text) for element_id, text in blocks.items()}
    return TEMPLATES.get_template(f"{name}.html").render(css=css, js=js, blocks=blocks)


def to_json(value) -> str:
    """Compact JSON text without "<", which is written as an escape that JSON.parse reads as the same character.

    Raises ValueError for NaN and infinities, which JSON does not have: see `to_number`.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def to_number(value, floor: float = -9999.0) -> float:
    """A float with six significant digits, not below `floor`: the log-prob -inf becomes -9999."""
    return float(f"{max(float(value), floor):.6g}")
