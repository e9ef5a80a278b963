"""The page at /: assets/page.html with the helplines in it, and a policy by which only its own script and style run."""

import re
from dataclasses import dataclass
from functools import cached_property

from psysafe import helplines
from psysafe.files import ASSETS, read_text
from psysafe.web_page import policy_source


@dataclass(frozen=True)
class Page:
    """The page and its headers."""

    @cached_property
    def html(self) -> str:
        return read_text(ASSETS / "page.html").replace("<!-- helplines -->", helplines.as_html())

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
        return policy_source(text)
