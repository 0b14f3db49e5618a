"""Plots as inline SVG, drawn by the browser: colours follow its light or dark setting, and text its fonts.

A strip is one row of a plot. Its places are percent of its width, so that it fills a cell of a table, on a telephone too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from swift.evaluate.report.schema import Calibration

ROW = 18  # pixels of a strip for each of its marks
MARKS = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0", "M-4.5 -4.5h9v9h-9z", "M0 -6L6 0L0 6L-6 0z", "M0 -5.5L5.5 4.5H-5.5z")
COLOURS = 8  # classes c0 to c7 of the style sheet; models beyond have other marks


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``, with ``ticks`` and what is written at them."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Percent of the width, kept inside."""
        share = (value - self.low) / (self.high - self.low)
        return round(2 + 96 * min(1.0, max(0.0, share)), 2)


@dataclass(frozen=True)
class Mark:
    """A value with its interval, for the model of this ``number``; ``label`` is what a screen reader says."""

    number: int
    value: float
    low: float | None
    high: float | None
    label: str


def axis(values: Sequence[float | None], is_share: bool, *, is_difference: bool = False) -> Axis:
    """Round ends around ``values``: 0 to 100 % for shares, always with 0 for differences."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if is_share and not is_difference:
        return Axis(0, 1, tuple((share / 4, f"{share * 25} %") for share in range(5)))
    low, high = min(known, default=0.0), max(known, default=1.0)
    if is_difference:
        low = -max(abs(low), abs(high), 1e-9)
        high = -low
    elif low > 0:
        low = 0.0
    step = _step((high - low) / 4 or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    if last == first:
        last += 1
    scale, sign = (100, "+") if is_share else (1, "+" if is_difference else "")
    ticks = tuple((number * step, f"{number * step * scale:{sign if number else ''}.4g}") for number in range(first, last + 1))
    return Axis(first * step, last * step, ticks)


def scale(axis: Axis) -> str:
    """The axis as a strip of numbers."""
    parts = [_text(axis.place(value), label) for value, label in axis.ticks]
    return _svg("scale", 16, parts, label=None)


def bars(axis: Axis, marks: Sequence[Mark], line: float | None = None) -> str:
    """A bar from the zero of the axis with its interval, for each of ``marks``; ``line`` is drawn across (guessing)."""
    parts = _grid(axis, line)
    for row, mark in enumerate(marks):
        y = ROW * row + ROW / 2
        start, end = axis.place(max(0.0, axis.low)), axis.place(mark.value)
        left, width = min(start, end), round(abs(end - start), 2)
        parts.append(f'<rect class="bar c{mark.number % COLOURS}" x="{left}%" y="{y - 6}" width="{width}%" height="12"></rect>')
        parts += _whisker(axis, mark, y)
    return _svg("plot", ROW * len(marks), parts, label="; ".join(mark.label for mark in marks))


def dots(axis: Axis, marks: Sequence[Mark | None]) -> str:
    """A mark with its interval for each of ``marks``, one below the other; None leaves its row empty."""
    parts = _grid(axis, None)
    for row, mark in enumerate(marks):
        if mark is None:
            continue
        y = ROW * row + ROW / 2
        parts += _whisker(axis, mark, y)
        parts.append(f'<svg x="{axis.place(mark.value)}%" y="{y:g}" overflow="visible">{_shape(mark.number)}</svg>')
    return _svg("plot", ROW * len(marks), parts, label="; ".join(mark.label for mark in marks if mark))


def swatch(number: int) -> str:
    """The mark of a model, for legends."""
    return f'<svg class="swatch" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{_shape(number)}</svg>'


def reliability(found: Calibration, number: int, name: str) -> str:
    """Accuracy over confidence: on the diagonal, probabilities are what they say. The area of a dot grows with its items."""
    size, edge = 240, 34
    total = sum(item.count for item in found.bins)

    def x(value: float) -> float:
        return round(edge + value * size, 1)

    def y(value: float) -> float:
        return round(10 + (1 - value) * size, 1)

    parts = [f'<rect class="frame" x="{x(0)}" y="{y(1)}" width="{size}" height="{size}"></rect>']
    parts.append(f'<line class="zero" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"></line>')
    points = " ".join(f"{x(item.confidence)},{y(item.accuracy)}" for item in found.bins)
    parts.append(f'<polyline class="curve c{number % COLOURS}" points="{points}"></polyline>')
    for item in found.bins:
        radius = round(2 + 8 * math.sqrt(item.count / total), 1)
        told = f"{item.count} items: probability {item.confidence:.2f}, right {item.accuracy:.2f}"
        place = f'cx="{x(item.confidence)}" cy="{y(item.accuracy)}" r="{radius}"'
        parts.append(f'<circle class="dot c{number % COLOURS}" {place}><title>{told}</title></circle>')
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{x(share)}" y="{y(0) + 16}" text-anchor="middle">{share:g}</text>')
        parts.append(f'<text x="{edge - 6}" y="{y(share) + 4}" text-anchor="end">{share:g}</text>')
    label = escape(f"Calibration of {name}: error {found.error:.3f}")
    width, height = edge + size + 14, size + 36
    return (
        f'<svg class="square" role="img" aria-label="{label}" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        + "".join(parts)
        + "</svg>"
    )


def _shape(number: int) -> str:
    """Models of one colour have different shapes, and neighbours differ in both."""
    return f'<path class="dot c{number % COLOURS}" d="{MARKS[(number + number // COLOURS) % len(MARKS)]}"></path>'


def _svg(kind: str, height: float, parts: Sequence[str], label: str | None) -> str:
    told = 'aria-hidden="true"' if label is None else f'role="img" aria-label="{escape(label)}"'
    return f'<svg class="{kind}" {told} width="100%" height="{height:g}">' + "".join(parts) + "</svg>"


def _grid(axis: Axis, line: float | None) -> list[str]:
    parts = [
        f'<line class="{"zero" if value == 0 else "grid"}" x1="{axis.place(value)}%" x2="{axis.place(value)}%" y1="0" y2="100%"></line>'
        for value, _ in axis.ticks
    ]
    if line is not None:
        parts.append(f'<line class="guess" x1="{axis.place(line)}%" x2="{axis.place(line)}%" y1="0" y2="100%"></line>')
    return parts


def _whisker(axis: Axis, mark: Mark, y: float) -> list[str]:
    if mark.low is None or mark.high is None:
        return []
    low, high = axis.place(mark.low), axis.place(mark.high)
    parts = [f'<line class="whisker" x1="{low}%" x2="{high}%" y1="{y:g}" y2="{y:g}"></line>']
    ends = (f'<line class="whisker" x1="{end}%" x2="{end}%" y1="{y - 4:g}" y2="{y + 4:g}"></line>' for end in (low, high))
    return [*parts, *ends]


def _text(place: float, label: str) -> str:
    anchor = "start" if place <= 2 else "end" if place >= 98 else "middle"
    return f'<text x="{place}%" y="12" text-anchor="{anchor}">{escape(label)}</text>'


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``rough``."""
    power: float = 10 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
