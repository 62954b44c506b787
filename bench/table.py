"""What was measured, and how it is printed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Series:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self) -> str:
        """`median (min–max)`, or the single value."""
        if len(self.values) == 1:
            return number(self.median)
        return f"{number(self.median)} ({number(min(self.values))}–{number(max(self.values))})"


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no measurement."""

    reason: str


Cell = Series | Missing


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal in words, and the decision: (ours, floor, peers) → reached."""

    text: str
    reached: Callable[[Series, Cell, dict[str, Cell]], bool | None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    row: str
    title: str
    unit: str
    ours: Cell
    floor: Cell
    goal: Goal
    peers: dict[str, Cell] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        if isinstance(self.ours, Series) and isinstance(self.floor, Series):
            return self.ours.median / self.floor.median if self.floor.median else None
        return None

    @property
    def verdict(self) -> str:
        if not isinstance(self.ours, Series):
            return "–"
        reached = self.goal.reached(self.ours, self.floor, self.peers)
        return "–" if reached is None else ("yes" if reached else "NO")

    def to_json(self) -> dict[str, Any]:
        """Everything, every single sample included."""
        return {
            "row": self.row,
            "title": self.title,
            "unit": self.unit,
            "ours": cell_json(self.ours),
            "floor": cell_json(self.floor),
            "peers": {name: cell_json(cell) for name, cell in self.peers.items()},
            "ratio": self.ratio,
            "goal": self.goal.text,
            "ok": self.verdict,
        }


def cell_json(cell: Cell) -> dict[str, Any]:
    """A cell as JSON: its samples with their median, or the reason why there are none."""
    more = {"median": cell.median} if isinstance(cell, Series) else {}
    return {**asdict(cell), **more}


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


HEADER = ("row", "ours", "floor", "ours/floor", "goal", "ok", "peers")


def render(lines: Iterable[Line]) -> str:
    """The table as text; peers are stacked in the last column, reasons for what is missing follow."""
    reasons: list[str] = []
    rows = [HEADER, *(row for line in lines for row in _rows(line, reasons))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    text = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        text.append("  ".join([*cells, row[-1]]).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *(f"({index}) {reason}" for index, reason in enumerate(reasons, start=1))])


def _rows(line: Line, reasons: list[str]) -> list[tuple[str, ...]]:
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    title = f"{line.row:<2} {line.title} [{line.unit}]"
    ours, floor = _shown(line.ours, reasons), _shown(line.floor, reasons)
    peers = [f"{name}: {_shown(cell, reasons)}" for name, cell in line.peers.items()] or [""]
    first = (title, ours, floor, ratio, line.goal.text, line.verdict, peers[0])
    return [first, *(("",) * 6 + (peer,) for peer in peers[1:])]


def _shown(cell: Cell, reasons: list[str]) -> str:
    if isinstance(cell, Missing):
        if cell.reason not in reasons:
            reasons.append(cell.reason)
        return f"– ({reasons.index(cell.reason) + 1})"
    return cell.text() + (f" [{cell.note}]" if cell.note else "")


def at_most(factor: float) -> Callable[..., bool | None]:
    """Ours ≤ factor × floor."""

    def reached(ours: Series, floor: Cell, _: dict[str, Cell]) -> bool | None:
        return ours.median <= factor * floor.median if isinstance(floor, Series) else None

    return reached


def at_least(factor: float) -> Callable[..., bool | None]:
    """Ours ≥ factor × floor."""

    def reached(ours: Series, floor: Cell, _: dict[str, Cell]) -> bool | None:
        return ours.median >= factor * floor.median if isinstance(floor, Series) else None

    return reached


def below(limit: float) -> Callable[..., bool | None]:
    """Ours ≤ limit."""
    return lambda ours, floor, peers: ours.median <= limit


def above(limit: float) -> Callable[..., bool | None]:
    """Ours ≥ limit."""
    return lambda ours, floor, peers: ours.median >= limit
