"""Parts of an HTML page that needs no other file: tables, bars, line charts, matrices, pictures.

All texts are plain; they are escaped here. `page.html` holds the frame and the style of these parts; colours are its
classes s0 to s3, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np

COLOURS = 4
LEFT, RIGHT, TOP, BOTTOM = 40, 388, 10, 215  # of the axes, in a chart of 400 x 255


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    frame = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(frame).substitute(
        title=escape(title), lead=escape(lead), sections="\n".join(filter(None, sections))
    )


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a paragraph and parts; nothing where all parts are empty."""
    if not any(parts):
        return ""
    words = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{words}" + "\n".join(filter(None, parts)) + "\n</section>"


def side_by_side(*parts: str) -> str:
    """Parts beside each other where the screen is wide enough."""
    return '<div class="pair">\n' + "\n".join(parts) + "\n</div>" if any(parts) else ""


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls inside its container; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(_row(name, (f"<td>{escape(cell)}</td>" for cell in cells)) for name, *cells in rows)
    return _scroll(caption, "<table>", top, body)


def matrix(caption: str, names: Sequence[str], counts: np.ndarray) -> str:
    """A square matrix as a heat map in per cent of its rows, names on both axes; zeros are left empty."""
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    top = "<td></td>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "\n".join(
        _row(name, (f'<td style="--p:{v:.3f}">{100 * v:.0f}</td>' if v else "<td></td>" for v in row))
        for name, row in zip(names, shares, strict=True)
    )
    return _scroll(caption, '<table class="matrix">', top, body)


def _row(name: str, cells: Iterable[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _scroll(caption: str, start: str, top: str, body: str) -> str:
    """A table in a container that scrolls, below a caption that does not."""
    inner = f"{start}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{inner}</div>'
    return f"<figure><figcaption>{escape(caption)}</figcaption>{box}</figure>"


def code(lines: Iterable[str]) -> str:
    """Commands, one a line; long ones wrap."""
    return '<div class="code">' + "\n".join(f"<code>{escape(line)}</code>" for line in lines) + "</div>"


def facts(pairs: dict[str, object]) -> str:
    """Names with their values."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in pairs.items()) + "</dl>"


def folded(title: str, part: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{part}</details>"


def bars(rows: Iterable[tuple[str, int, float, float]]) -> str:
    """Horizontal bars: name, colour, a share in 0..1, and its standard error, 0 for none."""
    parts = []
    for name, colour, share, error in rows:
        whisker = f'<i class="error" style="left:{100 * (share - error):.2f}%;width:{200 * error:.2f}%"></i>'
        parts.append(
            f'<div class="bar s{colour % COLOURS}"><span class="name">{escape(name)}</span><span class="track">'
            f'<i class="fill" style="width:{100 * share:.2f}%"></i>{whisker if error else ""}</span>'
            f'<span class="value">{100 * share:.1f} %</span></div>'
        )
    return '<div class="bars">\n' + "\n".join(parts) + "\n</div>" if parts else ""


def chart(title: str, unit: str, curves: Sequence[tuple[str, int, list[tuple[float, float]]]], top: float) -> str:
    """A line chart with a dashed line at 1 and a legend with the last values.

    Args:
        unit: of x.
        curves: name, colour and points (x, y) of each; those without points are left out.
        top: larger values lie on the upper edge.
    """
    from matplotlib.ticker import MaxNLocator

    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return ""
    values = [min(y, top) for _, _, points in curves for _, y in points]
    ys = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(*values, 1.0), max(*values, 1.0))
    xs = MaxNLocator(5, integer=True).tick_values(0, max(points[-1][0] for _, _, points in curves))

    def place(x: float, y: float) -> tuple[float, float]:
        down = BOTTOM - (BOTTOM - TOP) * (min(y, ys[-1]) - ys[0]) / (ys[-1] - ys[0])
        return round(LEFT + (RIGHT - LEFT) * x / xs[-1], 1), round(down, 1)

    parts, legend = [], []
    for y in ys:
        parts.append(f'<path class="grid" d="M{LEFT} {place(0, y)[1]}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place(0, y)[1] + 4}" text-anchor="end">{y:.6g}</text>')
    parts.append(f'<path class="base" d="M{LEFT} {place(0, 1)[1]}H{RIGHT}"/>')
    for x in xs:
        parts.append(f'<text x="{place(x, 1)[0]}" y="{BOTTOM + 17}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{escape(unit)}</text>')
    for name, colour, points in curves:
        kind, places = f"s{colour % COLOURS}", [place(*point) for point in points]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        parts.append(f'<circle class="{kind}" cx="{places[-1][0]}" cy="{places[-1][1]}" r="3.5"/>')
        legend.append(f'<li class="{kind}">{escape(name)}: {points[-1][1]:.3f} at the end</li>')
    drawn = f'<svg viewBox="0 0 400 255" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure><h3>{escape(title)}</h3>{drawn}<ul class="legend">{"".join(legend)}</ul></figure>'


def picture(title: str, path: Path, caption: str) -> str:
    """A picture inside the page, as a PNG of few colours."""
    from PIL import Image

    packed = io.BytesIO()
    with Image.open(path) as image:
        width, height = image.size
        image.convert("RGB").quantize(96).save(packed, "PNG", optimize=True)
    data = base64.b64encode(packed.getvalue()).decode()
    shown = f'<img width="{width}" height="{height}" alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f'<figure class="picture"><h3>{escape(title)}</h3>{shown}<figcaption>{escape(caption)}</figcaption></figure>'
