"""Sweeps for tests, made and moved through the same store that workers use."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import optuna
import sqlalchemy as sa

from sweeper import manifests, processes, rundir
from sweeper.config import for_run, to_yaml
from sweeper.records import Claim, Ending, Lease, NewSweep, Run, Suspect, Sweep
from sweeper.rundir import Identity
from sweeper.search import Search, grid, is_grid, space_of
from sweeper.states import Outcome, State
from sweeper.store import Store

SPACE = {
    "trainer.lr": "tag(log, interval(1e-4, 1e-1))",
    "trainer.depth": "range(1, 5)",
    "trainer.width": "choice(16, 32, 64)",
}
GRID = {"trainer.depth": "range(1, 4)", "trainer.width": "choice(16, 32)"}
SAMPLERS: dict[str, dict[str, Any]] = {
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "tpe": {"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3, "constant_liar": False},
    "grid": {"_target_": "optuna.samplers.GridSampler"},
}
PRUNERS: dict[str, dict[str, Any]] = {
    "none": {"_target_": "optuna.pruners.NopPruner"},
    "median": {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2, "n_warmup_steps": 0},
    "halving": {
        "_target_": "optuna.pruners.SuccessiveHalvingPruner",
        "min_resource": 1,
        "reduction_factor": 2,
    },
}
LOST = Ending(Outcome.LOST, "it vanished")
CRASHED = Ending(Outcome.CRASHED, "ValueError: no")
PREEMPTED = Ending(Outcome.PREEMPTED, "SIGTERM")


def new(
    name: str = "simple",
    *,
    n_trials: int = 10,
    seed: int = 0,
    space: Mapping[str, str] = SPACE,
    sampler: str | dict[str, Any] = "random",
    pruner: str | dict[str, Any] = "none",
    direction: str = "minimize",
    retry: Mapping[str, int] | None = None,
) -> NewSweep:
    """What a launch would ask the store to create."""
    sampling = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    config: dict[str, Any] = {
        "sampler": sampling,
        "pruner": PRUNERS[pruner] if isinstance(pruner, str) else pruner,
        "trainer": {"_target_": "train.me", "lr": 0.1, "depth": 1, "width": 16},
        "retry": dict(retry or {"max_lost": 20, "max_crashed": 1, "max_oom": 0}),
        "resume": {"mode": "auto", "on_invalid": "fresh"},
        "sweep": {
            "name": name, "seed": seed, "n_trials": n_trials, "metric": "loss",
            "direction": direction, "params": dict(space),
        },
        "space": space_of(space),
    }  # fmt: skip
    points = grid(config["space"]) if is_grid(sampling) else ()
    return NewSweep(name, seed, n_trials, "loss", direction, config, points)


def make(store: Store, name: str = "simple", **choices: Any) -> Sweep:
    """Create a sweep and return it as the database holds it."""
    assert store.create_sweep(new(name, **choices))
    return store.sweep(name)


def draw(store: Store, sweep: Sweep, *, worker: str = "w:0", search: Search | None = None) -> Claim | None:
    """Draw the next trial the way a worker does; None when nothing is left."""
    search = search or Search(store, sweep)
    while store.count_left(sweep.sweep_id)[0] > 0:
        proposal = search.propose()
        if proposal is None:
            return None
        claim = store.draw(sweep, proposal, owner=processes.identify(), worker=worker, threads=1)
        if claim is not None:
            return claim
    return None


def must_draw(store: Store, sweep: Sweep, **more: Any) -> Claim:
    """Draw the next trial, which must be there."""
    claim = draw(store, sweep, **more)
    assert claim is not None
    return claim


def complete(store: Store, claim: Claim, value: float = 0.5) -> None:
    """Settle a run as completed."""
    store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=value))


def fail(store: Store, claim: Claim) -> None:
    """Settle a run as failed."""
    store.settle(claim.lease, State.FAILED, CRASHED)


def cancel(store: Store, claim: Claim) -> None:
    """Settle a run as cancelled."""
    store.settle(claim.lease, State.CANCELLED, Ending(Outcome.CANCELLED, "by the user"))


def claim(store: Store, run: Run, *, worker: str = "w:1") -> Claim | None:
    """Claim one interrupted run."""
    return store.claim(
        run.sweep_id, owner=processes.identify(), worker=worker, run_id=run.run_id, is_patient=False
    )


def must_claim(store: Store, run: Run, **more: Any) -> Claim:
    """Claim one interrupted run, which must work."""
    found = claim(store, run, **more)
    assert found is not None
    return found


def suspect(store: Store, run: Run) -> Suspect:
    """The run as an observer sees it; it must be running."""
    return next(s for s in store.suspects(run.sweep_id) if s.run_id == run.run_id)


def take_over(store: Store, run: Run, *, worker: str = "w:1") -> Claim:
    """Take a running run over, as if its lease were over."""
    found = store.take_over(suspect(store, run), owner=processes.identify(), worker=worker, reason="gone")
    assert found is not None
    return found


def supersede(store: Store, sweep: Sweep, claim: Claim, ending: Ending = CRASHED) -> Claim:
    """Let a fresh run of the same trial take the run's place in the database."""
    from sweeper.settling import fresh_run

    fresh = fresh_run(store, sweep, claim.run)
    return store.supersede(claim.lease, ending, fresh, owner=processes.identify(), worker="w:0")


def create_directory(sweep: Sweep, run: Run, data_dir: Any) -> Any:
    """The run's directory with marker, as a worker makes it."""
    run_dir = data_dir / run.path
    config = to_yaml(for_run(sweep.config, run.params))
    identity = Identity(
        run_id=run.run_id, sweep=sweep.name, number=run.number, trial=run.trial, params=run.params, seed=run.seed,
        threads=run.threads, wandb_run_id=run.wandb_run_id, config_digest=manifests.digest(config),
        code_version="test", created_at="2026-01-31T12:00:00Z", replaces=run.replaces, retry_of=run.retry_of,
    )  # fmt: skip
    rundir.create(run_dir, identity, config=config, overrides=rundir.overrides_yaml(run.params))
    return run_dir


def study(store: Store, name: str = "simple") -> optuna.Study:
    """The sweep as Optuna sees it. Its check of the schema takes 0.2 s; one test makes it."""
    storage = optuna.storages.RDBStorage(
        store.url,
        skip_compatibility_check=True,
        skip_table_creation=True,
        engine_kwargs={"poolclass": sa.NullPool},
    )
    return optuna.load_study(study_name=name, storage=storage)


def attempts(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The attempt rows of a run, oldest first."""
    found = [row for row in rows(store, "sweeper_attempt") if row["run_id"] == run_id]
    return sorted(found, key=lambda row: row["attempt"])


def rows(store: Store, table: str) -> list[dict[str, Any]]:
    """All rows of a table, read through a connection that is not the store's."""
    return read(store, [table])[table]


def read(store: Store, tables: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """All rows of some tables."""
    with _engine(store.url).connect() as connection:
        return {
            table: [dict(row) for row in connection.exec_driver_sql(f"SELECT * FROM {table}").mappings()]
            for table in tables
        }


def execute(store: Store, sql: str, **params: Any) -> None:
    """Change the database behind the store's back."""
    with _engine(store.url).begin() as connection:
        connection.execute(sa.text(sql), params)


@lru_cache
def _engine(url: str) -> sa.Engine:
    return sa.create_engine(url, poolclass=sa.NullPool)


TABLES = (
    "sweeper_run",
    "sweeper_attempt",
    "sweeper_verdict",
    "trials",
    "trial_values",
    "trial_params",
    "trial_intermediate_values",
    "trial_system_attributes",
)


def everything(store: Store) -> dict[str, list[dict[str, Any]]]:
    """All rows about runs and trials, to see that a refused write changed none."""
    return {table: sorted(found, key=str) for table, found in read(store, TABLES).items()}


def without_lease(lease: Lease, **changes: Any) -> Lease:
    """The lease with some of its fields wrong."""
    fields = {"run_id": lease.run_id, "lease_epoch": lease.lease_epoch, "owner_token": lease.owner_token}
    return Lease(**{**fields, **changes})


def crowd(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(index, *args)` in `count` processes that begin together; returns what each returned.

    Forked, because 64 interpreters would import for longer than the test lasts. An error in any
    of them is raised here with its traceback.
    """
    context = multiprocessing.get_context("fork")
    start = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    crew = [
        context.Process(target=_member, args=(index, work, args, start, pipes[index][1]))
        for index in range(count)
    ]
    for member in crew:
        member.start()
    for _, sending in pipes:
        sending.close()
    answers = [_receive(receiving) for receiving, _ in pipes]
    for member in crew:
        member.join()
    errors = [error for error, _ in answers if error]
    assert not errors, f"{len(errors)} of {count} processes failed, the first with:\n{errors[0]}"
    return [result for _, result in answers]


def _receive(pipe: Any) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = pipe.recv()
    except EOFError:
        return "the process died without an answer", None
    return answer


def _member(index: int, work: Callable[..., Any], args: tuple[Any, ...], start: Any, answer: Any) -> None:
    try:
        start.wait()
        answer.send((None, work(index, *args)))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent raises it
        answer.send((traceback.format_exc(), None))
