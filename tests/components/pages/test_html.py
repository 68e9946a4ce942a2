"""Pages: whatever the data says stays text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.pages import html
from tests.support.pages import ALLOWED, HOSTILE, Seen


def everything(text: str) -> str:
    """A page that shows `text` in every place that a page has for text."""
    picture = Image.new("RGB", (4, 4))
    parts = [
        html.section(text, html.text(text), html.table({text: [text]})),
        html.sheet([(picture, text), (None, text)]),
        html.image(b"", text),
        html.histogram(np.arange(5), text),
    ]
    return html.page(text, parts).decode()


HARMLESS = Seen(everything("QQQ"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_never_markup(text: str) -> None:
    seen = Seen(everything(text))
    assert [tag for tag, _ in seen.elements] == [tag for tag, _ in HARMLESS.elements]
    assert {tag for tag, _ in seen.elements} <= ALLOWED
    names = {name for _, attributes in seen.elements for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "alt", "src", "class", "style"}
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    assert seen.text.count(printable) == HARMLESS.text.count("QQQ") == 9


@given(st.text(max_size=400))
def test_any_text_leaves_the_elements_of_a_page_as_they_are(text: str) -> None:
    assert [tag for tag, _ in Seen(everything(text)).elements] == [tag for tag, _ in HARMLESS.elements]


def test_pages_load_nothing_from_anywhere() -> None:
    for tag, attributes in HARMLESS.elements:
        assert tag != "link"
        assert (attributes.get("src") or "data:").startswith("data:")


@pytest.mark.parametrize(
    "values",
    [
        np.array([40] * 7),
        np.array([40.37, 50.0, 60.2]),
        np.arange(1000),
        np.array([3, 4, 5, 5, 1_000_000]),
        np.zeros(3),
        np.random.default_rng(0).lognormal(3, 1, 500),
    ],
)
def test_the_bars_of_a_histogram_hold_every_value(values: np.ndarray) -> None:
    counts = [
        int(found.replace(",", "")) for found in re.findall(r"</span> ([\d,]+)", html.histogram(values, "px"))
    ]
    assert sum(counts) == len(values)
    assert len(counts) <= 14


def test_long_texts_are_cut() -> None:
    assert len(html.shown("x" * 10_000)) == 301
