"""The page at /: assets/page.html with the helplines in it, and a policy by which only its own script and style run."""

import base64
import hashlib
import html
import re
from dataclasses import dataclass
from functools import cached_property

from psysafe.files import ASSETS, clusters, read_text


def helplines() -> str:
    """Whom to call, as HTML. Names and numbers come from clusters.toml, their only source."""
    support = clusters()
    names = support["clusters"]["suicide and selfharm"]["resources"].values()
    items = []
    for service in (support["resources"][name] for name in names):
        name, contact, url = (html.escape(service[key]) for key in ("name", "contact", "url"))
        number = html.escape(re.sub(r"\D", "", service["phone"]))
        link = f'<a href="{url}" rel="noreferrer">{name}</a>'
        items.append(f'<li>{html.escape(service["country"])}: {link}, <a href="tel:{number}">{contact}</a></li>')
    numbers = [(html.escape(number), html.escape(country)) for country, number in support["emergency"].items()]
    danger = ", ".join(f'<a href="tel:{number}">{number}</a> ({country})' for number, country in numbers)
    return f"<ul>{''.join(items)}<li>In immediate danger: {danger}</li></ul>"


@dataclass(frozen=True)
class Page:
    """The page and its headers."""

    @cached_property
    def html(self) -> str:
        return read_text(ASSETS / "page.html").replace("<!-- helplines -->", helplines())

    @cached_property
    def headers(self) -> dict[str, str]:
        script, style = (self._hash(tag) for tag in ("script", "style"))
        policy = (
            f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return {"content-security-policy": policy, "referrer-policy": "no-referrer"}

    def _hash(self, tag: str) -> str:
        """The hash of the page's one element of this name, as the policy names it."""
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", self.html, re.DOTALL)
        return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
