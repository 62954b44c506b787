"""Ours: ask + tell, three parameters, random sampler, as a worker does it.

Usage: ours_asks.py DIRECTORY WORKERS TRIALS LIMIT_S
"""

from __future__ import annotations

import sys

from bench.crowd import Act, answer, crowd
from sweeper import processes, search
from sweeper.database import create_database
from sweeper.records import Ending, NewSweep
from sweeper.states import Outcome, State
from sweeper.store import Store

SPACE = {
    "trainer.lr": "tag(log, interval(1e-4, 1e-1))",
    "trainer.width": "choice(32, 64, 128)",
    "trainer.dropout": "interval(0.0, 0.5)",
}


def prepare(url: str) -> None:
    """A database with one sweep that is large enough."""
    create_database(url)
    config = {
        "space": {key: search.distribution_of(key, text) for key, text in SPACE.items()},
        "sampler": {"_target_": "optuna.samplers.RandomSampler"},
        "pruner": {"_target_": "optuna.pruners.NopPruner"},
    }
    store = Store(url)
    store.create_sweep(
        NewSweep(name="bench", seed=0, n_trials=10**9, metric="loss", direction="minimize", config=config)
    )
    store.close()


def client(url: str, *, settle: bool = True) -> Act:
    """Ask: draw a trial, with its run and lease. Tell: settle it, or give it back."""
    store = Store(url)
    sweep = store.sweep("bench")
    asking = search.Search(store, sweep)
    me = processes.identify()

    def ask() -> object:
        while True:
            store.count_left(sweep.sweep_id)
            proposal = asking.propose()
            assert proposal is not None
            claim = store.draw(sweep, proposal, owner=me, worker="bench", threads=1)
            if claim is not None:
                return claim

    def act() -> None:
        claim = ask()
        if not settle:
            store.release(claim.lease, Ending(Outcome.PREEMPTED, "bench"))  # type: ignore[attr-defined]
            return
        ending = Ending(Outcome.COMPLETED, value=claim.run.params["trainer.lr"])  # type: ignore[attr-defined]
        store.settle(claim.lease, State.COMPLETED, ending)  # type: ignore[attr-defined]

    return act


if __name__ == "__main__":
    database = f"sqlite:///{sys.argv[1]}/sweeper.db"
    prepare(database)
    answer(
        crowd(
            workers=int(sys.argv[2]),
            acts=int(sys.argv[3]),
            limit_s=float(sys.argv[4]),
            connect=lambda: client(database),
        )
    )
