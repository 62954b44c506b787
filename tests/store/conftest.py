"""One suite for every database: each test that takes `url` or `store` runs once for each backend."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sweeper.database import create_database
from sweeper.store import Store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables and no rows, made once: Optuna takes a second for its own."""
    path = tmp_path_factory.mktemp("empty") / "sweeper.db"
    create_database(f"sqlite:///{path}")
    return path


def _sqlite(directory: Path, empty: Path) -> str:
    path = directory / "sweeper.db"
    shutil.copyfile(empty, path)
    return f"sqlite:///{path}"


BACKENDS: dict[str, Callable[[Path, Path], str]] = {"sqlite": _sqlite}
"""Name of a backend → makes an empty database of ours, given a directory, and returns its URL."""


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: an fsync is free there, and 300 tests make thousands."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="sweeper-test-") as name:
        yield Path(name)


@pytest.fixture(params=BACKENDS)
def new_url(request: pytest.FixtureRequest, memory_dir: Path, empty_database: Path) -> Callable[[], str]:
    """Makes one more empty database of ours each time it is called."""
    made: list[str] = []

    def make() -> str:
        directory = memory_dir / f"database_{len(made)}"
        directory.mkdir()
        made.append(BACKENDS[request.param](directory, empty_database))
        return made[-1]

    return make


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    """The URL of an empty database of ours."""
    return new_url()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """An open store on an empty database."""
    opened = Store(url)
    yield opened
    opened.close()


@pytest.fixture
def other_store(new_url: Callable[[], str]) -> Iterator[Store]:
    """An open store on another empty database."""
    opened = Store(new_url())
    yield opened
    opened.close()
