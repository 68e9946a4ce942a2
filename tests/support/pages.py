"""What tests of pages share: texts that try to break out, and what a browser makes of a page."""

from __future__ import annotations

from html.parser import HTMLParser

ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "p",
    "table", "tr", "th", "td", "span", "div", "figure", "figcaption", "img",
}  # fmt: skip


class Seen(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</td></tr></table><iframe src=//example.org>",
    "| a | b |\n|---|---|",
    "![x](javascript:alert(1)) <!-- `code` $x$",
    "&lt;b&gt; &#60;b&#62;",
    "\x1b[31mred\x00\u202e",
]
