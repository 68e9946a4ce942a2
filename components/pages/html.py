"""Pages that show what came out of people's data: one HTML file, pictures inside it, every text escaped.

A page needs nothing else and runs nothing: no script, no link, no request. MLflow shows it as it is.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from components.contract.component import Job

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#1d2733}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #d5dbe3}
table{border-collapse:collapse}td,th{padding:.25em .8em .25em 0;text-align:left;vertical-align:top}
td{border-top:1px solid #e7ebf0;overflow-wrap:anywhere}img{max-width:100%}
.bar{background:#2b6cb0;height:.8em;display:inline-block}
.sheet{display:flex;flex-wrap:wrap;gap:.8em}.sheet figure{margin:0;width:10em}
figcaption{font-size:12px;overflow-wrap:anywhere}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Markup already; any other text is escaped where it is shown."""


def shown(value: object, longest: int = 300) -> Html:
    """A value as text: escaped, on one line, control characters replaced, cut after `longest` characters."""
    if isinstance(value, Html):
        return value
    if isinstance(value, float):
        return Html(f"{value:,.3f}".rstrip("0").rstrip("."))
    if isinstance(value, int):
        return Html(f"{value:,}")
    line = " ".join(str(value)[: longest + 1].split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return Html(html.escape(line[:longest] + "…" if len(line) > longest else line))


def page(title: str, parts: Sequence[str]) -> bytes:
    """The whole file."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{shown(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style></head>'
        f"<body><h1>{shown(title)}</h1>{''.join(parts)}</body></html>\n"
    ).encode()


def section(title: str, *parts: str) -> Html:
    """A heading and what stands under it."""
    return Html(f"<h2>{shown(title)}</h2>{''.join(parts)}")


def text(value: object) -> Html:
    """A paragraph."""
    return Html(f"<p>{shown(value, 2000)}</p>")


def table(columns: Mapping[str, Sequence[Any]]) -> Html:
    """Columns by their heads."""
    head = "".join(f"<th>{shown(name)}</th>" for name in columns)
    rows = (
        f"<tr>{''.join(f'<td>{shown(cell)}</td>' for cell in row)}</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    return Html(f"<table><tr>{head}</tr>{''.join(rows)}</table>")


def histogram(values: np.ndarray, unit: str, bins: int = 12) -> Html:
    """How often which values occur, as bars; the last one per cent at the top share one bar."""
    if not len(values):
        return text("none")
    low, high = float(values.min()), float(np.percentile(values, 99))
    least = max((high - low) / bins, 1 if np.issubdtype(values.dtype, np.integer) else 0.01)
    power = 10.0 ** np.floor(np.log10(least))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= least * 0.999)
    edges = step * np.arange(np.floor(low / step), np.floor(high / step) + 2)
    edges[-1] = max(edges[-1], float(values.max()))
    counts, _ = np.histogram(values, edges)
    bars = [
        Html(f'<span class="bar" style="width:{24 * count / counts.max():.2f}em"></span> {count:,}')
        for count in counts
    ]
    ends = [f"{first:,.6g} to {last:,.6g}" for first, last in pairwise(edges)]
    return table({unit: ends, "how many": bars})


def sheet(pictures: Sequence[tuple[Image.Image | None, str]]) -> Html:
    """Pictures side by side, each over its text."""
    cells = [
        f"<figure>{image(_jpeg(picture), 'sample', 'jpeg') if picture else ''}"
        f"<figcaption>{shown(said, 160)}</figcaption></figure>"
        for picture, said in pictures
    ]
    return Html(f'<div class="sheet">{"".join(cells)}</div>')


def image(data: bytes, alternative: str, kind: str = "png") -> Html:
    """A picture file inside the page."""
    inside = base64.b64encode(data).decode()
    return Html(f'<img alt="{shown(alternative)}" src="data:image/{kind};base64,{inside}">')


def drawn(figure: Figure, dpi: int = 80) -> bytes:
    """A Matplotlib figure as PNG, the same bytes every time."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def publish(job: Job[Any], key: str, data: bytes) -> None:
    """Make `data` a file of the artifact, and of its MLflow run under its bare name."""
    job.folder.write(key, data)
    local = job.scratch / key.rpartition("/")[2]
    local.write_bytes(data)
    job.run.artifact(local)


def _jpeg(picture: Image.Image) -> bytes:
    picture.save(buffer := io.BytesIO(), format="JPEG", quality=85)
    return buffer.getvalue()
