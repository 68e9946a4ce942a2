"""The page of an evaluation."""

from __future__ import annotations

import io
import re

from PIL import Image

from components.evaluate import report
from components.evaluate.answering import RIGHT
from components.evaluate.report import Sample
from components.pages.markdown import escape
from tests.support.evaluated import answered


def test_the_report_survives_any_text_and_shows_it_as_text() -> None:
    odd = "a $x_{1 | b\nc \x00 日本 \\frac <image> <script>alert(1)</script> [x](javascript:y) https://z.w **b** `c`"
    heldout = [answered("$k_{", index % 2 == 0, odd) for index in range(18)]
    samples = [
        Sample("$k_{", odd, odd, {RIGHT: (odd, index % 2 == 0)}, ("vqa", index)) for index in range(30)
    ]
    picked = report.pick(samples)
    assert len(picked) == 20
    image = Image.new("RGB", (30, 20), "teal")
    for figure in (report.samples_figure(picked, [image] * 19 + [None]), report.bar_chart(heldout)):
        file = io.BytesIO()
        figure.savefig(file, dpi=20)
        assert file.getvalue().startswith(b"\x89PNG")
    lines = report.page({"model": "m"}, {}, heldout, [], picked).splitlines()
    assert sum(line.count(" | ") for line in lines if "frac" in line) == 20 * 3
    text = "\n".join(line for line in lines if "frac" in line)
    # Every character that could begin markup stands behind a backslash.
    assert not re.search(r"[<>`*\[\]$_]|://", re.sub(r"\\.", "", text))
    assert escape("a | b") == "a \\| b"
