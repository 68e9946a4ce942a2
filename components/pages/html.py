"""Pages that show what came out of people's data: one HTML file, pictures inside it, every text escaped.

A page needs nothing else and runs nothing: no script, no link, no request. MLflow shows it as it is. The templates are
Jinja's, which escapes whatever is not markup already.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from components.contract.component import Job

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


Html = Markup
"""Markup already; any other text is escaped where it is shown."""


def shown(value: object, longest: int = 300) -> Markup:
    """A value as text: escaped, on one line, control characters replaced, cut after `longest` characters."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return Markup(f"{value:,.3f}".rstrip("0").rstrip("."))
    if isinstance(value, int):
        return Markup(f"{value:,}")
    line = " ".join(str(value)[: longest + 1].split())
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
    return escape(line[:longest] + "…" if len(line) > longest else line)


_TEMPLATES = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    loader=jinja2.DictLoader(
        {
            "page": (
                '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title | shown }}</title>'
                '<meta http-equiv="Content-Security-Policy" content="{{ policy }}"><style>{{ style }}</style></head>'
                "<body><h1>{{ title | shown }}</h1>{% for part in parts %}{{ part }}{% endfor %}</body></html>\n"
            ),
            "section": "<h2>{{ title | shown }}</h2>{% for part in parts %}{{ part }}{% endfor %}",
            "text": "<p>{{ value | shown(2000) }}</p>",
            "table": (
                "<table><tr>{% for name in columns %}<th>{{ name | shown }}</th>{% endfor %}</tr>"
                "{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell | shown }}</td>{% endfor %}</tr>{% endfor %}"
                "</table>"
            ),
            "bar": '<span class="bar" style="width:{{ width }}em"></span> {{ count | shown }}',
            "sheet": (
                '<div class="sheet">{% for picture, said in cells %}<figure>{{ picture }}'
                "<figcaption>{{ said | shown(160) }}</figcaption></figure>{% endfor %}</div>"
            ),
            "image": '<img alt="{{ alternative | shown }}" src="data:image/{{ kind }};base64,{{ inside }}">',
        }
    ),
)
_TEMPLATES.filters["shown"] = shown


def _made(template: str, **values: Any) -> Markup:
    return Markup(_TEMPLATES.get_template(template).render(values))


def page(title: str, parts: Sequence[str]) -> bytes:
    """The whole file; a part that is not markup is escaped."""
    return _made("page", title=title, parts=parts, policy=Markup(_POLICY), style=Markup(_STYLE)).encode()


def section(title: str, *parts: str) -> Markup:
    """A heading and what stands under it."""
    return _made("section", title=title, parts=parts)


def text(value: object) -> Markup:
    """A paragraph."""
    return _made("text", value=value)


def table(columns: Mapping[str, Sequence[Any]]) -> Markup:
    """Columns by their heads."""
    return _made("table", columns=list(columns), rows=zip(*columns.values(), strict=True))


def histogram(values: np.ndarray, unit: str, bins: int = 12) -> Markup:
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
    bars = [_made("bar", width=f"{24 * count / counts.max():.2f}", count=int(count)) for count in counts]
    ends = [f"{first:,.6g} to {last:,.6g}" for first, last in pairwise(edges)]
    return table({unit: ends, "how many": bars})


def sheet(pictures: Sequence[tuple[Image.Image | None, str]]) -> Markup:
    """Pictures side by side, each over its text."""
    cells = [(image(_jpeg(picture), "sample", "jpeg") if picture else "", said) for picture, said in pictures]
    return _made("sheet", cells=cells)


def image(data: bytes, alternative: str, kind: str = "png") -> Markup:
    """A picture file inside the page."""
    return _made("image", alternative=alternative, kind=kind, inside=base64.b64encode(data).decode())


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
