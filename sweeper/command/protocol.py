"""What a program says on its stdout: lines that begin with `SWEEPER ` and hold one JSON object.

{"step": 12, "loss": 0.3}   a row of the metrics log
{"checkpoint": 12}          the files of step 12 are complete, and at rest until we answer
{"value": 0.25}             the trial's value, in place of the last reported metric
{}                          a sign of life

Everything else it prints is output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sweeper.tracking.metrics import encode_row

PREFIX = b"SWEEPER "
MAX_LINE_BYTES = 1 << 20
MAX_STEP = 10**12 - 1  # twelve digits: the name of a checkpoint's directory

OK = "ok"
REFUSED = "no"
"""Our answers to {"checkpoint": STEP}, one line on the program's stdin; a reason follows the second."""


@dataclass(frozen=True, slots=True)
class Row:
    """Numbers and texts of one step."""

    step: int
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ready:
    """The files of a checkpoint of this step can be copied."""

    step: int


@dataclass(frozen=True, slots=True)
class Result:
    """The trial's value."""

    value: float


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """It is still at work."""


Said = Row | Ready | Result | SignOfLife


class BadLine(ValueError):
    """A line that begins with `SWEEPER ` and means nothing."""


def parse(line: bytes, *, metric: str) -> Said:
    """What a line says; it begins with PREFIX.

    Args:
        line: With or without its end.
        metric: The sweep's metric, which must be a number where it is reported.

    Raises:
        BadLine: With the reason.
    """
    try:
        said = json.loads(line.removeprefix(PREFIX))
    except (ValueError, RecursionError) as error:
        raise BadLine(f"no JSON: {error}") from error
    if not isinstance(said, dict):
        raise BadLine("no JSON object")
    if "step" in said:
        return _row(said, metric)
    if set(said) == {"checkpoint"}:
        return Ready(_step("checkpoint", said["checkpoint"], least=1))
    if set(said) == {"value"}:
        return Result(_number("value", said["value"]))
    if not said:
        return SignOfLife()
    raise BadLine(f'neither "step", "checkpoint" nor "value": {", ".join(sorted(said))}')


def _row(said: dict[str, Any], metric: str) -> Row:
    step = _step("step", said.pop("step"), least=0)
    if metric in said:
        said[metric] = _number(metric, said[metric])
    try:
        encode_row(step, said)
    except (TypeError, ValueError) as error:
        raise BadLine(str(error)) from error
    return Row(step, said)


def _step(key: str, value: Any, *, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_STEP:
        raise BadLine(f'"{key}" must be a whole number from {least}')
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLine(f'"{key}" must be a number')
    try:
        return float(value)
    except OverflowError as error:
        raise BadLine(f'"{key}" is too large') from error


class Splitter:
    """Parts a stream of bytes into protocol lines and output, which is passed on as it comes."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_inside = False  # of a line whose beginning was passed on

    def feed(self, data: bytes) -> Iterator[tuple[bool, bytes]]:
        """Yield (is protocol, bytes) for what can be told by now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield self._is_said(line), line + b"\n"
            self._is_inside = False
        if self._rest and (len(self._rest) > MAX_LINE_BYTES or not _may_be_said(self._rest)):
            yield from self.end()
            self._is_inside = True

    def end(self) -> Iterator[tuple[bool, bytes]]:
        """Yield what is left of a line without an end."""
        rest, self._rest = self._rest, b""
        if rest:
            yield self._is_said(rest), rest

    def _is_said(self, line: bytes) -> bool:
        return not self._is_inside and line.startswith(PREFIX)


def _may_be_said(beginning: bytes) -> bool:
    return beginning.startswith(PREFIX) or PREFIX.startswith(beginning)
