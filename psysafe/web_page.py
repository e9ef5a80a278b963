"""One self-contained HTML file: style, script and data stand in it, and its policy lets only these run."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence

from psysafe.files import ASSETS, read_text


def policy_source(text: str) -> str:
    """How a Content-Security-Policy names one script or style: by the hash of what stands in its element."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def build(template: str, parts: Mapping[str, str], styles: Sequence[str], scripts: Sequence[str], data: object) -> str:
    """The template with what belongs in it. template, styles, scripts: names of assets.

    parts: `<!-- NAME -->` in the template -> HTML. Data becomes the element #data. Only text that is written into the
    page by the script (textContent) may come from others.
    """
    style, script = ("".join(read_text(ASSETS / name) for name in names) for names in (styles, scripts))
    # No frame-ancestors: a <meta> cannot carry it.
    policy = (
        f"default-src 'none'; script-src '{policy_source(script)}'; style-src '{policy_source(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="content-security-policy" content="{policy}">'
    slots = {"policy": meta, "style": f"<style>{style}</style>", "script": f"<script>{script}</script>"}
    slots |= {"data": f'<script type="application/json" id="data">{json_in_html(data)}</script>', **parts}
    page = read_text(ASSETS / template)
    # Split, not replaced one after the other: what is put in may hold what looks like a slot.
    before, *rest = page.split("<!-- ")
    for piece in rest:
        name, text = piece.split(" -->", 1)
        before += slots[name] + text
    return before


def json_in_html(value: object) -> str:
    """JSON for a script element: no `<`, so no text can end the element; ASCII, so half a surrogate pair stays."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
