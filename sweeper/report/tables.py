"""Tables and texts for people: plain, aligned, as wide as the terminal, and safe to print.

On the path of `sweeper list`, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_GAP = "  "
_ELLIPSIS = "…"


def escape(text: str) -> str:
    """`text` with everything that could steer a terminal written as a visible escape.

    C0 and C1 controls (newlines too), bidirectional overrides, line separators and lone
    surrogates; other letters stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Aligned plain text with a header line; columns of numbers lean right.

    Args:
        headers: One for each column.
        rows: Cells, escaped here.
        width: Cut the last column so that lines fit into so many characters; None cuts nothing.
    """
    columns = [[header, *(escape(row[i]) for row in rows)] for i, header in enumerate(headers)]
    if width is not None:
        others = sum(_size(column) + len(_GAP) for column in columns[:-1])
        room = max(len(headers[-1]), width - others)
        columns[-1] = [cut(cell, room) for cell in columns[-1]]
    padded = [_pad(column, right=bool(rows) and all(map(_is_number, column[1:]))) for column in columns]
    return "\n".join(_GAP.join(line).rstrip() for line in zip(*padded, strict=True))


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit())


def _size(column: Sequence[str]) -> int:
    return max(map(len_shown, column))


def _pad(column: Sequence[str], *, right: bool) -> list[str]:
    size = _size(column)
    if right:
        return [" " * (size - len_shown(cell)) + cell for cell in column]
    return [cell + " " * (size - len_shown(cell)) for cell in column]


def cut(text: str, width: int) -> str:
    """`text`, shortened to `width` characters on the screen."""
    if len_shown(text) <= width:
        return text
    text = text[: max(0, width - 1)]
    while len_shown(text) > max(0, width - 1):  # letters of two columns
        text = text[:-1]
    return text + _ELLIPSIS if width > 0 else ""


def len_shown(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None when it is none, so that nothing is cut."""
    if not sys.stdout.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


# --- cells ---------------------------------------------------------------------------------


def number(value: float | None, *, digits: int = 5) -> str:
    """A number in a few digits; `-` for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def short_params(params: Mapping[str, Any]) -> str:
    """`lr=0.001 width=64`: the last part of each key where that is unambiguous."""
    leaves = [key.rpartition(".")[2] for key in params]
    return " ".join(
        f"{leaf if leaves.count(leaf) == 1 else key}={_short(value)}"
        for (key, value), leaf in zip(params.items(), leaves, strict=True)
    )


def _short(value: Any) -> str:
    return number(value, digits=4) if isinstance(value, float) else str(value)


def steps(row: Mapping[str, Any]) -> str:
    """`120/500`, or `120` while the total is not known."""
    total = row["total_steps"]
    return f"{row['global_step']}/{total}" if total else str(row["global_step"])


_RUN_HEADERS = (
    "RUN",
    "TRIAL",
    "STATE",
    "LEASE",
    "STEP",
    "CHECKPOINT",
    "ATTEMPTS",
    "VALUE",
    "OUTCOME",
    "PARAMS",
)


def runs_table(rows: Sequence[Mapping[str, Any]], *, width: int | None = None) -> str:
    """The table of `sweeper list`; `rows` are those of `sweeper.report.rows`."""
    cells = [
        (
            str(row["run_id"]),
            number(row["trial"]),
            str(row["state"]),
            "-" if row["lease"] == "none" else str(row["lease"]),
            steps(row),
            number(row["checkpoint_step"]),
            number(row["attempts"]),
            number(row["value"]),
            row["outcome"] or "-",
            short_params(row["params"]),
        )
        for row in rows
    ]
    return table(_RUN_HEADERS, cells, width=width)
