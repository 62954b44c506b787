"""Machines that are lost, and machines that only seemed to be: the copy goes on with one of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash.machines import STEPS, Machine, copied_steps, until

from sweeper import arrivals, rundir
from sweeper.mirror import generations
from sweeper.mirror.bucket import Bucket
from sweeper.mirror.copier import Copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine that nothing happens to, and that copies nothing."""
    machine = Machine(tmp_path_factory.mktemp("calm") / "machine")
    machine.finish(machine.launch())
    return machine


class Places:
    """A store, and machines that have nothing else in common."""

    def __init__(self, root: Path) -> None:
        self.url = f"file://{root}/store"
        self.bucket = Bucket.open(self.url, "simple")
        self.a, self.b = Machine(root / "a", self.url), Machine(root / "b", self.url)

    def restored(self, where: Path) -> Machine:
        """What the copy holds, fetched as a launch fetches it."""
        machine = Machine(where)
        found = arrivals.fetch_sweep(Copy(self.bucket, self.url), "simple", data_dir=machine.data)
        assert [note for arrival in found for note in arrival.notes] == []
        return machine


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    made = Places(tmp_path)
    yield made
    made.a.end()
    made.b.end()


def test_another_machine_goes_on_to_the_same_weights(places: Places, calm: Machine, tmp_path: Path) -> None:
    a, b = places.a, places.b
    a.open_gate(17)
    a.launch()
    until(lambda: list(copied_steps(places.bucket).values()) == [15, 15], "two runs were copied", log=a.log)
    a.end()
    b.finish(b.launch())
    assert "generation 1 held by" in b.log.read_text()
    assert "taking over as generation 2" in b.log.read_text()
    assert b.log.read_text().count("going on from step 15") == 2
    assert b.finals() == calm.finals()
    assert len(b.finals()) == 3
    assert b.rows("SELECT state, count(*) FROM trials GROUP BY state") == [("COMPLETE", 3)]
    assert b.rows("SELECT DISTINCT lease_epoch FROM sweeper_run WHERE number < 2") == [(2,)]
    assert places.restored(tmp_path / "c").finals() == calm.finals()
    assert b.alive() == []
    a.finish(a.launch(), 76)
    assert "goes on elsewhere" in a.log.read_text()
    assert "data_dir=" in a.log.read_text()


def test_a_machine_that_comes_back_stops_itself(places: Places, calm: Machine, tmp_path: Path) -> None:
    a, b = places.a, places.b
    a.open_gate(12)
    launch = a.launch()
    until(lambda: list(copied_steps(places.bucket).values()) == [10, 10], "two runs were copied", log=a.log)
    a.signal(signal.SIGSTOP)
    b.open_gate(22)
    other = b.launch()
    until(lambda: list(copied_steps(places.bucket).values()) == [20, 20], "the other went on", log=b.log)
    whole = set(places.bucket.names(""))
    a.open_gate(17)  # its trainings go on, and save
    a.signal(signal.SIGCONT)
    a.finish(launch, 76)
    assert "has taken over the copy (generation 2" in a.log.read_text()
    assert a.alive() == []
    assert not [path for run in rundir.run_dirs(a.data, "simple") for path in run.glob("result*")]
    assert set(places.bucket.names("")) == whole
    b.open_gate(10**9)
    b.finish(other)
    assert b.finals() == calm.finals()
    assert places.restored(tmp_path / "c").finals() == calm.finals()
    newest = generations.newest(places.bucket)
    assert newest is not None
    assert newest.number == 2


def test_a_launch_that_is_refused_stops_nobody(places: Places, tmp_path: Path) -> None:
    a = places.a
    a.open_gate(12)
    launch = a.launch()
    until(lambda: list(copied_steps(places.bucket).values()) == [10, 10], "two runs were copied", log=a.log)
    places.b.finish(places.b.launch("trainer.epochs=4"), 78)
    assert "trainer.epochs: 3 → 4" in places.b.log.read_text()
    places.b.finish(places.b.launch("storage.url=sqlite:////proc/none/x.db"), 78)
    other = Machine(tmp_path / "other")
    other.finish(other.launch("sweep.seed=7", "trainer.epochs=1", n_trials=1))
    other.url = places.url
    other.finish(other.launch("sweep.seed=7", "trainer.epochs=1", n_trials=1), 78)
    assert "in the way" in other.log.read_text()
    newest = generations.newest(places.bucket)
    assert newest is not None
    assert newest.number == 1
    a.open_gate(10**9)
    a.finish(launch)


def test_a_store_that_is_away_for_the_whole_run_costs_nothing_but_the_copy(
    places: Places, calm: Machine, tmp_path: Path
) -> None:
    a, store = places.a, tmp_path / "store" / "simple"
    a.open_gate(0)
    launch = a.launch("mirror.finish_timeout=1")
    until(lambda: len(copied_steps(places.bucket)) == 2, "the sweep began", log=a.log)
    store.rename(tmp_path / "aside")
    store.write_text("the store is away")
    a.open_gate(10**9)
    a.finish(launch)
    said = a.log.read_text()
    assert "the copy cannot be written" in said
    assert "NOT everything was copied within 1 s" in said
    assert a.finals() == calm.finals()
    store.unlink()
    (tmp_path / "aside").rename(store)
    a.finish(a.launch())  # the sweep is complete; what the store lacks is copied
    assert places.restored(tmp_path / "c").finals() == calm.finals()
    assert {step for step in copied_steps(places.bucket).values()} == {STEPS}
