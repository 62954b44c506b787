"""A lost database is made anew from run directories; what is hostile in them is left out, and said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import sweeps

from sweeper import checkpoints, manifests, processes, rebuild, restored, rundir, settling
from sweeper.checkpoints import void
from sweeper.config import to_yaml
from sweeper.database import database_path
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, NotFound, SweeperError
from sweeper.records import Claim, Ending, Run, Sweep
from sweeper.search import Search
from sweeper.states import Outcome, State
from sweeper.store import Store
from sweeper.tracking import MetricsLog

DEAD = replace(processes.identify(), start_ticks=1)


class World:
    """A data directory with its database, in which training is played with the real code."""

    def __init__(self, url: str, data_dir: Path, new_url: Callable[[], str]) -> None:
        self.store, self.data_dir, self._new_url = Store(url), data_dir, new_url
        self.rebuilt = ""

    def start(self, claim: Claim, sweep: Sweep, *, steps: tuple[int, ...] = ()) -> Path:
        """Create the directory of a claimed run, train and checkpoint at `steps`."""
        run_dir: Path = sweeps.create_directory(sweep, claim.run, self.data_dir)
        self.mark(claim)
        rundir.attempt_log(run_dir, claim.run.attempts).write_text("hello\n")
        log = MetricsLog(run_dir / rundir.METRICS_FILE)
        self.store.record_start(claim.lease, step=0, total_steps=100)
        for step in steps:
            log.write(step, {"loss": 1.0 / (step + claim.run.trial + 1)})
            commit(run_dir, claim, step)
            self.store.record_checkpoint(claim.lease, step=step)
        log.close()
        return run_dir

    def mark(self, claim: Claim, owner: Any = DEAD) -> None:
        rundir.write_marker(
            self.data_dir / claim.run.path, attempt=claim.run.attempts, lease_epoch=claim.lease.lease_epoch,
            owner=owner, started_at="2026-01-31T12:00:00Z",
        )  # fmt: skip

    def draw(self, sweep: Sweep, *, steps: tuple[int, ...] = ()) -> Claim:
        claim = sweeps.must_draw(self.store, sweep)
        self.start(claim, sweep, steps=steps)
        return claim

    def settle(self, claim: Claim, state: State, outcome: Outcome, value: float | None = None) -> None:
        ending = Ending(outcome, "so", value=value)
        settling.settle(self.store, claim.lease, self.data_dir / claim.run.path, state, ending)

    def complete(self, claim: Claim, value: float) -> None:
        self.settle(claim, State.COMPLETED, Outcome.COMPLETED, value)

    def supersede(self, sweep: Sweep, claim: Claim) -> Claim:
        return settling.supersede(
            self.store, sweep, claim.run, claim.lease, sweeps.CRASHED, data_dir=self.data_dir,
            create=lambda run, run_dir: sweeps.create_directory(sweep, run, self.data_dir),
            owner=DEAD, worker="w:0",
        )  # fmt: skip

    def rebuild(self, directory: Path | None = None) -> tuple[int, Store]:
        """Lose the database; make it anew."""
        self.store.close()
        path = database_path(self.store.url)
        if path is not None:
            path.unlink()
        self.rebuilt = self._new_url()  # `rebuild` would create it, with a second for Optuna's tables
        code = rebuild.main(directory or self.data_dir, storage=self.rebuilt, data_dir=self.data_dir)
        return code, Store(self.rebuilt)


def commit(run_dir: Path, claim: Claim, step: int, *, start: int = 0) -> None:
    draft = checkpoints.Draft(
        run_dir / rundir.CHECKPOINTS_DIR, run_id=claim.run.run_id, step=step, lease_epoch=claim.lease.lease_epoch,
        lineage=((claim.lease.lease_epoch, start),), parent_step=start or None,
        config_digest=rundir.read_identity(run_dir).config_digest,
    )  # fmt: skip
    draft.add_bytes("model.pth", b"weights of step %d" % step)
    checkpoints.commit(draft, check_lease=lambda: None, record=void, committed_at="now")


@pytest.fixture
def world(url: str, memory_dir: Path, new_url: Callable[[], str]) -> World:
    data_dir = memory_dir / "data"
    data_dir.mkdir()
    return World(url, data_dir, new_url)


def runs(store: Store, name: str = "simple") -> dict[int, Run]:
    return {run.number: run for run in store.runs(store.sweep(name).sweep_id)}


# --- the same as before ------------------------------------------------------------------------


def test_finished_trials_come_back_with_their_values(world: World) -> None:
    sweep = sweeps.make(world.store, n_trials=8)
    ends = [
        (State.COMPLETED, Outcome.COMPLETED, 0.5),
        (State.PRUNED, Outcome.PRUNED, 0.75),
        (State.PRUNED, Outcome.PRUNED, None),
        (State.FAILED, Outcome.CRASHED, None),
        (State.CANCELLED, Outcome.CANCELLED, None),
        (State.COMPLETED, Outcome.COMPLETED, 0.25),
    ]
    for state, outcome, value in ends:
        world.settle(world.draw(sweep, steps=(5, 10)), state, outcome, value)
    before, left = runs(world.store), world.store.count_left(sweep.sweep_id)
    study = sweeps.study(world.store).trials
    told = sweeps.rows(world.store, "sweeper_run")

    code, store = world.rebuild()

    assert code == EXIT_OK
    after = runs(store)
    assert list(after) == list(before)
    for number, run in before.items():
        assert replace(after[number], global_step=run.global_step, total_steps=run.total_steps) == run
    assert store.count_left(store.sweep("simple").sweep_id) == left == (3, 0)
    again = sweeps.rows(store, "sweeper_run")
    for old, new in zip(
        *(sorted(rows, key=lambda row: row["number"]) for rows in (told, again)), strict=True
    ):
        assert {k: new[k] for k in ("value", "reason", "outcome")} == {
            k: old[k] for k in ("value", "reason", "outcome")
        }
    rebuilt = sweeps.study(store)
    keys = ("number", "state", "values", "params", "distributions")
    assert [[getattr(t, k) for k in keys] for t in rebuilt.trials] == [
        [getattr(t, k) for k in keys] for t in study
    ]
    assert rebuilt.best_value == 0.25


def test_the_sweep_is_the_one_it_was(world: World) -> None:
    sweep = sweeps.make(world.store, n_trials=8, seed=5, direction="maximize", sampler="tpe")
    world.complete(world.draw(sweep), 0.5)
    _, store = world.rebuild()
    again = store.sweep("simple")
    assert (again.seed, again.n_trials, again.metric, again.direction) == (5, 8, "loss", "maximize")
    assert {k: again.config[k] for k in ("space", "sampler", "pruner", "retry")} == {
        k: sweep.config[k] for k in ("space", "sampler", "pruner", "retry")
    }


def test_the_next_trial_is_drawn_as_if_nothing_had_happened(world: World, other_store: Store) -> None:
    sweep = sweeps.make(world.store, n_trials=8, sampler="tpe")
    for value in (0.5, 0.4, 0.3, 0.2, 0.6):
        world.complete(world.draw(sweep), value)
    expected = Search(world.store, sweep).propose()
    _, store = world.rebuild()
    again = Search(store, store.sweep("simple")).propose()
    assert again == expected
    claim = sweeps.must_draw(store, store.sweep("simple"))
    assert (claim.run.number, claim.run.trial) == (5, 5)


def test_an_incomplete_run_is_claimable_above_every_epoch_on_disk(world: World) -> None:
    sweep = sweeps.make(world.store)
    claim = world.draw(sweep, steps=(5,))
    for _ in range(3):
        claim = sweeps.take_over(world.store, claim.run)
        world.mark(claim)
    commit(world.data_dir / claim.run.path, claim, 10)
    drawn_only = sweeps.must_draw(world.store, sweep)

    code, store = world.rebuild()

    assert code == EXIT_OK
    (run,) = runs(store).values()
    assert (run.state, run.checkpoint_step, run.lease_epoch) == (State.INTERRUPTED, 10, 4)
    again = sweeps.must_claim(store, run)
    assert again.lease.lease_epoch == 5 > rundir.largest_epoch(world.data_dir / run.path)
    assert (4, 0) in store.starts(run.run_id), "the lineage is known"
    assert drawn_only.run.trial == 1
    assert sweeps.must_draw(store, store.sweep("simple")).run.params == drawn_only.run.params


def test_only_the_newest_of_a_chain_of_replacements_is_open(world: World) -> None:
    sweep = sweeps.make(world.store)
    first = world.draw(sweep, steps=(5,))
    second = world.supersede(sweep, first)
    third = world.supersede(sweep, second)
    _, store = world.rebuild()
    assert {n: run.state for n, run in runs(store).items()} == {
        0: State.SUPERSEDED, 1: State.SUPERSEDED, 2: State.INTERRUPTED,
    }  # fmt: skip
    assert store.count_left(store.sweep("simple").sweep_id) == (9, 1), "the trial counts once"
    again = sweeps.must_claim(store, third.run)
    assert again.run.wandb_run_id == third.run.wandb_run_id
    sweeps.complete(store, again, 0.5)
    assert [t.value for t in sweeps.study(store).trials] == [0.5]


def test_a_fresh_directory_that_never_took_over_does_not_unfinish_its_trial(world: World) -> None:
    """A superseder died after making the directory; then the old run was resumed and completed."""
    sweep = sweeps.make(world.store)
    claim = world.draw(sweep, steps=(5,))
    fresh = settling.fresh_run(world.store, sweep, claim.run)
    sweeps.create_directory(sweep, fresh, world.data_dir)
    world.complete(claim, 0.5)
    _, store = world.rebuild()
    assert {n: run.state for n, run in runs(store).items()} == {0: State.COMPLETED, 1: State.SUPERSEDED}
    assert sweeps.study(store).best_value == 0.5
    assert sweeps.must_draw(store, store.sweep("simple")).run.number == 2


def test_a_retry_is_still_one(world: World) -> None:
    sweep = sweeps.make(world.store, n_trials=2)
    failed = world.draw(sweep)
    world.settle(failed, State.FAILED, Outcome.CRASHED)
    world.store.retry(failed.run.run_id)
    world.complete(world.draw(sweep), 0.5)
    assert world.store.count_left(sweep.sweep_id) == (1, 0)
    _, store = world.rebuild()
    assert store.count_left(store.sweep("simple").sweep_id) == (1, 0)
    assert runs(store)[1].retry_of == failed.run.run_id
    with pytest.raises(SweeperError, match="retried before"):
        store.retry(failed.run.run_id)


def test_points_of_a_grid_that_were_not_drawn_wait(world: World) -> None:
    sweep = sweeps.make(world.store, sampler="grid", space=sweeps.GRID, n_trials=6)
    done, lost, interrupted = (world.draw(sweep) for _ in range(3))
    world.complete(done, 0.5)
    shutil.rmtree(world.data_dir / lost.run.path)
    _, store = world.rebuild()
    again = store.sweep("simple")
    assert again.n_trials == 6
    assert store.count_left(again.sweep_id) == (4, 1)
    drawn = [sweeps.must_draw(store, again).run for _ in range(4)]
    assert [run.trial for run in drawn] == [1, 3, 4, 5]
    assert drawn[0].params == lost.run.params
    assert sweeps.draw(store, again) is None
    assert sweeps.claim(store, interrupted.run)


def test_a_grid_that_asked_for_more_trials_than_points_has_its_points(world: World) -> None:
    new = replace(sweeps.new(sampler="grid", space=sweeps.GRID, n_trials=100), n_trials=6)
    assert world.store.create_sweep(new)
    for _ in range(6):
        world.complete(world.draw(world.store.sweep("simple")), 0.5)
    _, store = world.rebuild()
    assert store.count_left(store.sweep("simple").sweep_id) == (0, 0)


def test_reports_come_back_where_a_pruner_needs_them(world: World) -> None:
    sweep = sweeps.make(world.store, pruner="median")
    claim = world.draw(sweep, steps=(5, 10))
    world.complete(claim, 0.5)
    _, store = world.rebuild()
    (trial,) = sweeps.study(store).trials
    assert trial.intermediate_values == {5: 1.0 / 6, 10: 1.0 / 11}
    assert store.verdict(trial._trial_id, 5) is False


def test_a_sweep_whose_space_was_given_as_a_list_comes_back(world: World) -> None:
    new = sweeps.new(space={"trainer.width": "choice(16, 32)"})
    new.config["sweep"]["params"] = {"trainer.width": [16, 32]}
    world.store.create_sweep(new)
    world.complete(world.draw(world.store.sweep("simple")), 0.5)
    code, store = world.rebuild()
    assert code == EXIT_OK
    assert store.sweep("simple").config["space"] == new.config["space"]


def test_all_sweeps_or_only_the_one_named(world: World) -> None:
    for name in ("one", "two"):
        world.complete(world.draw(sweeps.make(world.store, name)), 0.5)
    code, store = world.rebuild(world.data_dir / "sweep" / "two")
    assert code == EXIT_OK
    assert store.find_sweep("one") is None
    assert len(runs(store, "two")) == 1
    assert (
        rebuild.main(world.data_dir / "sweep" / "one", storage=store.url, data_dir=world.data_dir) == EXIT_OK
    )
    assert len(runs(store, "one")) == 1


def test_nothing_was_lost_where_the_next_attempt_went_on_from(world: World) -> None:
    sweep = sweeps.make(world.store)
    claim = world.draw(sweep, steps=(5, 25))
    run_dir = world.data_dir / claim.run.path
    claim = sweeps.take_over(world.store, claim.run)
    commit(run_dir, claim, 30, start=25)
    with MetricsLog(run_dir / rundir.METRICS_FILE) as log:
        log.write(33, {"loss": 0.5})
    world.mark(claim)

    _, store = world.rebuild()

    (run,) = runs(store).values()
    found = [(row["start_step"], row["end_step"]) for row in sweeps.attempts(store, run.run_id)]
    assert found == [(0, 25), (25, 33)]
    again = sweeps.must_claim(store, run)
    store.record_start(again.lease, step=33, total_steps=None)
    store.renew(again.lease, global_step=100)
    steps, _ = store.run_costs(again.run.run_id)
    assert steps == {"trained": 100, "recovered": 58, "lost": 0, "goodput": 1.0}


def test_a_damaged_checkpoint_is_not_taken_for_the_newest(world: World) -> None:
    claim = world.draw(sweeps.make(world.store), steps=(5, 10))
    model = world.data_dir / claim.run.path / "checkpoints" / "step_00000010" / "model.pth"
    model.write_bytes(model.read_bytes()[:-1] + b"X")
    _, store = world.rebuild()
    assert runs(store)[0].checkpoint_step == 5


# --- what is refused ---------------------------------------------------------------------------


def test_nothing_to_rebuild_is_said(world: World) -> None:
    world.store.close()
    with pytest.raises(NotFound, match="no run directory below"):
        rebuild.main(world.data_dir, storage=f"sqlite:///{world.data_dir}/new.db", data_dir=world.data_dir)
    assert not (world.data_dir / "new.db").exists()


def test_a_living_owner_is_left_in_peace(world: World) -> None:
    sweep = sweeps.make(world.store)
    world.complete(world.draw(sweep), 0.5)
    world.mark(world.draw(sweep), owner=processes.identify())
    new = f"sqlite:///{world.data_dir}/new.db"
    with pytest.raises(SweeperError, match=f"may still have an owner .process {os.getpid()} on"):
        rebuild.main(world.data_dir, storage=new, data_dir=world.data_dir)
    assert not (world.data_dir / "new.db").exists()


def test_a_sweep_that_the_database_knows_is_not_doubled(world: World) -> None:
    for name in ("a", "b"):
        world.complete(world.draw(sweeps.make(world.store, name)), 0.5)
    sweeps.execute(world.store, "DELETE FROM sweeper_attempt")
    sweeps.execute(world.store, "DELETE FROM sweeper_run")
    sweeps.execute(world.store, "DELETE FROM sweeper_sweep WHERE name='a'")
    sweeps.execute(world.store, "UPDATE studies SET study_name='c' WHERE study_name='a'")
    with pytest.raises(SweeperError, match=r"knows sweep 'b' already.*Move the database file away"):
        rebuild.main(world.data_dir, storage=world.store.url, data_dir=world.data_dir)
    assert world.store.find_sweep("a") is None, "all or nothing"


def test_a_rebuild_that_dies_half_way_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.complete(world.draw(sweeps.make(world.store)), 0.5)

    def broken(*args: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(restored, "_restore_run", broken)
        with pytest.raises(ZeroDivisionError):
            world.rebuild()
    assert Store(world.rebuilt).find_sweep("simple") is None
    assert rebuild.main(world.data_dir, storage=world.rebuilt, data_dir=world.data_dir) == EXIT_OK


def test_the_database_is_created_where_there_is_none(world: World) -> None:
    world.complete(world.draw(sweeps.make(world.store)), 0.5)
    url = f"sqlite:///{world.data_dir}/new.db"
    assert rebuild.main(world.data_dir, storage=url, data_dir=world.data_dir) == EXIT_OK
    assert len(runs(Store(url))) == 1


# --- results that do not count -----------------------------------------------------------------


def result(world: World, claim: Claim, **changes: Any) -> None:
    data = {"run_id": claim.run.run_id, "lease_epoch": 1, "state": "completed", "value": 0.5, "reason": ""}
    (world.data_dir / claim.run.path / rundir.RESULT_FILE).write_text(json.dumps({**data, **changes}))


def test_a_result_on_disk_counts_though_the_database_never_heard_of_it(world: World) -> None:
    claim = world.draw(sweeps.make(world.store))
    result(world, claim)
    _, store = world.rebuild()
    assert runs(store)[0].state is State.COMPLETED
    assert sweeps.study(store).best_value == 0.5


def test_a_result_of_an_owner_that_had_lost_the_run_does_not_count(world: World) -> None:
    claim = world.draw(sweeps.make(world.store))
    world.mark(sweeps.take_over(world.store, claim.run))
    result(world, claim, lease_epoch=1)
    _, store = world.rebuild()
    assert runs(store)[0].state is State.INTERRUPTED
    assert sweeps.must_claim(store, claim.run).lease.lease_epoch == 3


NONSENSE: dict[str, dict[str, Any]] = {
    "no value": {"value": None},
    "a text for a value": {"value": "0.5"},
    "NaN": {"value": float("nan")},
    "a value beyond all floats": {"value": 10**400},
    "a state of its own": {"state": "finished"},
    "a state that is not final": {"state": "running"},
    "superseded by nobody": {"state": "superseded"},
    "a list for a state": {"state": ["completed"]},
    "an epoch that is a text": {"lease_epoch": "1"},
}


def test_a_result_of_nonsense_leaves_its_run_open(world: World) -> None:
    sweep = sweeps.make(world.store)
    kinds = {}
    for kind, changes in NONSENSE.items():
        claim = world.draw(sweep)
        kinds[claim.run.number] = kind
        result(world, claim, **changes)
    _, store = world.rebuild()
    assert {kinds[n]: run.state for n, run in runs(store).items()} == dict.fromkeys(
        NONSENSE, State.INTERRUPTED
    )
    assert {trial.state.name for trial in sweeps.study(store).trials} == {"RUNNING"}


# --- hostile directories -----------------------------------------------------------------------


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reconfigure(run_dir: Path, data: bytes) -> None:
    """Put another config.yaml in place, with run.json agreeing to it."""
    (run_dir / rundir.CONFIG_FILE).write_bytes(data)
    rewrite(run_dir / rundir.RUN_FILE, config_digest=manifests.digest(data))


def change_config(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    import yaml

    config = yaml.safe_load((run_dir / rundir.CONFIG_FILE).read_bytes())
    change(config)
    reconfigure(run_dir, to_yaml(config))


BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(ord("a"), ord("i"))
)


def link(run_dir: Path) -> None:
    elsewhere = run_dir.parent.parent / "elsewhere"
    run_dir.rename(elsewhere)
    run_dir.symlink_to(elsewhere)


def huge(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(200 << 20)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a link": link,
    "a link for run.json": lambda d: ((d / "run.json").rename(d / "x"), (d / "run.json").symlink_to(d / "x")),
    "run.json of 200 MB": lambda d: huge(d / "run.json"),
    "config.yaml of 200 MB": lambda d: huge(d / "config.yaml"),
    "no run.json": lambda d: (d / "run.json").unlink(),
    "no config.yaml": lambda d: (d / "config.yaml").unlink(),
    "another run's run.json": lambda d: rewrite(d / "run.json", run_id="simple.r.00000", number=0),
    "../ as its name": lambda d: rewrite(d / "run.json", run_id="../../../etc"),
    "a newline in its name": lambda d: rewrite(d / "run.json", run_id=d.name + "\n"),
    "another sweep's name": lambda d: rewrite(d / "run.json", sweep="../other"),
    "a trial number of a billion": lambda d: rewrite(d / "run.json", trial=10**9),
    "a trial number below zero": lambda d: rewrite(d / "run.json", trial=-1),
    "SQL for a seed": lambda d: rewrite(d / "run.json", seed="1); DROP TABLE sweeper_run; --"),
    "a parameter that is no choice": lambda d: rewrite(d / "run.json", params={"trainer.width": 17}),
    "a config.yaml that was changed": lambda d: (d / "config.yaml").write_text("sweep: {}\n"),
    "a YAML bomb": lambda d: reconfigure(d, BOMB),
    "YAML nested without end": lambda d: reconfigure(d, b"[" * 100_000),
    "YAML that runs code": lambda d: reconfigure(d, b"!!python/object/apply:os.system ['touch /tmp/owned']\n"),
    "YAML that is none": lambda d: reconfigure(d, b"\x00\xff{"),
    "YAML with a date of nonsense": lambda d: reconfigure(d, b"sweep: 2026-99-99\n"),
    "a config that is a list": lambda d: reconfigure(d, b"[1]\n"),
    "a config without a sweep": lambda d: change_config(d, lambda c: c.pop("sweep")),
    "a config without a seed": lambda d: change_config(d, lambda c: c["sweep"].pop("seed")),
    "a config with another name": lambda d: change_config(d, lambda c: c["sweep"].update(name="other")),
    "a config without a sampler": lambda d: change_config(d, lambda c: c.pop("sampler")),
    "a space that is none": lambda d: change_config(d, lambda c: c["sweep"].update(params={"x": "$(reboot)"})),
}  # fmt: skip


def test_hostile_directories_are_left_out_and_named_and_the_others_come_back(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweeps.make(world.store, n_trials=len(HOSTILE) + 2)
    good = world.draw(sweep)
    world.complete(good, 0.5)
    bad = {kind: world.draw(sweep).run for kind in HOSTILE}
    last = world.draw(sweep)
    for kind, run in bad.items():
        HOSTILE[kind](world.data_dir / run.path)

    code, store = world.rebuild()

    assert code == EXIT_NOT_WELL
    said = capsys.readouterr().err
    assert [kind for kind, run in bad.items() if f"{run.run_id} is left out: " not in said] == []
    assert [run.run_id for run in runs(store).values()] == [good.run.run_id, last.run.run_id]
    assert not Path("/tmp/owned").exists()
    again = store.sweep("simple")
    drawn = [sweeps.must_draw(store, again).run for _ in bad]
    assert [run.trial for run in drawn] == [run.trial for run in bad.values()], "their trials wait"
    assert drawn[0].number == last.run.number + 1, "their numbers are not used again"


def test_a_finished_run_keeps_its_value_without_its_configuration(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweeps.make(world.store, n_trials=2)
    damaged, whole = world.draw(sweep), world.draw(sweep)
    world.complete(damaged, 0.25)
    world.complete(whole, 0.5)
    (world.data_dir / damaged.run.path / "config.yaml").write_text("sweep: {}\n")
    code, store = world.rebuild()
    assert code == EXIT_OK
    assert f"the result of {damaged.run.run_id} is kept" in capsys.readouterr().err
    assert [run.state for run in runs(store).values()] == [State.COMPLETED, State.COMPLETED]
    assert store.count_left(store.sweep("simple").sweep_id) == (0, 0)


@pytest.mark.parametrize("kind", ["a link", "no run.json", "another run's run.json", "a YAML bomb"])
def test_the_number_of_a_hostile_directory_is_not_used_again(world: World, kind: str) -> None:
    sweep = sweeps.make(world.store)
    world.complete(world.draw(sweep), 0.5)
    bad = world.draw(sweep)
    HOSTILE[kind](world.data_dir / bad.run.path)
    _, store = world.rebuild()
    again = sweeps.must_draw(store, store.sweep("simple"))
    assert (again.run.trial, again.run.number) == (bad.run.trial, bad.run.number + 1)


HARMLESS: dict[str, Callable[[Path], object]] = {
    "a pickle in a checkpoint": lambda d: (d / "checkpoints/step_00000005/model.pth").write_bytes(
        b"cos\nsystem\n(S'touch /tmp/owned'\ntR."
    ),
    "a link for a checkpoint": lambda d: (d / "checkpoints/step_00000009").symlink_to("/"),
    "a manifest of 200 MB": lambda d: huge(d / "checkpoints/step_00000005/MANIFEST.json"),
    "a result of 200 MB": lambda d: ((d / "result.json").touch(), huge(d / "result.json")),
    "a result nested without end": lambda d: (d / "result.json").write_text("[" * 100_000),
    "a link for a result": lambda d: (d / "result.json").symlink_to("/etc/passwd"),
    "a marker of nonsense": lambda d: rewrite(rundir.marker_path(d), pid="1; reboot", pid_start=[]),
    "a marker with a giant pid": lambda d: rewrite(rundir.marker_path(d), pid=10**30),
    "a pipe for a marker": lambda d: (rundir.marker_path(d).unlink(), os.mkfifo(rundir.marker_path(d))),
    "metrics of nonsense": lambda d: (d / "metrics.jsonl").write_text(
        '{"step": "x", "loss": 1}\n{"step": 1, "loss": "x"}\n{"step": 2, "loss": 1e999}\n[]\n{\n'
        '{"step": 99999999999999999999, "loss": 1}\n{"step": 3, "loss": ' + "9" * 400 + "}\n"
    ),
    "a link for the metrics": lambda d: ((d / "metrics.jsonl").unlink(), (d / "metrics.jsonl").symlink_to("/dev/zero")),
    "a log with a giant number": lambda d: (d / "logs" / f"attempt_{'9' * 40}.log").touch(),
    "names with newlines": lambda d: ((d / "a\nb").mkdir(), (d / "checkpoints" / "step_0\n").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_hostile_files_in_a_run_do_no_harm(world: World, kind: str) -> None:
    sweep = sweeps.make(world.store, pruner="median")
    incomplete, done = world.draw(sweep, steps=(5,)), world.draw(sweep, steps=(5,))
    world.complete(done, 0.5)
    world.mark(done)  # it had outlived the run
    done_dir = world.data_dir / done.run.path
    if "result" in kind:
        (done_dir / rundir.RESULT_FILE).unlink()
    for claim in (incomplete, done):
        HARMLESS[kind](world.data_dir / claim.run.path)

    _, store = world.rebuild()

    after = State.INTERRUPTED if "result" in kind else State.COMPLETED
    assert [run.state for run in runs(store).values()] == [State.INTERRUPTED, after]
    assert [run.attempts for run in runs(store).values()] == [1, 1]
    assert not Path("/tmp/owned").exists()
    for trial in sweeps.study(store).trials:
        trial._validate()


def test_a_run_in_another_sweeps_directory_is_left_out(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweeps.make(world.store)
    claim = world.draw(sweep)
    world.complete(world.draw(sweep), 0.5)
    run_dir = world.data_dir / claim.run.path
    stray = world.data_dir / "sweep" / "other" / "runs" / run_dir.name
    stray.parent.mkdir(parents=True)
    run_dir.rename(stray)
    code, store = world.rebuild()
    assert code == EXIT_NOT_WELL
    assert f"{stray} is left out: " in capsys.readouterr().err
    assert list(runs(store)) == [1]


def test_a_grid_that_cannot_be_walked_is_left_out_with_its_sweep(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good"):
        world.complete(world.draw(sweeps.make(world.store, name)), 0.5)
    run_dir = world.data_dir / "sweep/bad/runs/bad.r.00000"
    change_config(run_dir, lambda config: config.update(sampler=sweeps.SAMPLERS["grid"]))
    code, store = world.rebuild()
    assert code == EXIT_NOT_WELL
    assert "bad is left out: sampler=grid cannot walk trainer.lr" in capsys.readouterr().err
    assert store.find_sweep("bad") is None
    assert len(runs(store, "good")) == 1


def test_an_identity_that_this_code_wrote_is_always_read(world: World) -> None:
    claim = world.draw(sweeps.make(world.store))
    run_dir = world.data_dir / claim.run.path
    assert asdict(rebuild.read(run_dir).identity)["run_id"] == claim.run.run_id
