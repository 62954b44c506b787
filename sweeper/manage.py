"""Verbs that change what is recorded: retry, cancel, upgrade."""

from __future__ import annotations

import sys
from pathlib import Path

from sweeper import processes, rundir
from sweeper.database import upgrade_schema
from sweeper.errors import EXIT_OK, SweeperError
from sweeper.records import Claim, Ending, ProcessId, Run
from sweeper.report.hints import next_command
from sweeper.settling import settle
from sweeper.states import INCOMPLETE, Outcome, State
from sweeper.store import Store
from sweeper.trainer.run import in_attempt

_CLAIM_TRIES = 50


def retry(run_id: str, *, storage: str, data_dir: Path) -> int:
    """Queue a new trial with the parameters of a failed or cancelled run."""
    store = Store(storage)
    number = store.retry(run_id)
    command = next_command("resume", run_id.rpartition(".r.")[0], storage=storage, data_dir=data_dir)
    print(f"trial {number} waits with the parameters of {run_id}; start it with: {command}")
    return EXIT_OK


def cancel(name: str, *, storage: str, data_dir: Path) -> int:
    """Cancel one run, or a sweep with all its incomplete runs."""
    store = Store(storage)
    if rundir.RUN_ID.match(name):
        run = store.run(name)
        if run.state.is_final:
            raise SweeperError(f"run {name} cannot be cancelled", why=f"it is {run.state} already")
        runs = [run]
    else:
        sweep = store.sweep(name)
        store.cancel_sweep(name)
        runs = store.runs(sweep.sweep_id, sorted(INCOMPLETE))
        print(f"sweep {name}: no new trials are drawn; `sweeper launch` or `sweeper resume` goes on with it")
    me = processes.identify()
    for run in runs:
        _cancel_run(store, run, data_dir, me)
    return EXIT_OK


def _cancel_run(store: Store, run: Run, data_dir: Path, me: ProcessId) -> None:
    """Fence the owner by claiming the run, end its trainer if it is here, settle."""
    claim = _seize(store, run, me)
    if claim is None:
        print(f"run {run.run_id} is {store.run(run.run_id).state} meanwhile", file=sys.stderr)
        return
    trainers = claim.previous[1:]  # the worker itself goes on with other runs
    run_dir = data_dir / run.path
    processes.kill_leftovers(trainers, attempt_tag=in_attempt(str(run_dir.resolve()), run.lease_epoch))
    lease = claim.lease
    if run_dir.is_dir():
        on_disk = rundir.largest_epoch(run_dir)
        lease = store.raise_epoch(lease, above=on_disk) if on_disk >= lease.lease_epoch else lease
        settle(store, lease, run_dir, State.CANCELLED, Ending(Outcome.CANCELLED, "cancelled by the user"))
    else:
        store.settle(lease, State.CANCELLED, Ending(Outcome.CANCELLED, "cancelled by the user"))
    print(f"run {run.run_id} cancelled")


def _seize(store: Store, run: Run, me: ProcessId) -> Claim | None:
    for _ in range(_CLAIM_TRIES):
        for suspect in store.suspects(run.sweep_id):
            if suspect.run_id == run.run_id:
                claim = store.take_over(
                    suspect, owner=me, worker="cancel", reason="it was cancelled", outcome=Outcome.CANCELLED
                )
                if claim is not None:
                    return claim
        claim = store.claim(run.sweep_id, owner=me, worker="cancel", run_id=run.run_id, is_patient=False)
        if claim is not None or store.run(run.run_id).state.is_final:
            return claim
    return None


def upgrade(*, storage: str, data_dir: Path) -> int:
    """Bring the database's tables to this version."""
    before, after = upgrade_schema(storage)
    print(f"schema {after}" + ("" if before != after else " already; nothing to do"))
    return EXIT_OK
