"""Facts -> one HTML file that needs nothing else.

Text of models and corpora is data: it lies in a JSON block that no text can end, the script puts it on the page as text
nodes, and a policy in the page lets no script run but ours. The trade-off: without JavaScript nothing is shown.
"""

import base64
import hashlib
import importlib.resources
from string import Template
from typing import Final

import msgspec

from distill_pipe.report.facts import Report

# `</script>` and `<!--` would end or change the block; the line separators end a line in old JavaScript.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_SCRIPTS: Final = ("pieces.js", "charts.js", "viewer.js", "page.js")


def render(report: Report) -> str:
    """The page."""
    page, style = _part("page.html"), _part("page.css")
    script = "\n".join(_part(name) for name in _SCRIPTS)
    policy = (f"default-src 'none'; base-uri 'none'; img-src data:; style-src '{_digest(style)}'; "
              f"script-src '{_digest(script)}'")
    return Template(page).substitute(policy=policy, style=style, script=script, data=embedded(report))


def embedded(report: Report) -> str:
    """The facts as JSON in which no character can end the element around it."""
    text = msgspec.json.encode(report).decode()
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _part(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
