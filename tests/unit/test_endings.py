"""What a trainer told of its end, as an outcome."""

from __future__ import annotations

from typing import Any

import pytest

from sweeper.states import Outcome
from sweeper.supervisor import _told_ending


def told(**flags: Any) -> dict[str, Any]:
    known = ("is_bad_value", "is_config", "is_oom", "is_disk_fault", "is_lost")
    return {"kind": "error", "reason": "why", "detail": "", **dict.fromkeys(known, False), **flags}


@pytest.mark.parametrize(
    ("flags", "was_oom_killed", "outcome"),
    [
        ({}, False, Outcome.CRASHED),
        ({}, True, Outcome.CRASHED),  # it raised; whom the kernel killed was somebody else
        ({"is_lost": True}, False, Outcome.LOST),
        ({"is_lost": True}, True, Outcome.OOM),  # a program, a loader or a saver was the one
        ({"is_oom": True}, False, Outcome.OOM),
        ({"is_disk_fault": True, "is_lost": True}, True, Outcome.LOST),
    ],
)
def test_who_was_killed_by_the_kernel_is_out_of_memory(
    flags: dict[str, Any], was_oom_killed: bool, outcome: Outcome
) -> None:
    assert _told_ending(told(**flags), was_oom_killed=was_oom_killed).outcome is outcome


def test_what_was_printed_stands_in_for_a_traceback() -> None:
    assert _told_ending(told(), printed="the last lines").detail == "the last lines"
    assert _told_ending(told(detail="Traceback"), printed="the last lines").detail == "Traceback"
