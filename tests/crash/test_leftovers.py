"""A takeover ends what is left of the attempt before, and nothing of anybody else's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from crash.mini import KillAt, Place, finish, was_killed


def sleeper(tag: str) -> subprocess.Popen[bytes]:
    """A program that an attempt has started, and that left its session."""
    return subprocess.Popen(
        ["sleep", "600"], env={**os.environ, "SWEEPER_ATTEMPT": tag}, start_new_session=True
    )


def test_a_sweep_of_the_same_name_elsewhere_is_left_alone(fresh: Place, where: Path) -> None:
    place = fresh.copy(where)
    assert was_killed(finish(place, probe=KillAt(100)))
    ours = sleeper(f"{place.run_dir()}:1")
    theirs = [sleeper(f"{tag}:1") for tag in (f"/elsewhere/{place.run_dir().name}", place.run_dir().name)]
    try:
        assert finish(place) == 0, place.printed()
        assert ours.wait(10) < 0
        assert [process.poll() for process in theirs] == [None, None]
        assert f"ended what was left of it ({ours.pid})" in place.printed()
    finally:
        for process in (ours, *theirs):
            process.kill()
            process.wait()
