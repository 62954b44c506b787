"""One thread, before torch is imported: the cases fork, and a fork copies one thread only."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from crash import mini  # noqa: E402
from crash.mini import Final, Place, Trace  # noqa: E402


@pytest.fixture(scope="session")
def fast_dir() -> Iterator[Path]:
    """A directory in memory for the whole session."""
    with mini.fast_dir() as path:
        mini.warm_up()
        yield path


@pytest.fixture(scope="session")
def fresh(fast_dir: Path) -> Place:
    """A sweep of one trial that nobody has worked on yet; copy it, never work in it."""
    return mini.new_place(fast_dir / "fresh")


@pytest.fixture(scope="session")
def undisturbed(fast_dir: Path, fresh: Place) -> tuple[Trace, Final]:
    """Every file operation of a worker that nothing disturbs, and what it leaves."""
    place = fresh.copy(fast_dir / "undisturbed")
    trace = mini.traced(place, fast_dir / "undisturbed.trace")
    end = mini.final(place)
    assert end.problems == []
    return trace, end


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory as well."""
    with mini.fast_dir() as path:
        yield path


@pytest.fixture
def where(fast_dir: Path, request: pytest.FixtureRequest) -> Path:
    """A name in memory that nothing is at yet."""
    return fast_dir / f"{request.node.name}".replace("/", "_")


@pytest.fixture(scope="session")
def interrupted(fast_dir: Path, fresh: Place, undisturbed: tuple[Trace, Final]) -> Place:
    """A run that was killed just before its third checkpoint got its name: steps 2 and 4 are there."""
    trace, _ = undisturbed
    place = fresh.copy(fast_dir / "interrupted")
    at = next(
        i
        for i, (operation, path) in enumerate(trace)
        if operation == "rename" and path.endswith("step_00000006")
    )
    assert mini.was_killed(mini.finish(place, probe=mini.KillAt(at)))
    assert [step for step, _ in mini.checkpoints.steps_on_disk(place.root())] == [4, 2]
    return place
