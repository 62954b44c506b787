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

    def text(self) -> str:
        return f"– {self.reason}"


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
    """The table as text; peers are stacked in the last column, notes follow."""
    rows = [HEADER, *(row for line in lines for row in _rows(line))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    text = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        text.append("  ".join([*cells, row[-1]]).rstrip())
    text.insert(1, "-" * min(150, max(map(len, text))))
    return "\n".join(text)


def _rows(line: Line) -> list[tuple[str, ...]]:
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    peers = [f"{name}: {_noted(cell)}" for name, cell in line.peers.items()] or [""]
    title = [f"{line.row}  {line.title} [{line.unit}]"]
    first = (title[0], _noted(line.ours), _noted(line.floor), ratio, line.goal.text, line.verdict, peers[0])
    rest = [("",) * 6 + (peer,) for peer in peers[1:]]
    return [first, *rest]


def _noted(cell: Cell) -> str:
    note = f" [{cell.note}]" if isinstance(cell, Series) and cell.note else ""
    return cell.text() + note


def at_most(
    factor: float, *, plus: Callable[[dict[str, Cell]], float] | None = None
) -> Callable[..., bool | None]:
    """Ours ≤ factor × floor."""

    def reached(ours: Series, floor: Cell, _: dict[str, Cell]) -> bool | None:
        return ours.median <= factor * floor.median if isinstance(floor, Series) else None

    return reached


def below(limit: float) -> Callable[..., bool | None]:
    """Ours ≤ limit."""
    return lambda ours, floor, peers: ours.median <= limit


def above(limit: float) -> Callable[..., bool | None]:
    """Ours ≥ limit."""
    return lambda ours, floor, peers: ours.median >= limit
