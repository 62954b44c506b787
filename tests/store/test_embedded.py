"""`sweeper db up`: a server that anybody can start, and nobody else can enter."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sweeps

from sweeper import cli, embedded
from sweeper.database import create_database
from sweeper.errors import EXIT_CONFIG, EXIT_NOT_WELL, EXIT_OK, EXIT_USAGE
from sweeper.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def data_dir(memory_dir: Path) -> Iterator[Path]:
    """A data directory; the server in it is stopped at the end."""
    memory_dir.chmod(0o711)
    data_dir = memory_dir / "data"
    yield data_dir
    if (data_dir / "postgres").exists():
        embedded.Server(data_dir / "postgres").down()


def db(data_dir: Path, *arguments: str) -> int:
    return cli.main(["--data-dir", str(data_dir), "db", *arguments])


def password_in(data_dir: Path) -> str:
    return (data_dir / "postgres" / "pgpass").read_text().strip().split(":")[-1]


def test_up_status_down_and_up_again(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert db(data_dir, "status") == EXIT_CONFIG
    assert "`sweeper db up` makes one" in capsys.readouterr().err
    assert db(data_dir, "up") == EXIT_OK
    said = capsys.readouterr()
    url = said.out.strip()
    assert f"export SWEEPER_STORAGE='{url}'" in said.err
    create_database(url)
    store = Store(url)
    sweeps.make(store)
    assert db(data_dir, "up") == EXIT_OK
    assert capsys.readouterr().out.strip() == url, "it runs already"
    store.close()
    assert db(data_dir, "status") == EXIT_OK
    assert capsys.readouterr().out == f"up {url}\n"
    assert db(data_dir, "down") == EXIT_OK
    assert db(data_dir, "down") == EXIT_OK
    assert db(data_dir, "status") == EXIT_NOT_WELL
    assert db(data_dir, "up") == EXIT_OK
    assert Store(url).find_sweep("simple") is not None


def test_the_password_is_in_one_file_and_on_no_command_line(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db(data_dir, "up") == EXIT_OK
    said = capsys.readouterr()
    password = password_in(data_dir)
    assert len(password) >= 24
    assert password not in said.out + said.err
    commands = subprocess.run(["ps", "axeww"], capture_output=True, text=True, check=True).stdout
    assert str(data_dir) in commands, "the server is there to be seen"
    assert password not in commands
    place = data_dir / "postgres"
    assert stat.S_IMODE((place / "pgpass").stat().st_mode) == 0o600
    assert stat.S_IMODE((place / "data").stat().st_mode) == 0o700
    holding = [path for path in place.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert holding == [place / "pgpass"]


def test_nobody_comes_in_without_the_password(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert db(data_dir, "up") == EXIT_OK
    url = capsys.readouterr().out.strip()
    for database in ("sweeper", "postgres"):
        open_url = url.partition("?")[0].rpartition("/")[0] + f"/{database}?passfile=/dev/null"
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(open_url)
    assert not list((data_dir / "postgres").rglob(".s.PGSQL*")), "no socket beside the loopback"


def test_a_making_that_was_interrupted_is_begun_again(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = data_dir / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    assert db(data_dir, "up") == EXIT_OK
    assert db(data_dir, "down") == EXIT_OK
    (data_dir / "postgres" / "pgpass").unlink()  # killed just before it was written
    capsys.readouterr()
    assert db(data_dir, "up") == EXIT_OK
    create_database(capsys.readouterr().out.strip())


def test_a_backup_is_a_whole_database(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "sweeps.dump"
    assert db(data_dir, "up") == EXIT_OK
    url = capsys.readouterr().out.strip()
    create_database(url)
    store = Store(url)
    sweep = sweeps.make(store)
    sweeps.must_draw(store, sweep)
    before = sweeps.everything(store)
    store.close()

    assert db(data_dir, "backup", str(target)) == EXIT_OK
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["sweeps.dump"]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE again")
    again = url.replace("/sweeper?", "/again?")
    subprocess.run([embedded.binary("pg_restore"), f"--dbname={again}", str(target)], check=True)
    restored = Store(again)
    assert sweeps.everything(restored) == before
    restored.close()

    assert db(data_dir, "backup") == EXIT_USAGE
    assert db(data_dir, "down") == EXIT_OK
    assert db(data_dir, "backup", str(target)) == EXIT_NOT_WELL
    assert "Start it with `sweeper db up`" in capsys.readouterr().err


def test_an_address_this_machine_does_not_have_is_refused(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db(data_dir, "up", "--host", "192.0.2.1") == EXIT_CONFIG
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err
