"""checkpoint.interval=auto from the database to the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from crash import mini
from crash.mini import Final, Place, Trace, checkpoints, final, forked

from sweeper.torch import cadence


def with_auto(place: Place, *, first_s: float) -> Callable[[], int]:
    """A worker whose training saves first after so many seconds, and then as Young and Daly say."""

    def run() -> int:
        cadence.FIRST_AUTO_S = first_s
        real = cadence.young_daly

        def noted(cost_s: float, mtbf_s: float) -> float:
            print("AUTO", cost_s, mtbf_s, real(cost_s, mtbf_s), flush=True)
            return real(cost_s, mtbf_s)

        cadence.young_daly = noted
        return mini.work(place)()

    return run


@pytest.fixture
def place(fast_dir: Path, where: Path) -> Place:
    checkpoint = {"interval": "auto", "every_n_steps": None, "every_s": 0.0, "keep_last": 9}
    return mini.new_place(where, checkpoint=checkpoint)


def test_auto_saves_once_and_then_waits(place: Place, undisturbed: tuple[Trace, Final]) -> None:
    """An hour between failures and saves of some milliseconds: some seconds until the next one."""
    assert forked(with_auto(place, first_s=0.0), log=place.log) == 0, place.printed()
    assert [step for step, _ in checkpoints.steps_on_disk(place.root())] == [6, 1]
    lines = [line.split()[1:] for line in place.printed().splitlines() if line.startswith("AUTO")]
    cost_s, mtbf_s, interval_s = map(float, lines[0])
    assert 0 < cost_s < 1
    assert 3600 <= mtbf_s < 3700
    assert 0.5 < interval_s < 100
    assert undisturbed[1].differs(final(place)) is None


def test_auto_looks_at_the_failures_of_the_sweep(place: Place) -> None:
    """One was seen beside the one that is assumed: half of the time."""
    assert forked(with_auto(place, first_s=1e9), log=place.log) == 0, place.printed()
    assert [step for step, _ in checkpoints.steps_on_disk(place.root())] == [6]
    with sqlite3.connect(place.data_dir / "sweeper.db") as connection:
        connection.execute("UPDATE sweeper_attempt SET outcome='lost'")
    connection.close()
    store = mini.Store(place.url)
    sweep = store.sweep(mini.SWEEP)
    assert 1800 <= store.mean_time_between_failures_s(sweep.sweep_id) < 1900
    store.close()
