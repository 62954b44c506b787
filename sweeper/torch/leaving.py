"""How a loop was left: by `break`, which ends a training, or by an exception, which does not."""

from __future__ import annotations

import dis
import inspect
from types import FrameType

_LEAVES = frozenset({"POP_TOP", "POP_ITER", "FOR_ITER", "END_FOR"})
_SUSPENDED = frozenset({"YIELD_VALUE", "RESUME"})


def consumers(frame: FrameType | None) -> list[int]:
    """Who iterates over a generator: the frame that has resumed it, and those around it (tqdm, …).

    Args:
        frame: The one behind the generator's own.
    """
    found = []
    while frame is not None:
        found.append(id(frame))
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            break
        frame = frame.f_back
    return found


def is_unwound(closer: FrameType | None, by: list[int]) -> bool:
    """Whether a generator is being closed because an exception ends the loop over it.

    It gets the same GeneratorExit as by a `break`, and Python does not say which. But the loop stands
    at the instruction that has raised, and not at the one that drops an iterator. A generator that is
    closed by somebody else was held in a variable until the training returned.

    Args:
        closer: The frame that runs while the generator is closed.
        by: Its consumers, when they were given what they work on.
    """
    while closer is not None and _instruction(closer) in _SUSPENDED:
        closer = closer.f_back  # a generator around it that is being closed itself
    return closer is not None and id(closer) in by and _instruction(closer) not in _LEAVES


def _instruction(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] if frame.f_lasti >= 0 else ""
