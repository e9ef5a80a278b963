"""Whom to call, for a terminal and for a page. Names and numbers come from assets/services/, their only source."""

import html
import re

from psysafe.services import Services, bundled


def as_text(services: Services | None = None) -> str:
    """services: instead of the bundled ones."""
    services = services or bundled()
    crisis = "; ".join(f"{s.country}: {s.name}, {s.contact or s.host}" for s in services.crisis())
    danger = f"In immediate danger: {services.emergency_text()}."
    return f"{crisis}. {danger}" if crisis else danger


def as_html(services: Services | None = None) -> str:
    services = services or bundled()
    items = []
    for service in services.crisis():
        name, contact, url = map(html.escape, (service.name, service.contact, service.url))
        number = html.escape(re.sub(r"[^\d+]", "", service.phone))
        reach = f', <a href="tel:{number}">{contact}</a>' if number else ""
        items.append(f'<li>{service.country}: <a href="{url}" rel="noreferrer">{name}</a>{reach}</li>')
    numbers = services.emergency.items()
    danger = ", ".join(f'<a href="tel:{number}">{number}</a> ({country})' for country, number in numbers)
    return f"<ul>{''.join(items)}<li>In immediate danger: {danger}</li></ul>"
