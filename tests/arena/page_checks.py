"""What every page of the toolkit has to be."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """What is in a page: text, attributes, and whether every element is closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check_alone(text: str) -> Page:
    """A page that asks nobody for anything, runs nothing, and is well formed."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert re.match(r"#|data:image/png;base64,|\.\./dynamics/page\.html$", value or ""), value
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style and "http" not in style
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "no id twice"
    links = {value[1:] for _, name, value in page.attributes if name == "href" and value[0] == "#"}
    assert links <= set(ids)
    used = set(re.findall(r"var\((--c\w+)\)", text))
    assert all(style.count(f"{name}:") == 2 for name in used), "each colour for light and for dark"
    return page
