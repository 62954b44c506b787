"""Ours: claim + release of interrupted runs on PostgreSQL, by many workers at once; a claim made twice is an error.

Usage: ours_claims.py DIRECTORY WORKERS CLAIMS LIMIT_S
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.crowd import Act, answer, crowd
from bench.scripts.ours_asks import client as drawing
from bench.scripts.ours_asks import prepare
from sweeper import processes
from sweeper.embedded import Server
from sweeper.records import Ending
from sweeper.states import Outcome
from sweeper.store import Store

RUNS_PER_WORKER = 4
BEGUN = Ending(Outcome.PREEMPTED, "bench")


def fill(url: str, num_runs: int) -> None:
    """Interrupted runs, more than there are workers."""
    ask = drawing(url, settle=False)
    for _ in range(num_runs):
        ask()


def client(url: str) -> Act:
    """One worker: a claim, and the run is given back."""
    store = Store(url)
    sweep_id, me, name = (
        store.sweep("bench").sweep_id,
        processes.identify(),
        f"bench:{processes.identify().pid}",
    )

    def act() -> None:
        claim = None
        while claim is None:
            claim = store.claim(sweep_id, owner=me, worker=name)
        store.release(claim.lease, BEGUN)

    return act


def num_attempts(url: str) -> int:
    """How many attempts the database knows."""
    store = Store(url)
    runs = store.runs(store.sweep("bench").sweep_id)
    assert all(run.attempts == run.lease_epoch for run in runs)
    return sum(run.attempts for run in runs)


if __name__ == "__main__":
    workers, claims, limit_s = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    server = Server(Path(sys.argv[1]) / "postgres")
    database = server.up()
    try:
        prepare(database)
        fill(database, RUNS_PER_WORKER * workers)
        found = crowd(workers=workers, acts=claims, limit_s=limit_s, connect=lambda: client(database))
        if "error" not in found:
            expected = (
                RUNS_PER_WORKER * workers + found["acts"] + workers
            )  # each worker's first is not measured
            if num_attempts(database) != expected:
                found = {"error": f"{num_attempts(database)} attempts instead of {expected}"}
        answer(found)
    finally:
        server.down()
