"""Curves as SVG text: no library, axes with units, colours left to the page's style.

A chart is drawn once for a wide and once for a narrow page, in the size it is shown in, so that its letters are never
scaled. Points are (x, y) with x in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from whimbrel.units import format_count

Point = tuple[float, float]
Bar = tuple[float, float, float, float]
"""x, y, and the ends of the interval of y."""
LEFT, RIGHT, TOP, GAP, STRIP, BOTTOM = 46, 14, 14, 30, 44, 40


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(span / most))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10, 20) if span / (unit * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(points: Sequence[Point], width: int) -> list[Point]:
    """The mean of `width` neighbours at each point (fewer at the ends): a centred running mean."""
    half = width // 2
    ys = [y for _, y in points]
    windows = (ys[max(0, i - half) : i + half + 1] for i in range(len(ys)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def window(points: Sequence[Point]) -> int:
    """How many neighbours the running mean of a curve takes."""
    return max(1, len(points) // 40)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points; the first and the last stay."""
    stride = max(1, math.ceil(len(points) / most))
    return [point for index, point in enumerate(points) if index % stride == 0 or index == len(points) - 1]


@dataclass(frozen=True)
class Frame:
    """A rectangle of the page, in pixels, and the values it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, value: float) -> float:
        """Pixels of a value on the horizontal axis."""
        return self.left + (value - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Pixels of a value on the vertical axis."""
        return self.bottom - (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (self.bottom - self.top)

    def path(self, points: Sequence[Point]) -> str:
        """The `d` of a line through points."""
        return "M" + "L".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)


def text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    """A piece of text of a style class."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line of a style class."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def training(
    width: int, train: Sequence[Point], held_out: Sequence[Point], rate: Sequence[Point], guess: float | None
) -> str:
    """Loss above, learning rate below, on one axis of tokens. `guess`: the loss of a uniform guess, drawn as a mark."""
    height = max(340, min(430, round(width * 0.52) + 110))
    end = max(x for x, _ in [*train, *held_out])
    losses = [y for _, y in [*train, *held_out]] + ([guess] if guess else [])
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low or 1)
    strip = height - BOTTOM - STRIP
    loss = Frame(LEFT, width - RIGHT, TOP + 14, strip - GAP, (0, end), (max(0.0, low - margin), high + margin))
    parts = [_grid(loss, 6 if width > 500 else 4), text(0, TOP, "loss, nats per token", "axis")]
    if guess:
        parts.append(rule(LEFT, loss.py(guess), width - RIGHT, loss.py(guess), "guess"))
        parts.append(text(width - RIGHT, loss.py(guess) - 5, f"a uniform guess: {guess:.2f}", "note", "end"))
    parts.append(f'<path class="raw" d="{loss.path(thin(train, 900))}"/>')
    parts.append(f'<path class="train" d="{loss.path(thin(smooth(train, window(train)), 400))}"/>')
    if held_out:
        parts.append(f'<path class="held" d="{loss.path(held_out)}"/>')
        parts += [f'<circle class="held" cx="{loss.px(x):.1f}" cy="{loss.py(y):.1f}" r="2.6"/>' for x, y in held_out]
    parts += _rate(Frame(LEFT, width - RIGHT, strip, strip + STRIP, (0, end), (0, max(y for _, y in rate) or 1)), rate)
    for value in ticks(0, end, 6 if width > 500 else 4):
        x = loss.px(value)
        parts.append(rule(x, strip + STRIP, x, strip + STRIP + 4, "tick"))
        parts.append(text(x, strip + STRIP + 17, format_count(value), "label", "middle"))
    parts.append(text(width - RIGHT, height - 4, "tokens read", "axis", "end"))
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{loss.top:.0f}" y2="{strip + STRIP:.0f}"/>')
    numbers = f'data-left="{LEFT}" data-right="{width - RIGHT}" data-end="{end}"'
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="Loss and learning rate over tokens" {numbers}>{"".join(parts)}</svg>'
    )


def small(width: int, train: Sequence[Point], held_out: Sequence[Point], words: str) -> str:
    """A curve by step without its learning rate: single values, their mean, held-out ones. Spikes leave the frame."""
    height, ordered = round(width * 0.56), sorted(y for _, y in [*train, *held_out])
    low, high = min(0.0, ordered[0]), ordered[int(0.985 * (len(ordered) - 1))] * 1.05
    end = max(x for x, _ in [*train, *held_out])
    frame = Frame(LEFT, width - 4, TOP + 14, height - BOTTOM + 14, (0, end), (low, high if high > low else low + 1))
    parts = [_grid(frame, 4), text(0, TOP, words, "axis")]
    inside = [(x, min(y, frame.y[1])) for x, y in train]
    parts.append(f'<path class="raw" d="{frame.path(thin(inside, 400))}"/>')
    parts.append(f'<path class="train" d="{frame.path(thin(smooth(inside, window(inside)), 200))}"/>')
    if held_out:
        seen = [(x, min(y, frame.y[1])) for x, y in held_out]
        parts.append(f'<path class="held" d="{frame.path(seen)}"/>')
        parts += [f'<circle class="held" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="2.2"/>' for x, y in seen]
    for value in ticks(0, end, 4):
        parts.append(text(frame.px(value), frame.bottom + 17, f"{value:,g}", "label", "middle"))
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(words)} by step">{"".join(parts)}</svg>'
    )


def lines(width: int, series: Mapping[str, Sequence[Bar]], x_words: str, y_words: str) -> str:
    """Curves with intervals in one frame, each of the style class `s0`, `s1`, ... in their order."""
    height = max(250, round(width * 0.34))
    points = [point for curve in series.values() for point in curve]
    low, high = min(point[2] for point in points), max(point[3] for point in points)
    margin = 0.08 * (high - low or 1)
    across = (min(point[0] for point in points), max(point[0] for point in points))
    frame = Frame(LEFT, width - RIGHT, TOP + 14, height - BOTTOM, across, (max(0.0, low - margin), high + margin))
    parts = [_grid(frame, 5), text(0, TOP, y_words, "axis")]
    for number, curve in enumerate(series.values()):
        parts.append(f'<path class="s{number}" d="{frame.path([(x, y) for x, y, _, _ in curve])}"/>')
        for x, y, least, most in curve:
            at = frame.px(x)
            parts.append(rule(at, frame.py(least), at, frame.py(most), f"s{number}"))
            parts.append(f'<circle class="s{number}" cx="{at:.1f}" cy="{frame.py(y):.1f}" r="2.6"/>')
    for value in ticks(*across, 6 if width > 500 else 4):
        parts.append(rule(frame.px(value), frame.bottom, frame.px(value), frame.bottom + 4, "tick"))
        parts.append(text(frame.px(value), frame.bottom + 17, f"{value:,g}", "label", "middle"))
    parts.append(text(width - RIGHT, height - 4, x_words, "axis", "end"))
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(y_words)} over {escape(x_words)}">{"".join(parts)}</svg>'
    )


def _grid(frame: Frame, most: int) -> str:
    """Horizontal lines with their values."""
    marks = ticks(*frame.y, most)
    lines = (rule(frame.left, frame.py(value), frame.right, frame.py(value), "grid") for value in marks)
    labels = (text(frame.left - 8, frame.py(value) + 4, f"{value:g}", "label", "end") for value in marks)
    return "".join([*lines, *labels])


def _rate(frame: Frame, rate: Sequence[Point]) -> list[str]:
    """The learning rate as a filled strip, with its peak written at the axis."""
    points = thin(rate, 300)
    ends = [(points[-1][0], 0.0), (points[0][0], 0.0)]
    return [
        rule(frame.left, frame.bottom, frame.right, frame.bottom, "base"),
        f'<path class="rate" d="{frame.path([*points, *ends])}Z"/>',
        text(0, frame.top - 6, "learning rate", "axis"),
        text(frame.left - 8, frame.top + 8, _short(frame.y[1]), "label", "end"),
        text(frame.left - 8, frame.bottom + 4, "0", "label", "end"),
    ]


def _short(value: float) -> str:
    """`0.004` or `4e-5`: whichever is shorter."""
    plain, power = f"{value:.6f}".rstrip("0"), f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return plain if len(plain) <= len(power) + 1 else power
