"""Whom to call, for a terminal and for a page. Names and numbers come from assets/clusters.toml, their only source."""

import html
import re

from psysafe.files import clusters


def crisis_services() -> list[dict]:
    """The services for a crisis, one a country: each with name, country, phone, contact and url."""
    support = clusters()
    names = support["clusters"]["suicide and selfharm"]["resources"].values()
    return [support["resources"][name] for name in names]


def as_text() -> str:
    crisis = "; ".join(
        f"{service['country']}: {service['name']}, {service['contact']}" for service in crisis_services()
    )
    danger = ", ".join(f"{number} ({country})" for country, number in clusters()["emergency"].items())
    return f"{crisis}. In immediate danger: {danger}."


def as_html() -> str:
    items = []
    for service in crisis_services():
        name, contact, url = (html.escape(service[key]) for key in ("name", "contact", "url"))
        number = html.escape(re.sub(r"\D", "", service["phone"]))
        link = f'<a href="{url}" rel="noreferrer">{name}</a>'
        items.append(f'<li>{html.escape(service["country"])}: {link}, <a href="tel:{number}">{contact}</a></li>')
    numbers = [(html.escape(number), html.escape(country)) for country, number in clusters()["emergency"].items()]
    danger = ", ".join(f'<a href="tel:{number}">{number}</a> ({country})' for number, country in numbers)
    return f"<ul>{''.join(items)}<li>In immediate danger: {danger}</li></ul>"
