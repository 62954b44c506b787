"""One suite for every database: each test that takes `url` or `store` runs once for each backend."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from sweeper import embedded
from sweeper.database import create_database
from sweeper.store import Store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables and no rows, made once: Optuna takes a second for its own."""
    path = tmp_path_factory.mktemp("empty") / "sweeper.db"
    create_database(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Makes empty databases of ours on a PostgreSQL server of this session's own."""
    with tempfile.TemporaryDirectory(dir=_memory(), prefix="sweeper-test-") as name:
        server = embedded.Server(Path(name) / "postgres")
        Path(name).chmod(0o711)
        url = server.up()
        template = url.replace("/sweeper?", "/template_of_ours?")
        numbers = count()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync=off")  # the machine does not crash in these tests
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("CREATE DATABASE template_of_ours")
            create_database(template)

            def make() -> str:
                database = f"test_{next(numbers)}"
                connection.execute(f"CREATE DATABASE {database} TEMPLATE template_of_ours STRATEGY file_copy")
                return url.replace("/sweeper?", f"/{database}?")

            yield make
        server.down()


@pytest.fixture
def new_url(request: pytest.FixtureRequest, memory_dir: Path, empty_database: Path) -> Callable[[], str]:
    """Makes one more empty database of ours each time it is called."""
    if request.param == "postgres":
        make: Callable[[], str] = request.getfixturevalue("postgres")
        return make
    numbers = count()

    def copy() -> str:
        directory = memory_dir / f"database_{next(numbers)}"
        directory.mkdir()
        shutil.copyfile(empty_database, directory / "sweeper.db")
        return f"sqlite:///{directory}/sweeper.db"

    return copy


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that needs a database runs on every kind; a server's takes longer, and is not in `make check`."""
    if "new_url" in metafunc.fixturenames:
        kinds: list[Any] = ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)]
        if metafunc.definition.get_closest_marker("sqlite"):
            kinds: list[Any] = ["sqlite"]
        metafunc.parametrize("new_url", kinds, indirect=True)


def _memory() -> str | None:
    """Where there is a directory in memory: an fsync is free there, and 300 tests make thousands."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    """A directory in memory."""
    with tempfile.TemporaryDirectory(dir=_memory(), prefix="sweeper-test-") as name:
        yield Path(name)


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
