"""Figures as PNG and as SVG, and SVG inside a page: the same drawing on light and on dark ground."""

from __future__ import annotations

import base64
import math
import re
import textwrap
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from arena.report.palette import COLOURS

LARGEST = 1_500_000
"""Bytes of an SVG that a page still takes in; beyond it, the PNG is smaller."""

_COLOUR = re.compile(r"(?<=[:\s\"])#[0-9a-f]{6}\b")
_METADATA: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG to ``path``, and beside it as SVG with transparent ground and text as text."""
    figure.savefig(path)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "arena"}):
        figure.savefig(path.with_suffix(".svg"), transparent=True, metadata=_METADATA)


def plain(text: str, width: int | None = None) -> str:
    """Text for a figure in which a dollar is a dollar, not a formula; in lines of ``width`` letters."""
    if width is not None:
        text = textwrap.fill(text, width)
    return text.replace("$", r"\$")


def inline(path: Path, alt: str) -> Markup:
    """A figure as HTML: its SVG, which follows the colours of the page, or, where there is none or a large
    one, its PNG.

    Args:
        path: of the PNG; the SVG stands beside it.
        alt: what it shows, for those who do not see it.
    """
    drawn = path.with_suffix(".svg")
    if not drawn.exists() or drawn.stat().st_size > LARGEST:
        image = base64.b64encode(path.read_bytes()).decode("ascii")
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(image), alt)
    text = drawn.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = re.search(r'viewBox="0 0 ([\d.]+) ', text)
    points = float(width[1]) if width else 600.0
    name = re.sub(r"\W", "-", f"{path.parent.name}-{path.stem}")
    # Text is escaped, so that what stands between < and > is a tag, and no label is altered.
    text = re.sub(r"<[^>]*>", lambda tag: _tag(tag[0], name), text)
    head = Markup('<svg role="img" aria-label="{}" style="--natural: {:.0f}px"').format(alt, points * 4 / 3)
    return Markup(head + Markup(text.removeprefix("<svg")))


def _tag(tag: str, name: str) -> str:
    """A tag as HTML has it: no name spaces, ids apart from other figures', colours as variables."""
    if tag.startswith("<svg"):
        tag = re.sub(r'\s(xmlns(:\w+)?|width|height|version)="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=").replace(' id="', f' id="{name}-')
    tag = tag.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return _COLOUR.sub(lambda found: f"var(--c{found[0][1:]})", tag)


def colour_rules(text: str) -> tuple[str, str]:
    """Declarations, for a light and for a dark page, of the colours that the figures in ``text`` use."""
    names = sorted(set(re.findall(r"var\(--c([0-9a-f]{6})\)", text)))
    light = " ".join(f"--c{name}: #{name};" for name in names)
    dark = " ".join(f"--c{name}: {dark_twin('#' + name)};" for name in names)
    return light, dark


def dark_twin(colour: str) -> str:
    """The colour that takes a colour's place on dark ground: the same hue, lightness turned round (OKLab).

    White becomes the ground and black the ink, so contrasts within a heat map stay; an architecture's colour
    is lifted, that its lines can be seen.
    """
    lightness, a, b = _oklab(colour)
    turned = 0.94 - 0.44 * lightness if colour in COLOURS else 0.93 - 0.725 * lightness**1.6
    for shrink in (0.9**step for step in range(60)):  # towards grey until the screen has it
        found = _linear(turned, a * shrink, b * shrink)
        if all(-1e-3 <= part <= 1.001 for part in found):
            break
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, part)))):02x}" for part in found)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted(_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = _parts(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _parts(colour: str) -> list[float]:
    """Linear red, green and blue."""
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def _gamma(part: float) -> float:
    return 12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055


# The matrices of OKLab: Ottosson 2020, "A perceptual color space for image processing".
def _oklab(colour: str) -> tuple[float, float, float]:
    red, green, blue = _parts(colour)
    l = math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    m = math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    s = math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )


def _linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
