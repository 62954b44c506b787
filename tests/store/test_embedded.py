"""`sweeper db up`: a server that anybody can start, and nobody else can enter."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import sweeps
from sqlalchemy.engine import make_url

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


@dataclass
class Said:
    code: int
    out: str
    err: str


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
    embedded.Server(half.parent)._record(embedded.Address("127.0.0.1", 0))
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
    sweeps.must_draw(store, sweep)
    store.close()
    said = capsys.readouterr().err
    subprocess.run(shlex.split(said.splitlines()[-1]), check=True)
    assert sweeps.everything(store) == before, "the command that is advised puts it back"
    store.close()
    restored.close()

    assert db(data_dir, "backup") == EXIT_USAGE
    assert db(data_dir, "backup", ".") == EXIT_CONFIG
    assert "it is a directory. Name a file." in capsys.readouterr().err
    place = str(data_dir / "postgres")
    assert cli.main(["db", "backup", "--dir", place, str(tmp_path / "more.dump")]) == EXIT_OK
    assert db(data_dir, "down") == EXIT_OK
    assert db(data_dir, "backup", str(target)) == EXIT_NOT_WELL
    assert "Start it with `sweeper db up`" in capsys.readouterr().err


def test_an_address_this_machine_does_not_have_is_refused(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db(data_dir, "up", "--host", "192.0.2.1") == EXIT_CONFIG
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err


# --- several machines --------------------------------------------------------------------------


@dataclass
class Elsewhere:
    """Which machine this one takes itself for."""

    monkeypatch: pytest.MonkeyPatch
    machine: dict[str, str] = field(default_factory=embedded._this_machine)

    def become(self, *, is_reachable: bool = False, **changes: str) -> None:
        here = {**self.machine, **changes}
        self.monkeypatch.setattr(embedded, "_this_machine", lambda: here)
        if not is_reachable:
            self.monkeypatch.setattr(embedded.Server, "accepts", False)


@pytest.mark.parametrize(
    "other", [{"host": "node2", "boot_id": "2"}, {"pid_namespace": "pid:[2]", "host": "container"}]
)
def test_no_second_server_is_started_on_the_data_of_another_machines(
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    other: dict[str, str],
) -> None:
    assert db(data_dir, "up") == EXIT_OK
    url = capsys.readouterr().out.strip()
    server = embedded.Server(data_dir / "postgres")
    pid = (server.data / "postmaster.pid").read_text()
    here = embedded._this_machine()["host"]
    with monkeypatch.context() as patched:
        there = Elsewhere(patched)
        there.become(**other, is_reachable=True)
        assert db(data_dir, "up") == EXIT_OK, "its own password opens it: it is this one, and runs"
        assert capsys.readouterr().out.strip() == url
        assert db(data_dir, "status") == EXIT_OK
        assert db(data_dir, "up", "--host", "10.9.9.9") == EXIT_CONFIG
        assert "runs already, at 127.0.0.1" in capsys.readouterr().err
        there.become(**other)
        for verb in (["up"], ["down"], ["backup", str(data_dir / "sweeps.dump")]):
            assert db(data_dir, *verb) == EXIT_CONFIG
            assert f"was started on {here} and was not stopped since" in capsys.readouterr().err
        assert db(data_dir, "status") == EXIT_NOT_WELL
        assert capsys.readouterr().out == f"unknown {url}\n"
    assert (server.data / "postmaster.pid").read_text() == pid
    assert server.is_up

    os.kill(int(pid.split()[0]), signal.SIGKILL)
    with monkeypatch.context() as patched:
        Elsewhere(patched).become(**other)
        assert db(data_dir, "up") == EXIT_CONFIG, "killed, as far as that machine can know it lives"
    assert db(data_dir, "up") == EXIT_OK
    assert db(data_dir, "down") == EXIT_OK
    with monkeypatch.context() as patched:
        Elsewhere(patched).become(**other)
        assert db(data_dir, "up") == EXIT_OK, "it was stopped in order: anybody may start it"
        assert db(data_dir, "down") == EXIT_OK


def test_after_a_reboot_it_is_started_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = embedded.Server(data_dir / "postgres")
    server.data.mkdir(parents=True)
    (server.data / "postmaster.pid").write_text("4190000\n")
    server._record(embedded.Address("127.0.0.1", 5555))
    assert server.elsewhere == ""
    there = Elsewhere(monkeypatch)
    there.become(boot_id="2", pid_namespace="pid:[2]")
    assert server.elsewhere == ""
    there.become(boot_id="2", machine_id="2")
    assert server.elsewhere == there.machine["host"]


def test_a_server_made_before_there_was_a_record_is_taken_over(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db(data_dir, "up") == EXIT_OK
    url = capsys.readouterr().out.strip()
    create_database(url)
    server = embedded.Server(data_dir / "postgres")
    (server.directory / "server.json").unlink()
    port = make_url(url).port
    server.password_file.write_text(f"127.0.0.1:{port}:*:sweeper:{password_in(data_dir)}\n")
    assert db(data_dir, "up") == EXIT_OK, "it runs"
    assert db(data_dir, "down") == EXIT_OK
    capsys.readouterr()
    assert db(data_dir, "up", "--host", "localhost") == EXIT_OK
    moved = capsys.readouterr().out.strip()
    assert moved == url.replace("127.0.0.1", "localhost")
    assert stat.S_IMODE(server.password_file.stat().st_mode) == 0o600
    Store(moved).close()


def test_a_server_that_runs_and_does_not_answer_is_not_started_again(
    data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = embedded.Server(data_dir / "postgres")
    server.data.mkdir(parents=True)
    (server.data / "PG_VERSION").write_text("18\n")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        server._record(embedded.Address("127.0.0.1", closed.getsockname()[1]))
    monkeypatch.setattr(embedded, "_START_WAIT_S", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(embedded.Server, "is_up", True)
        assert db(data_dir, "up") == EXIT_CONFIG
    assert "runs, but takes no connections at 127.0.0.1, port" in capsys.readouterr().err
    assert sorted(os.listdir(server.data)) == ["PG_VERSION"], "its settings are not touched"


# --- where it listens --------------------------------------------------------------------------


def test_it_moves_when_it_is_told_to_and_is_stopped(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = data_dir / "a b&c%20d?#x"

    def up(*arguments: str) -> Said:
        code = cli.main(["db", "up", "--dir", str(place), *arguments])
        return Said(code, *capsys.readouterr())

    server = embedded.Server(place)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = str(busy.getsockname()[1])
        refused = up("--port", taken)
        assert refused.code == EXIT_CONFIG
        assert f"port {taken} of 127.0.0.1 is in use. Name another with --port." in refused.err
        try:
            said = up()
            assert said.code == EXIT_OK, "a port that was refused is not remembered"
            url = said.out.strip()
            assert up("--port", taken).err.count("runs already, at 127.0.0.1, port") == 1
            create_database(url)
            server.down()
            assert up("--port", taken).code == EXIT_CONFIG
        finally:
            server.down()
    try:
        moved = up("--port", taken, "--host", "localhost")
        assert moved.out.strip() == url.replace(str(make_url(url).port), taken).replace(
            "127.0.0.1", "localhost"
        )
        Store(moved.out.strip()).close()
        assert up().out == moved.out
        assert (server.data / "postgresql.conf").read_text().count("\nlisten_addresses = ") == 1
    finally:
        server.down()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--port", "99999"), "--port 99999 cannot be used. Use a number from 1024 to 65535."),
        (("--port", "-1"), "--port -1 cannot be used"),
        (("--port", "80"), "--port 80 cannot be used"),
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is no address that clients can connect to"),
        (("--host", "::"), "--host :: is no address that clients can connect to"),
        (("--host", "127.0.0.1' x"), "is no address"),
        (("--host", "no-such-host.invalid"), "cannot listen on no-such-host.invalid"),
    ],
)
def test_where_it_cannot_listen_is_said_before_anything_is_made(
    data_dir: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert db(data_dir, "up", *arguments) == EXIT_CONFIG
    assert says in capsys.readouterr().err
    assert os.listdir(data_dir / "postgres") == ["lock"]


def test_its_url_is_one(tmp_path: Path) -> None:
    place = tmp_path / "a b&c%20d?#+x"
    place.mkdir()
    server = embedded.Server(place)
    server._record(embedded.Address("::1", 5555))
    url = make_url(server.url)
    assert (url.host, url.port, url.query["passfile"]) == ("::1", 5555, str(place / "pgpass"))
    libpq = psycopg.conninfo.conninfo_to_dict(server.url)
    assert (libpq["host"], libpq["passfile"]) == ("::1", str(place / "pgpass"))


# --- other people's directories ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.tex", "data/pg_hba.conf", "data.new/PG_VERSION"])
def test_a_directory_that_holds_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    tmp_path.chmod(0o750)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["db", "up", "--dir", str(tmp_path)]) == EXIT_CONFIG
    assert "it holds something else" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == "mine"
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_a_server_of_somebody_elses_is_not_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("18\n")
    monkeypatch.setattr(embedded.Server, "_run", lambda *_, **__: pytest.fail("nothing is run on it"))
    assert cli.main(["db", "down", "--dir", str(tmp_path)]) == EXIT_OK
    assert "did not run" in capsys.readouterr().err
    assert cli.main(["db", "status", "--dir", str(tmp_path)]) == EXIT_CONFIG


def test_a_data_directory_that_is_not_postgresqls_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = embedded.Server(tmp_path)
    server._record(embedded.Address("127.0.0.1", 5555))
    server.data.mkdir()
    assert cli.main(["db", "up", "--dir", str(tmp_path)]) == EXIT_CONFIG
    assert "it has no PG_VERSION" in capsys.readouterr().err
    assert os.listdir(server.data) == []
