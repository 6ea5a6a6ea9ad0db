"""A document as one HTML page: styles and figures inside, nothing fetched from anywhere, no script."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from arena.report.document import Document, Section
from arena.report.svg import colour_rules, inline

SHOWN_LINES = 8
"""Sentences of a section that are seen at once; the rest unfolds."""
SHOWN_ROWS = 200
"""Rows of a table that are in the page; the file that its caption names has all."""
_LONG_CELL = 48  # letters beyond which a cell is broken into lines


def to_html(document: Document) -> str:
    """A document as one HTML file. All text of the document is escaped; figures are drawn in."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["loud"] = _is_loud
    figures = [
        [inline(path, section.heading or path.stem) for path in section.figures]
        for section in document.sections
    ]
    light, dark = colour_rules("".join(text for drawn in figures for text in drawn))
    style = Markup(_STYLE.replace("/*light*/", light).replace("/*dark*/", dark))
    anchors = _anchors(document.sections)
    return environment.from_string(_TEMPLATE).render(
        document=document,
        sections=list(zip(document.sections, anchors, figures, strict=True)),
        style=style,
        shown_lines=SHOWN_LINES,
        shown_rows=SHOWN_ROWS,
        long=_LONG_CELL,
    )


def write_html(document: Document, path: Path) -> None:
    """Write :func:`to_html`'s page."""
    path.write_text(to_html(document), encoding="utf-8")


def _is_loud(note: str) -> bool:
    """Whether a note begins with a word in capitals, such as INCOMPLETE."""
    return re.match(r"[A-Z]{4,}\b", note) is not None


def _anchors(sections: list[Section]) -> list[str]:
    """An id for each section, none twice."""
    found: list[str] = []
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "-", section.heading.lower()).strip("-") or "section"
        number = 1
        while (anchor := name if number == 1 else f"{name}-{number}") in found:
            number += 1
        found.append(anchor)
    return found


_STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5d5d5d; --ground: #ffffff; --card: #f6f5f1;
  --line: #dcdad2; --mark: #08306b; --warn: #9a3412; /*light*/ }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e8e6e1; --soft: #a9a69e; --ground: #16181b; --card: #1f2226;
    --line: #363a40; --mark: #9ecae1; --warn: #fdba74; /*dark*/ }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
nav { font-size: .88rem; line-height: 1.9; }
nav a { margin-right: .9rem; }
a { color: var(--mark); text-decoration: none; }
a:hover { text-decoration: underline; }
ul { padding-left: 1.1rem; margin: .5rem 0; }
li { margin: .25rem 0; }
.claim { font-size: 1.05rem; }
.notes { color: var(--soft); }
.notes .loud { color: var(--warn); font-weight: 600; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; min-width: 100%;
  overflow-wrap: normal; }
th, td { padding: .35rem .65rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
td.long { white-space: normal; text-align: left; min-width: 14rem; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--ground);
  border-right: 1px solid var(--line); max-width: 16rem; white-space: normal;
  overflow-wrap: break-word; min-width: 7rem; }
thead th { border-bottom: 1px solid var(--line); font-weight: 600; color: var(--soft);
  vertical-align: bottom; }
table.text th, table.text td { text-align: left; white-space: normal; }
table.text td:first-child { min-width: 6rem; }
tbody tr:nth-child(even) td { background: var(--card); }
figure { margin: .8rem 0; overflow-x: auto; }
figure svg, figure img { display: block; max-width: 100%; height: auto; }
figure svg { width: var(--natural); }
figure svg text { fill: var(--ink); font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif !important; }
figure img { background: #fff; border-radius: 6px; padding: .4rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
  overflow-x: auto; font-size: .82rem; line-height: 1.45; overflow-wrap: normal; }
.caption { color: var(--soft); font-size: .88rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--mark); }
@media screen and (max-width: 44rem) {
  body { font-size: 15px; }
  h1 { font-size: 1.35rem; }
  figure svg, figure img { max-width: none; width: max(100%, min(var(--natural, 44rem), 52rem)); }
  th:first-child, td:first-child { max-width: 10rem; }
  table.text td.long { min-width: 9rem; }
}
@page { margin: 14mm; }
@media print {
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3, summary { break-after: avoid; }
  figure, tr, li, .wide { break-inside: avoid; }
  thead { display: table-header-group; }
  figure { overflow: visible; }
  figure svg, figure img { max-width: 100%; max-height: 225mm; }
  .wide { overflow: visible; border: 0; }
  table { font-size: 7pt; min-width: 0; width: 100%; }
  th, td, td.long { padding: 2pt 3pt; white-space: normal; min-width: 0 !important; overflow-wrap: anywhere; }
  th:first-child, td:first-child { position: static; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; height: auto; }
}
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ document.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ document.title }}</h1>
{% if document.claim %}
<p class="claim">{{ document.claim }}</p>
{% endif %}
<ul class="notes">
{% for note in document.notes %}
<li{% if note is loud %} class="loud"{% endif %}>{{ note }}</li>
{% endfor %}
</ul>
<nav>
{% for section, anchor, drawn in sections if section.heading and not section.part %}
<a href="#{{ anchor }}">{{ section.heading }}</a>
{% endfor %}
</nav>
{% for section, anchor, drawn in sections %}
<section id="{{ anchor }}">
{% set level = "h3" if section.part else "h2" %}
{% if section.heading %}
<{{ level }}>{{ section.heading }}</{{ level }}>
{% endif %}
{% for figure in drawn %}
<figure tabindex="0">{{ figure }}</figure>
{% endfor %}
{% if section.rows %}
<div class="wide" tabindex="0"><table{% if section.text %} class="text"{% endif %}>
<thead><tr>
{% for column in section.columns %}
<th scope="col">{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in section.rows[:shown_rows] %}
<tr>
{%- for cell in row %}
<td{% if not loop.first and cell | length > long %} class="long"{% endif %}>{{ cell }}</td>
{%- endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% if section.rows | length > shown_rows %}
<p class="caption">Left out of this page: {{ section.rows | length - shown_rows }} more rows.</p>
{% endif %}
{% endif %}
{% if section.commands %}
<pre>{{ section.commands | join("\n") }}</pre>
{% endif %}
{% if section.caption and (drawn or section.rows or section.commands) %}
<p class="caption">{{ section.caption }}</p>
{% endif %}
{% set shown = section.lines[:shown_lines] %}
{% set more = section.lines[shown_lines:] %}
{% if shown %}
<ul>
{% for line in shown %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% if more %}
<details><summary>{{ more | length }} more</summary>
<ul>
{% for line in more %}
<li>{{ line }}</li>
{% endfor %}
</ul>
</details>
{% endif %}
{% if section.caption and not (drawn or section.rows or section.commands) %}
<p class="caption">{{ section.caption }}</p>
{% endif %}
{% if section.link %}
<p><a href="{{ section.link[1] }}">{{ section.link[0] }}</a></p>
{% endif %}
{% if section.listing %}
<details><summary>{{ section.listing[0] }}</summary>
<pre>{{ section.listing[1] }}</pre>
</details>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
