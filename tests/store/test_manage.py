"""cancel, retry and upgrade: what is recorded changes, an owner is fenced, nothing is left over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sweeps

from sweeper import manage, processes, rundir, schema
from sweeper.errors import EXIT_OK, Fenced, NotFound, SweeperError
from sweeper.records import Claim, Sweep
from sweeper.states import Outcome, State
from sweeper.store import Store


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store, n_trials=4)


@pytest.fixture
def data_dir(memory_dir: Path) -> Path:
    return memory_dir / "data"


def draw(store: Store, sweep: Sweep, data_dir: Path) -> Claim:
    """Draw a run and create its directory with the marker of a living owner."""
    claim = sweeps.must_draw(store, sweep)
    run_dir = sweeps.create_directory(sweep, claim.run, data_dir)
    mark(run_dir, claim.lease.lease_epoch)
    return claim


def mark(run_dir: Path, epoch: int) -> None:
    owner = processes.identify()
    rundir.write_marker(run_dir, attempt=1, lease_epoch=epoch, owner=owner, started_at="2026-01-31T12:00:00Z")


def cancel(name: str, store: Store, data_dir: Path) -> int:
    return manage.cancel(name, storage=store.url, data_dir=data_dir)


def assert_cancelled(store: Store, data_dir: Path, claim: Claim) -> None:
    run_dir = data_dir / claim.run.path
    result = rundir.read_result(run_dir)
    assert store.run(claim.run.run_id).state is State.CANCELLED
    assert result is not None
    assert (result["state"], result["lease_epoch"]) == ("cancelled", store.run(claim.run.run_id).lease_epoch)
    assert not rundir.marker_path(run_dir).exists()
    trial = next(t for t in sweeps.rows(store, "trials") if t["trial_id"] == claim.run.trial_id)
    assert trial["state"] == "FAIL"


def test_cancelling_a_run_fences_its_owner_and_closes_it(store: Store, sweep: Sweep, data_dir: Path) -> None:
    claim = draw(store, sweep, data_dir)
    assert cancel(claim.run.run_id, store, data_dir) == EXIT_OK
    assert_cancelled(store, data_dir, claim)
    with pytest.raises(Fenced):
        store.renew(claim.lease)
    assert [row["outcome"] for row in sweeps.attempts(store, claim.run.run_id)] == [Outcome.CANCELLED] * 2
    assert store.count_left(sweep.sweep_id) == (4, 0), "its slot is free again"


def test_cancelling_ends_the_trainer(store: Store, sweep: Sweep, data_dir: Path) -> None:
    claim = draw(store, sweep, data_dir)
    trainer = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True
    )
    store.record_processes(claim.lease, [processes.identify(trainer.pid)])
    cancel(claim.run.run_id, store, data_dir)
    assert trainer.wait(timeout=10) == -9
    assert trainer.stdin is not None
    trainer.stdin.close()


def test_an_interrupted_run_is_cancelled_though_it_backs_off(
    store: Store, sweep: Sweep, data_dir: Path
) -> None:
    claim = draw(store, sweep, data_dir)
    store.release(claim.lease, sweeps.LOST, back_off_s=30.0)
    cancel(claim.run.run_id, store, data_dir)
    assert_cancelled(store, data_dir, claim)


def test_cancelling_goes_above_every_epoch_on_disk(store: Store, sweep: Sweep, data_dir: Path) -> None:
    claim = draw(store, sweep, data_dir)
    mark(data_dir / claim.run.path, 9)
    cancel(claim.run.run_id, store, data_dir)
    assert_cancelled(store, data_dir, claim)
    assert store.run(claim.run.run_id).lease_epoch == 10


def test_a_run_whose_directory_was_never_made_is_cancelled(
    store: Store, sweep: Sweep, data_dir: Path
) -> None:
    claim = sweeps.must_draw(store, sweep)
    cancel(claim.run.run_id, store, data_dir)
    assert store.run(claim.run.run_id).state is State.CANCELLED
    assert not (data_dir / claim.run.path).exists()


def test_a_finished_run_cannot_be_cancelled(store: Store, sweep: Sweep, data_dir: Path) -> None:
    claim = draw(store, sweep, data_dir)
    sweeps.complete(store, claim)
    before = sweeps.everything(store)
    with pytest.raises(
        SweeperError, match=f"{claim.run.run_id} cannot be cancelled: it is completed already"
    ):
        cancel(claim.run.run_id, store, data_dir)
    assert sweeps.everything(store) == before


@pytest.mark.parametrize("name", ["nothing", "simple.r.00009"])
def test_cancelling_what_is_not_there_is_not_found(
    store: Store, sweep: Sweep, data_dir: Path, name: str
) -> None:
    with pytest.raises(NotFound, match=name):
        cancel(name, store, data_dir)


def test_cancelling_a_sweep_cancels_what_is_open_and_draws_nothing_more(
    store: Store, sweep: Sweep, data_dir: Path
) -> None:
    done, running, interrupted = (draw(store, sweep, data_dir) for _ in range(3))
    sweeps.complete(store, done)
    store.release(interrupted.lease, sweeps.PREEMPTED)
    other = sweeps.must_draw(store, sweeps.make(store, "other"))

    assert cancel("simple", store, data_dir) == EXIT_OK

    for claim in (running, interrupted):
        assert_cancelled(store, data_dir, claim)
    assert store.run(done.run.run_id).state is State.COMPLETED
    assert store.count_left(sweep.sweep_id) == (0, 0)
    store.check(other.lease)


def test_retry_says_what_to_do_next(
    store: Store, sweep: Sweep, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = draw(store, sweep, data_dir)
    sweeps.fail(store, claim)
    assert manage.retry(claim.run.run_id, storage=store.url, data_dir=data_dir) == EXIT_OK
    said = capsys.readouterr().out
    assert f"trial 1 waits with the parameters of {claim.run.run_id}" in said
    assert "resume simple" in said
    assert sweeps.must_draw(store, sweep).run.params == claim.run.params


def test_upgrading_says_where_it_stands(
    store: Store, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert manage.upgrade(storage=store.url, data_dir=data_dir) == EXIT_OK
    assert capsys.readouterr().out == f"schema {schema.HEAD} already; nothing to do\n"


def test_a_cancelled_run_whose_place_is_taken_cannot_be_retried(store: Store, data_dir: Path) -> None:
    """The trial it promised would never be drawn; with a higher n_trials it is."""
    sweep = sweeps.make(store, n_trials=1)
    cancelled = draw(store, sweep, data_dir)
    cancel(cancelled.run.run_id, store, data_dir)
    sweeps.complete(store, draw(store, sweep, data_dir))
    with pytest.raises(SweeperError, match="another trial has taken the place"):
        store.retry(cancelled.run.run_id)
    store.update_sweep(sweep.name, n_trials=2, config=sweep.config)
    assert store.retry(cancelled.run.run_id) == 2
