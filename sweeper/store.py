"""The database: one method is one transaction, and this is the one door for all SQL that writes.

SQLite: every transaction begins IMMEDIATE (it ignores row locks, and a deferred one fails when
it wants to write), WAL, synchronous=FULL. No file, network or user code inside a transaction.

Optuna's own rows are written here too: slot, trial and run are one transaction, and so are the
final state and the tell. What that leans on is checked when the database is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, Row, make_url

from sweeper import clock, processes, rundir, schema
from sweeper.errors import ConfigError, Fenced, NotFound, StorageError, SweeperError
from sweeper.records import (
    Claim,
    Ending,
    Lease,
    NewSweep,
    ParamValue,
    ProcessId,
    Proposal,
    Run,
    Suspect,
    Sweep,
)
from sweeper.recovery import MAX_BACK_OFF_S
from sweeper.states import INCOMPLETE, OPTUNA_STATE, SETTLES, Event, Outcome, State, source, target

BUSY_TIMEOUT_S = 20.0
_ALLOWS_NETWORK = "allow_network_file_system"
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "afs",
        "9p",
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.gcsfuse",
    ]
)
_OURS = {Outcome.LOST: "lost_count", Outcome.CRASHED: "crashed_count", Outcome.OOM: "oom_count"}


# --- engines -------------------------------------------------------------------------------


def database_path(url: str) -> Path | None:
    """The file of an SQLite URL; None for a server."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return None
    if not parsed.database or parsed.database == ":memory:":
        raise ConfigError(
            f"storage.url={url} has no file",
            do="A sweep that survives needs one, e.g. sqlite:///outputs/sweeper.db",
        )
    return Path(parsed.database)


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, from the text of /proc/self/mounts."""
    best, kind = "", ""
    real = os.path.realpath(path)
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        where = fields[1].encode().decode("unicode_escape")
        inside = real == where or real.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, fields[2]
    return kind


def refuse_network_file_system(path: Path, *, mounts: str | None = None) -> None:
    """Raise StorageError when `path` would put an SQLite file on a network file system."""
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    kind = file_system_of(path.parent, text)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StorageError(
            f"the database file {path} would lie on a network file system ({kind})",
            why="SQLite's locks are not reliable there, and a lost lock loses runs",
            do="Put it on a local disk with storage.url=sqlite:////local/dir/sweeper.db (run directories may stay "
            "where they are), use PostgreSQL, or set storage.allow_network_file_system=true if you know better.",
        )


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """Open an SQLite file the way all of ours are opened, Optuna's engine included."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()
    return connection


def make_engine(url: str) -> Engine:
    """An engine whose transactions take the write lock at once on SQLite."""
    path = database_path(url)
    if path is None:
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, creator=lambda: connect_sqlite(path))

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("sweeper_reads", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    shown = make_url(url).render_as_string(hide_password=True)
    try:
        yield
    except (exc.OperationalError, exc.DatabaseError, sqlite3.Error) as error:
        raise _explain(shown, str(getattr(error, "orig", None) or error)) from error


def _explain(shown: str, why: str) -> StorageError:
    if "locked" in why:
        do = "Another process holds its write lock; find it (e.g. with `fuser`), or wait, and run the same command again."
    elif "not a database" in why or "malformed" in why:
        do = "Name another file with storage.url=, or move this one away and run `sweeper rebuild DATA_DIR`."
    elif "readonly" in why or "read-only" in why or "unable to open" in why:
        do = "Make the file and its directory writable, or name another with storage.url=."
    elif "full" in why:
        do = "Free some space; nothing is lost, run the same command again."
    else:
        do = "Nothing is lost on disk; run the same command again once the database answers."
    return StorageError(f"the database {shown} cannot be used", why=why, do=do)


# --- creating and checking -----------------------------------------------------------------


def create_database(url: str, *, allow_network_file_system: bool = False) -> None:
    """Create file and schema, once, under a file lock; does nothing where it exists.

    Raises:
        StorageError: It cannot be created, or what is there is not ours to use.
    """
    path = database_path(url)
    if path is None:
        with _explained(url):
            _create_schema(url, None)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not allow_network_file_system:
            refuse_network_file_system(path)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _explained(url):
                _create_schema(url, path)
                if allow_network_file_system:
                    _record_permission(url)
    except OSError as error:
        raise StorageError(
            f"the database {path} cannot be created",
            why=error.strerror or str(error),
            do="Name another place with data_dir= or storage.url=.",
        ) from error


def _create_schema(url: str, path: Path | None) -> None:
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            names = set(sa.inspect(connection).get_table_names())
            optuna_made = _revision(connection, "alembic_version", names)
        if not optuna_made:  # written last, and not in one transaction with the tables
            _create_optuna_tables(url, path)
        if schema.VERSION_TABLE not in names:
            with engine.begin() as connection:
                schema.metadata.create_all(connection)
                for statement in schema.OPTUNA_INDEXES:
                    connection.exec_driver_sql(statement)
                _stamp(connection)
    finally:
        engine.dispose()


def upgrade_schema(url: str) -> tuple[str, str]:
    """Run the migrations that are missing; returns the revision before and after.

    Raises:
        StorageError: There is no such database, or it is newer than this code.
    """
    from alembic import command
    from alembic.config import Config

    path = database_path(url)
    if path is not None and not path.exists():
        raise StorageError(f"there is no database at {path}", do="`sweeper launch` creates one.")
    engine = make_engine(url)
    with _explained(url), engine.connect() as connection:
        names = set(sa.inspect(connection).get_table_names())
        if schema.VERSION_TABLE not in names:
            raise StorageError(
                f"the database {url.rpartition('@')[2]} is not one of sweeper's",
                do="`sweeper launch` creates one.",
            )
        before = _revision(connection, schema.VERSION_TABLE, names)
    if before > schema.HEAD:
        raise StorageError(
            f"the database has schema {before}, newer than this sweeper ({schema.HEAD})",
            do="Install the newer sweeper.",
        )
    config = Config()
    config.set_main_option("script_location", "sweeper:migrations")
    with _explained(url), engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()
    return before, schema.HEAD


def _revision(connection: Connection, table: str, names: Set[str]) -> str:
    """What a version table says; empty when it is not there or says nothing yet."""
    if table not in names:
        return ""
    return str(connection.exec_driver_sql(f"SELECT version_num FROM {table}").scalar_one_or_none() or "")


def _record_permission(url: str) -> None:
    """Remember that the user wants the file where it is, for every worker that opens it."""
    engine = make_engine(url)
    with engine.begin() as connection:
        _execute(
            connection,
            "INSERT INTO sweeper_meta VALUES (:k, '1') ON CONFLICT (key) DO NOTHING",
            k=_ALLOWS_NETWORK,
        )
    engine.dispose()


def _stamp(connection: Connection) -> None:
    connection.exec_driver_sql(
        f"CREATE TABLE {schema.VERSION_TABLE} (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
    )
    connection.exec_driver_sql(f"INSERT INTO {schema.VERSION_TABLE} VALUES ('{schema.HEAD}')")
    for key, value in _machine().items():
        connection.execute(sa.text("INSERT INTO sweeper_meta VALUES (:k, :v)"), {"k": key, "v": value})


def _machine() -> dict[str, str]:
    return {"machine_id": processes.machine_id(), "boot_id": processes.boot_id()}


def _create_optuna_tables(url: str, path: Path | None) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {"creator": lambda: connect_sqlite(path)} if path else {}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
    storage.remove_session()
    storage.engine.dispose()


# --- the store -----------------------------------------------------------------------------


class Store:
    """An open database. Not for several threads at once.

    Raises (every method): StorageError when the database cannot be used; methods that write
    under a Lease, and `check`, raise Fenced when it is lost.
    """

    def __init__(self, url: str, *, ttl_s: float = 60.0, allow_network_file_system: bool = False) -> None:
        self.url = url
        self.ttl_s = ttl_s
        self._path = database_path(url)
        if self._path is not None and not self._path.exists():
            raise StorageError(
                f"there is no database at {self._path}",
                do="Start a sweep with `python -m sweeper launch +sweep=simple`, name the right one with --storage "
                "or --data-dir, or make it anew from run directories with `sweeper rebuild DATA_DIR`.",
            )
        self._allows_network = allow_network_file_system
        self._engine = make_engine(url)
        self._file = self._file_id()
        with _explained(url):
            self._check_versions()

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with _explained(self.url), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that takes no write lock."""
        with _explained(self.url), self._engine.connect() as connection:
            reading = connection.execution_options(sweeper_reads=True)
            with reading.begin():
                yield reading

    def _file_id(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def check_file(self) -> None:
        """Raise StorageError when the database file is no longer the one at its path."""
        if self._file_id() != self._file:
            raise StorageError(
                f"the database file {self._path} was removed or replaced while in use",
                do="The run directories hold everything: `sweeper rebuild DATA_DIR`, then launch again.",
            )

    def _check_versions(self) -> None:
        with self._engine.connect() as connection:
            names = set(sa.inspect(connection).get_table_names())
            ours = _revision(connection, schema.VERSION_TABLE, names)
            optuna = _revision(connection, "alembic_version", names)
            if not ours or not optuna:
                raise StorageError(
                    f"the database {self._shown()} is not one of sweeper's, or only half created",
                    do="Run `python -m sweeper launch …` or `sweeper rebuild DATA_DIR` to create it.",
                )
            recorded = dict(map(tuple, connection.exec_driver_sql("SELECT key, value FROM sweeper_meta")))
        if ours != schema.HEAD:
            newer = ours > schema.HEAD
            raise StorageError(
                f"the database {self._shown()} has schema {ours}, this sweeper has {schema.HEAD}",
                do="Install the newer sweeper." if newer else "Run `sweeper db upgrade`.",
            )
        if optuna != schema.OPTUNA_REVISION:
            raise StorageError(
                f"the database {self._shown()} has Optuna's tables in revision {optuna}, not {schema.OPTUNA_REVISION}",
                do="Use the Optuna version range that sweeper requires (optuna>=5,<6).",
            )
        if self._path is not None:
            if not (self._allows_network or _ALLOWS_NETWORK in recorded):
                refuse_network_file_system(self._path)
            self._check_machine(recorded)

    def _check_machine(self, recorded: Mapping[str, str]) -> None:
        here = _machine()
        if recorded.get("boot_id") == here["boot_id"]:
            return
        if recorded.get("machine_id") != here["machine_id"]:
            raise StorageError(
                f"the SQLite database {self._path} belongs to another machine",
                why="SQLite is for the workers of one machine",
                do="Use PostgreSQL for several machines (storage.url=postgresql://…); if you moved the file here for good, "
                "run `sweeper rebuild DATA_DIR` into a new one.",
            )
        with self._transaction() as connection:
            _execute(connection, "UPDATE sweeper_meta SET value=:v WHERE key='boot_id'", v=here["boot_id"])

    def _shown(self) -> str:
        return make_url(self.url).render_as_string(hide_password=True)

    # --- sweeps ----------------------------------------------------------------------------

    def find_sweep(self, name: str) -> Sweep | None:
        """The sweep of that name, or None."""
        with self._reading() as connection:
            row = _execute(connection, "SELECT * FROM sweeper_sweep WHERE name=:n", n=name).one_or_none()
        return _sweep(row) if row else None

    def sweep(self, name: str) -> Sweep:
        """The sweep of that name. Raises NotFound."""
        found = self.find_sweep(name)
        if found is None:
            raise NotFound(
                f"there is no sweep {name!r} in {self._shown()}", do="`sweeper list` shows what is there."
            )
        return found

    def create_sweep(self, new: NewSweep) -> bool:
        """Create sweep, Optuna study and grid in one transaction; False if the name is taken."""
        with self._transaction() as connection:
            if _execute(connection, "SELECT 1 FROM sweeper_sweep WHERE name=:n", n=new.name).first():
                return False
            _insert_sweep(connection, new)
        return True

    def update_sweep(self, name: str, *, n_trials: int, config: dict[str, Any]) -> None:
        """A launch of an existing sweep: new total, new launch configuration, no longer cancelled."""
        with self._transaction() as connection:
            _execute(
                connection,
                "UPDATE sweeper_sweep SET n_trials=:n, config=:config, is_cancelled=:false WHERE name=:name",
                n=n_trials, config=json.dumps(config), false=False, name=name,
            )  # fmt: skip

    def cancel_sweep(self, name: str) -> None:
        """No worker draws another trial of this sweep."""
        with self._transaction() as connection:
            _execute(connection, "UPDATE sweeper_sweep SET is_cancelled=:t WHERE name=:n", t=True, n=name)

    def count_left(self, sweep_id: int) -> tuple[int, int]:
        """(trials that may still be drawn, runs that are incomplete)."""
        with self._reading() as connection:
            total, cancelled = _execute(
                connection, "SELECT n_trials, is_cancelled FROM sweeper_sweep WHERE sweep_id=:s", s=sweep_id
            ).one()
            drawn = _count_drawn(connection, sweep_id)
            incomplete = _execute(
                connection,
                f"SELECT count(*) FROM sweeper_run WHERE sweep_id=:s AND state IN ({_list(INCOMPLETE)})",
                s=sweep_id,
            ).scalar_one()
        return (0 if cancelled else max(0, total - drawn)), incomplete

    # --- drawing ---------------------------------------------------------------------------

    def adopt_orphans(self, sweep_id: int) -> int:
        """Put RUNNING trials of the study that no run stands behind back in the queue."""
        with self._transaction() as connection:
            adopted: int = _execute(
                connection,
                "UPDATE trials SET state='WAITING' WHERE state='RUNNING' AND study_id="
                "(SELECT study_id FROM sweeper_sweep WHERE sweep_id=:s) AND NOT EXISTS "
                "(SELECT 1 FROM sweeper_run WHERE sweeper_run.trial_id=trials.trial_id)",
                s=sweep_id,
            ).rowcount
        return adopted

    def queue(self, study_id: int) -> tuple[TrialRow | None, int]:
        """(the trial that waits in the study to be drawn first: a retry, a grid point; the next free number)."""
        with self._reading() as connection:
            first = _first_waiting(connection, study_id)
            number = _next_trial(connection, study_id)
        return (None if first is None else self.trials(study_id, after=number, numbers=[first])[0]), number

    def draw(
        self, sweep: Sweep, proposal: Proposal, *, owner: ProcessId, worker: str, threads: int
    ) -> Claim | None:
        """Take a slot of the sweep, its trial and a new run in one transaction.

        Returns:
            The claim on the new run; None when the slots are taken or the proposal is stale
            (look at `count_left`, then propose again).
        """
        now = clock.wall_s()
        with self._transaction() as connection:
            total, cancelled = _execute(
                connection,
                "SELECT n_trials, is_cancelled FROM sweeper_sweep WHERE sweep_id=:s",
                s=sweep.sweep_id,
            ).one()
            if cancelled or _count_drawn(connection, sweep.sweep_id) >= total:
                return None
            trial_id = _take_trial(connection, sweep.study_id, proposal)
            if trial_id is None:
                return None
            number = _reserve_number(connection, sweep.sweep_id)
            run = _new_run(sweep, number, trial_id=trial_id, proposal=proposal, threads=threads)
            lease = Lease(run.run_id, run.lease_epoch, secrets.token_hex(8))
            _insert_run(connection, run, lease, owner=owner, worker=worker, now=now, until=now + self.ttl_s)
            _insert_attempt(connection, run.run_id, 1, run.lease_epoch, owner, now)
        return Claim(run, lease, is_new=True, reason="drawn")

    # --- claiming --------------------------------------------------------------------------

    def claim(
        self,
        sweep_id: int,
        *,
        owner: ProcessId,
        worker: str,
        run_id: str | None = None,
        is_patient: bool = True,
    ) -> Claim | None:
        """Become the owner of one interrupted run: one's own first, then the furthest along.

        Args:
            run_id: Only this one.
            is_patient: Leave runs alone that are backing off.
        """
        only = "AND run_id=:only" if run_id else ""
        # HAZARD: wall clocks are set back; nobody backs off for longer than the longest back-off.
        waited = "AND (not_before<=:now OR not_before>:latest)"
        select = (
            f"SELECT run_id FROM sweeper_run WHERE sweep_id=:s AND state='{source(Event.CLAIM)}' {waited if is_patient else ''} {only} "
            "ORDER BY CASE WHEN worker=:worker THEN 0 ELSE 1 END, "
            "1.0 * COALESCE(checkpoint_step, 0) / COALESCE(NULLIF(total_steps, 0), 1) DESC, number LIMIT 1"
        )
        if self._path is None:
            select += " FOR UPDATE SKIP LOCKED"
        return self._own(
            f"run_id=({select}) AND state='{source(Event.CLAIM)}'",
            {"s": sweep_id, "only": run_id, "latest": clock.wall_s() + MAX_BACK_OFF_S},
            owner=owner, worker=worker, reason="it was interrupted",
        )  # fmt: skip

    def take_over(
        self, suspect: Suspect, *, owner: ProcessId, worker: str, reason: str, outcome: Outcome = Outcome.LOST
    ) -> Claim | None:
        """Become the owner of a run whose lease is over; None when it moved in the meantime."""
        return self._own(
            f"run_id=:run AND state='{source(Event.TAKE_OVER)}' AND lease_epoch=:epoch AND heartbeat=:beat",
            {"run": suspect.run_id, "epoch": suspect.lease_epoch, "beat": suspect.heartbeat},
            owner=owner, worker=worker, reason=reason, ended=(suspect.lease_epoch, Ending(outcome, reason)), previous=(suspect.owner, *suspect.processes),
        )  # fmt: skip

    def _own(
        self,
        where: str,
        params: dict[str, Any],
        *,
        owner: ProcessId,
        worker: str,
        reason: str,
        ended: tuple[int, Ending] | None = None,
        previous: tuple[ProcessId, ...] = (),
    ) -> Claim | None:
        now = clock.wall_s()
        token = secrets.token_hex(8)
        with self._transaction() as connection:
            row = _execute(
                connection,
                f"UPDATE sweeper_run SET state='{State.RUNNING}', lease_epoch=lease_epoch+1, attempts=attempts+1, owner_token=:token, "
                "owner=:owner, processes=NULL, worker=:worker, heartbeat=heartbeat+1, lease_until=:until, updated_at=:now "
                f"WHERE {where} RETURNING *",
                token=token, owner=_dump(owner), worker=worker, until=now + self.ttl_s, now=now, **params,
            ).one_or_none()  # fmt: skip
            if row is None:
                return None
            run = _run(row)
            if ended is not None:
                _end_attempt(connection, run.run_id, *ended, now=now, step=run.global_step)
                run = _run(
                    _execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run.run_id).one()
                )
            _insert_attempt(connection, run.run_id, run.attempts, run.lease_epoch, owner, now)
        return Claim(
            run, Lease(run.run_id, run.lease_epoch, token), is_new=False, reason=reason, previous=previous
        )

    def suspects(self, sweep_id: int) -> list[Suspect]:
        """All running runs of a sweep, for an observer to watch."""
        with self._reading() as connection:
            rows = _execute(
                connection,
                f"SELECT * FROM sweeper_run WHERE sweep_id=:s AND state='{State.RUNNING}' ORDER BY number",
                s=sweep_id,
            ).all()
        return [
            Suspect(r.run_id, r.lease_epoch, r.heartbeat, r.lease_until, r.lost_count, _load(r.owner), tuple(map(_process, json.loads(r.processes or "[]"))))
            for r in rows
        ]  # fmt: skip

    def now_s(self) -> float:
        """The database's clock, Unix seconds; this machine's on SQLite, which has none."""
        if self._path is not None:
            return clock.wall_s()
        with self._reading() as connection:
            return float(_execute(connection, "SELECT extract(epoch FROM clock_timestamp())").scalar_one())

    def raise_epoch(self, lease: Lease, *, above: int) -> Lease:
        """Lift the lease's epoch above one found on disk, so that no number is handed out twice."""
        with self._transaction() as connection:
            self._guarded(connection, lease, "lease_epoch=:epoch_after", epoch_after=above + 1)
            _execute(
                connection,
                "UPDATE sweeper_attempt SET lease_epoch=:after WHERE run_id=:r AND lease_epoch=:before",
                after=above + 1, r=lease.run_id, before=lease.lease_epoch,
            )  # fmt: skip
        return Lease(lease.run_id, above + 1, lease.owner_token)

    # --- while owning ----------------------------------------------------------------------

    def _guarded(
        self,
        connection: Connection,
        lease: Lease,
        assignments: str,
        *,
        state: State = State.RUNNING,
        **params: Any,
    ) -> None:
        """UPDATE the run if and only if the lease still holds. Raises Fenced."""
        done = _execute(
            connection,
            f"UPDATE sweeper_run SET {assignments}, updated_at=:now WHERE run_id=:run AND lease_epoch=:epoch AND owner_token=:token AND state=:state",
            now=clock.wall_s(), run=lease.run_id, epoch=lease.lease_epoch, token=lease.owner_token, state=str(state), **params,
        )  # fmt: skip
        if done.rowcount != 1:
            raise _lost(lease)

    def renew(self, lease: Lease, *, global_step: int | None = None) -> None:
        """Heartbeat: the lease holds for another `ttl_s`. Checks that the file is still ours."""
        self.check_file()
        with self._transaction() as connection:
            self._guarded(
                connection, lease,
                "heartbeat=heartbeat+1, lease_until=:until, global_step=COALESCE(:step, global_step)",
                until=clock.wall_s() + self.ttl_s, step=global_step,
            )  # fmt: skip

    def check(self, lease: Lease) -> None:
        """Raise Fenced unless the lease holds at this moment."""
        with self._reading() as connection:
            held = _execute(
                connection,
                "SELECT 1 FROM sweeper_run WHERE run_id=:r AND lease_epoch=:e AND owner_token=:t AND state=:s",
                r=lease.run_id, e=lease.lease_epoch, t=lease.owner_token, s=str(State.RUNNING),
            ).first()  # fmt: skip
        if not held:
            raise _lost(lease)

    def record_processes(self, lease: Lease, trainers: Sequence[ProcessId]) -> None:
        """Remember the processes of this attempt, so that a takeover can end what is left of them."""
        with self._transaction() as connection:
            self._guarded(connection, lease, "processes=:p", p=json.dumps([asdict(p) for p in trainers]))

    def record_start(self, lease: Lease, *, step: int, total_steps: int | None) -> None:
        """The trainer starts from `step`: from now on this epoch's lineage is known."""
        with self._transaction() as connection:
            self._guarded(
                connection,
                lease,
                "global_step=:step, total_steps=COALESCE(:total, total_steps)",
                step=step,
                total=total_steps,
            )
            _execute(
                connection,
                "UPDATE sweeper_attempt SET start_step=:step WHERE run_id=:r AND lease_epoch=:e",
                step=step, r=lease.run_id, e=lease.lease_epoch,
            )  # fmt: skip

    def record_checkpoint(self, lease: Lease, *, step: int) -> None:
        """A checkpoint is durable on disk under this lease: budgets start anew."""
        with self._transaction() as connection:
            self._guarded(
                connection, lease,
                "checkpoint_step=:step, global_step=:step, lost_count=0, crashed_count=0, oom_count=0", step=step,
            )  # fmt: skip
            _execute(
                connection,
                "UPDATE sweeper_attempt SET checkpoint_step=:step WHERE run_id=:r AND lease_epoch=:e",
                step=step, r=lease.run_id, e=lease.lease_epoch,
            )  # fmt: skip

    def starts(self, run_id: str) -> list[tuple[int, int]]:
        """(lease_epoch, start step) of every attempt that said where it started: the lineage."""
        with self._reading() as connection:
            rows = _execute(
                connection,
                "SELECT lease_epoch, start_step FROM sweeper_attempt WHERE run_id=:r AND start_step IS NOT NULL ORDER BY lease_epoch",
                r=run_id,
            ).all()
        return [(row[0], row[1]) for row in rows]

    def verdict(self, trial_id: int, step: int) -> bool | None:
        """The stored answer to a report of this step, or None if it was never reported."""
        with self._reading() as connection:
            found = _execute(
                connection,
                "SELECT prune FROM sweeper_verdict WHERE trial_id=:t AND step=:s",
                t=trial_id,
                s=step,
            ).scalar_one_or_none()
        return None if found is None else bool(found)

    def report(
        self, lease: Lease, run: Run, *, step: int, value: float, prune: bool, system_attrs: Mapping[str, Any]
    ) -> None:
        """Store an intermediate value with the pruner's verdict and what the pruner wrote down."""
        with self._transaction() as connection:
            self._guarded(connection, lease, "global_step=:step", step=step)
            _insert_report(connection, run.trial_id, step=step, value=value, prune=prune)
            _insert_attrs(connection, run.trial_id, system_attrs)

    # --- ending an attempt -----------------------------------------------------------------

    def release(self, lease: Lease, ending: Ending, *, not_before: float = 0.0) -> None:
        """The attempt is over, the run is not: any claimer may go on with it."""
        now = clock.wall_s()
        with self._transaction() as connection:
            self._guarded(
                connection, lease, "state=:after, owner_token=NULL, lease_until=NULL, processes=NULL, not_before=:nb",
                after=str(target(Event.RELEASE)), nb=not_before,
            )  # fmt: skip
            _end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)

    def budget_after(self, lease: Lease, outcome: Outcome) -> int:
        """How many consecutive attempts without a newer checkpoint end so, this one included.

        A read: with a lost lease it says nothing, and what is decided from it raises Fenced.
        """
        column = _OURS.get(outcome)
        if column is None:
            return 0
        with self._reading() as connection:
            count, committed = _execute(
                connection,
                f"SELECT r.{column}, a.checkpoint_step FROM sweeper_run r JOIN sweeper_attempt a "
                "ON a.run_id=r.run_id AND a.lease_epoch=r.lease_epoch WHERE r.run_id=:r",
                r=lease.run_id,
            ).one()
        return int(count) + (committed is None)

    def settle(self, lease: Lease, state: State, ending: Ending) -> None:
        """Final state, attempt and tell in one transaction. result.json must be durable already.

        Raises:
            ValueError: A completed run without a number, which Optuna could not read.
        """
        if state is State.COMPLETED and (ending.value is None or ending.value != ending.value):
            raise ValueError(f"run {lease.run_id} cannot be completed without a number: {ending.value}")
        now = clock.wall_s()
        event_ = SETTLES[state]
        with self._transaction() as connection:
            self._guarded(
                connection, lease,
                "state=:after, value=:value, owner_token=NULL, lease_until=NULL, processes=NULL",
                state=source(event_), after=str(target(event_)), value=_finite(ending.value),
            )  # fmt: skip
            _end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)
            trial_id = _execute(
                connection, "SELECT trial_id FROM sweeper_run WHERE run_id=:r", r=lease.run_id
            ).scalar_one()
            _tell(connection, trial_id, state, ending.value, now)

    # --- superseding -----------------------------------------------------------------------

    def reserve_number(self, sweep_id: int) -> int:
        """A run number nobody else gets; gaps are allowed."""
        with self._transaction() as connection:
            return _reserve_number(connection, sweep_id)

    def supersede(self, lease: Lease, ending: Ending, fresh: Run, *, owner: ProcessId, worker: str) -> Claim:
        """Old run superseded, fresh one running, in one transaction."""
        now = clock.wall_s()
        new_lease = Lease(fresh.run_id, fresh.lease_epoch, secrets.token_hex(8))
        with self._transaction() as connection:
            self._guarded(
                connection, lease, "state=:after, owner_token=NULL, lease_until=NULL, processes=NULL",
                after=str(target(Event.SUPERSEDE)),
            )  # fmt: skip
            _end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)
            _insert_run(
                connection, fresh, new_lease, owner=owner, worker=worker, now=now, until=now + self.ttl_s
            )
            _insert_attempt(connection, fresh.run_id, 1, fresh.lease_epoch, owner, now)
        return Claim(fresh, new_lease, is_new=True, reason=f"replaces {lease.run_id}")

    # --- retry, cancel, look up ------------------------------------------------------------

    def run(self, run_id: str) -> Run:
        """One run. Raises NotFound."""
        with self._reading() as connection:
            row = _execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run_id).one_or_none()
        if row is None:
            raise NotFound(
                f"there is no run {run_id!r} in {self._shown()}", do="`sweeper list` shows what is there."
            )
        return _run(row)

    def runs(self, sweep_id: int, states: Sequence[State] = tuple(State)) -> list[Run]:
        """The runs of a sweep in one of `states`, by number."""
        with self._reading() as connection:
            rows = _execute(
                connection,
                f"SELECT * FROM sweeper_run WHERE sweep_id=:s AND state IN ({_list(states)}) ORDER BY number",
                s=sweep_id,
            ).all()
        return [_run(row) for row in rows]

    def retry(self, run_id: str) -> int:
        """Queue a new trial with the parameters of a failed or cancelled run; returns its number.

        Raises:
            SweeperError: The run is not failed or cancelled, or was retried before.
        """
        with self._transaction() as connection:
            row = _execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run_id).one_or_none()
            if row is None:
                raise NotFound(f"there is no run {run_id!r}", do="`sweeper list` shows what is there.")
            if row.state not in (State.FAILED, State.CANCELLED) or row.is_retried:
                why = "it was retried before" if row.is_retried else f"it is {row.state}"
                raise SweeperError(
                    f"run {run_id} cannot be retried", why=why, do="Only a failed or cancelled run can, once."
                )
            _execute(connection, "UPDATE sweeper_run SET is_retried=:t WHERE run_id=:r", t=True, r=run_id)
            study_id = _execute(
                connection, "SELECT study_id FROM trials WHERE trial_id=:t", t=row.trial_id
            ).scalar_one()
            number = _next_trial(connection, study_id)
            again = Proposal(
                number,
                json.loads(row.params),
                _params_of(connection, row.trial_id),
                system_attrs={"sweeper:retry_of": run_id},
            )
            _insert_trial(connection, study_id, number, "WAITING", again)
        return number

    def restore(self, restored: Restored) -> None:
        """Write a rebuilt sweep in one transaction."""
        now = clock.wall_s()
        with self._transaction() as connection:
            sweep_id, study_id = _insert_sweep(connection, restored.new)
            deciding = {run.trial: run for run in restored.runs if run.state is not State.SUPERSEDED}
            ids = {
                trial.number: _restore_trial(
                    connection, study_id, trial, deciding.get(trial.number), restored, now
                )
                for trial in restored.trials
            }
            for run in restored.runs:
                known = replace(run, sweep_id=sweep_id, trial_id=ids[run.trial])
                _restore_run(connection, known, restored, now)
            _execute(
                connection,
                "UPDATE sweeper_sweep SET next_run=:n WHERE sweep_id=:s", n=restored.next_run, s=sweep_id,
            )  # fmt: skip

    # --- Optuna's view ---------------------------------------------------------------------

    def trials(self, study_id: int, *, after: int = -1, numbers: Sequence[int] = ()) -> list[TrialRow]:
        """Trials of a study with number > `after` or in `numbers`, by number: four joined queries."""
        chosen = (
            "(number > :after"
            + (f" OR number IN ({', '.join(str(int(n)) for n in numbers)})" if numbers else "")
            + ")"
        )
        with self._reading() as connection:
            query = f"FROM trials t LEFT JOIN %s x ON x.trial_id=t.trial_id WHERE t.study_id=:s AND {chosen}"
            heads = _execute(
                connection,
                "SELECT t.trial_id, t.number, t.state, t.datetime_start, t.datetime_complete, x.value, x.value_type " + query % "trial_values",
                s=study_id, after=after,
            ).all()  # fmt: skip
            params = _execute(
                connection, "SELECT t.number, x.param_name, x.param_value, x.distribution_json " + (query % "trial_params").replace("LEFT ", ""),
                s=study_id, after=after,
            ).all()  # fmt: skip
            middle = _execute(
                connection,
                "SELECT t.number, x.step, x.intermediate_value, x.intermediate_value_type "
                + (query % "trial_intermediate_values").replace("LEFT ", ""),
                s=study_id, after=after,
            ).all()  # fmt: skip
            attrs = _execute(
                connection, 'SELECT t.number, x."key", x.value_json ' + (query % "trial_system_attributes").replace("LEFT ", ""),
                s=study_id, after=after,
            ).all()  # fmt: skip
        return _trial_rows(heads, params, middle, attrs)


@dataclass(frozen=True, slots=True)
class Restored:
    """A sweep read back from run directories.

    Attributes:
        trials: Every number from 0 on; one without a run waits to be drawn.
        next_run: Above the number of every directory there is, damaged ones included.
        values, reasons, outcomes: By run id, from result.json.
        starts: By run id, (lease_epoch, start step) of its attempts, from the manifests.
        reports: By trial number, step → reported value.
        retried: Runs that a later trial retries.
    """

    new: NewSweep
    trials: Sequence[Proposal]
    runs: Sequence[Run]
    values: Mapping[str, float | None]
    reasons: Mapping[str, str]
    outcomes: Mapping[str, str | None]
    starts: Mapping[str, Sequence[tuple[int, int]]]
    reports: Mapping[int, Mapping[int, float]]
    retried: Set[str]
    next_run: int


def _restore_trial(
    connection: Connection, study_id: int, trial: Proposal, run: Run | None, restored: Restored, now: float
) -> int:
    trial_id = _insert_trial(connection, study_id, trial.number, "RUNNING" if run else "WAITING", trial)
    for step, value in restored.reports.get(trial.number, {}).items():
        _insert_report(connection, trial_id, step=step, value=value, prune=False)
    if run is not None and run.state.is_final:
        _tell(connection, trial_id, run.state, restored.values[run.run_id], now)
    return trial_id


def _restore_run(connection: Connection, run: Run, restored: Restored, now: float) -> None:
    starts, outcome = restored.starts[run.run_id], restored.outcomes.get(run.run_id)
    _execute(
        connection,
        "INSERT INTO sweeper_run (run_id, sweep_id, number, trial_id, trial, params, seed, threads, path, wandb_run_id, state, outcome, reason, value, "
        "lease_epoch, attempts, global_step, checkpoint_step, is_retried, replaces, retry_of, created_at, updated_at) VALUES "
        "(:run_id, :sweep_id, :number, :trial_id, :trial, :params, :seed, :threads, :path, :wandb_run_id, :state, :outcome, :reason, :value, "
        ":lease_epoch, :attempts, :global_step, :checkpoint_step, :is_retried, :replaces, :retry_of, :now, :now)",
        run_id=run.run_id, sweep_id=run.sweep_id, number=run.number, trial_id=run.trial_id, trial=run.trial, params=json.dumps(run.params),
        seed=run.seed, threads=run.threads, path=run.path, wandb_run_id=run.wandb_run_id, state=str(run.state),
        outcome=outcome, reason=restored.reasons.get(run.run_id), value=_finite(restored.values.get(run.run_id)), lease_epoch=run.lease_epoch,
        attempts=max(run.attempts, len(starts)), global_step=run.global_step, checkpoint_step=run.checkpoint_step,
        is_retried=run.run_id in restored.retried, replaces=run.replaces, retry_of=run.retry_of, now=now,
    )  # fmt: skip
    for number, (epoch, start) in enumerate(starts, 1):
        ended = outcome if outcome and number == len(starts) else str(Outcome.LOST)
        _execute(
            connection,
            "INSERT INTO sweeper_attempt (run_id, attempt, lease_epoch, owner, started_at, start_step, outcome, reason) "
            "VALUES (:r, :a, :e, '{}', :now, :start, :o, 'rebuilt from the run directory')",
            r=run.run_id, a=number, e=epoch, now=now, start=start, o=ended,
        )  # fmt: skip


@dataclass(slots=True)
class TrialRow:
    """One trial of an Optuna study, as its tables hold it."""

    trial_id: int
    number: int
    state: str
    started_at: Any
    completed_at: Any
    value: float | None
    params: dict[str, tuple[float, str]]
    reports: dict[int, float]
    system_attrs: dict[str, str]


def _trial_rows(
    heads: Sequence[Any], params: Sequence[Any], middle: Sequence[Any], attrs: Sequence[Any]
) -> list[TrialRow]:
    rows = {
        number: TrialRow(trial_id, number, state, started, completed, _python_value(value, kind), {}, {}, {})
        for trial_id, number, state, started, completed, value, kind in heads
    }
    for number, name, value, distribution in params:
        rows[number].params[name] = (value, distribution)
    for number, step, value, kind in middle:
        rows[number].reports[step] = _python_value(value, kind) or 0.0
    for number, key, text in attrs:
        rows[number].system_attrs[key] = text
    return [rows[number] for number in sorted(rows)]


def _lost(lease: Lease) -> Fenced:
    return Fenced(
        f"run {lease.run_id} belongs to another owner now",
        why=f"lease epoch {lease.lease_epoch} is over",
        do="Nothing more of this attempt counts; the new owner goes on from the last checkpoint.",
    )


# --- statements ----------------------------------------------------------------------------

_text = lru_cache(maxsize=500)(sa.text)  # bounded: `Store.trials` writes numbers into its text


def _execute(connection: Connection, sql: str, **params: Any) -> Any:
    if connection.dialect.name == "sqlite":  # it takes :name as it is; compiling costs more than executing
        return connection.exec_driver_sql(sql, params)
    return connection.execute(_text(sql), params)


def _list(states: Any) -> str:
    return ", ".join(f"'{State(state)}'" for state in sorted(states))


_COUNTED = _list(set(State) - {State.SUPERSEDED, State.CANCELLED})


def _count_drawn(connection: Connection, sweep_id: int) -> int:
    return int(
        _execute(
            connection,
            f"SELECT count(*) FROM sweeper_run WHERE sweep_id=:s AND state IN ({_COUNTED}) AND is_retried=:f",
            s=sweep_id, f=False,
        ).scalar_one()
    )  # fmt: skip


def _reserve_number(connection: Connection, sweep_id: int) -> int:
    after = _execute(
        connection,
        "UPDATE sweeper_sweep SET next_run=next_run+1 WHERE sweep_id=:s RETURNING next_run",
        s=sweep_id,
    ).scalar_one()
    return int(after) - 1


def _insert_sweep(connection: Connection, new: NewSweep) -> tuple[int, int]:
    """Sweep, study and grid; returns the ids of the first two."""
    study_id = _study(connection, new.name, new.direction)
    sweep_id = _execute(
        connection,
        "INSERT INTO sweeper_sweep (name, study_id, seed, n_trials, metric, direction, config, created_at, is_cancelled) "
        "VALUES (:name, :study, :seed, :n, :metric, :direction, :config, :now, :false) RETURNING sweep_id",
        name=new.name, study=study_id, seed=new.seed, n=new.n_trials, metric=new.metric,
        direction=new.direction, config=json.dumps(new.config), now=clock.wall_s(), false=False,
    ).scalar_one()  # fmt: skip
    for number, point in enumerate(new.grid):
        _insert_trial(connection, study_id, number, "WAITING", point)
    return int(sweep_id), study_id


def _study(connection: Connection, name: str, direction: str) -> int:
    if _execute(connection, "SELECT 1 FROM studies WHERE study_name=:n", n=name).first():
        raise StorageError(
            f"the database already holds an Optuna study {name!r} that is not one of sweeper's",
            do="Choose another sweep.name=.",
        )
    study_id = _execute(
        connection, "INSERT INTO studies (study_name) VALUES (:n) RETURNING study_id", n=name
    ).scalar_one()
    _execute(
        connection,
        "INSERT INTO study_directions (direction, study_id, objective) VALUES (:d, :s, 0)",
        d=direction.upper(), s=study_id,
    )  # fmt: skip
    return int(study_id)


def _next_trial(connection: Connection, study_id: int) -> int:
    last = _execute(connection, "SELECT max(number) FROM trials WHERE study_id=:s", s=study_id).scalar_one()
    return 0 if last is None else int(last) + 1


def _first_waiting(connection: Connection, study_id: int) -> int | None:
    """What somebody asked for (a retry, `enqueue_trial`) comes before points that wait from the start."""
    waiting = "FROM trials t WHERE t.study_id=:s AND t.state='WAITING'"
    asked_for = "EXISTS (SELECT 1 FROM trial_system_attributes a WHERE a.trial_id=t.trial_id)"
    first: int | None = _execute(connection, f"SELECT min(t.number) {waiting}", s=study_id).scalar_one()
    if first is None:
        return None
    # Whatever is asked for gets the largest number; a look at the last one spares a look at all.
    last = f"SELECT {asked_for} {waiting} ORDER BY t.number DESC LIMIT 1"
    if _execute(connection, last, s=study_id).scalar_one():
        first = _execute(
            connection, f"SELECT min(t.number) {waiting} AND {asked_for}", s=study_id
        ).scalar_one()
    return first


def _take_trial(connection: Connection, study_id: int, proposal: Proposal) -> int | None:
    if proposal.waiting_id is None:
        if _next_trial(connection, study_id) != proposal.number:
            return None
        return _insert_trial(connection, study_id, proposal.number, "RUNNING", proposal)
    taken = _execute(
        connection,
        "UPDATE trials SET state='RUNNING', datetime_start=:now WHERE trial_id=:t AND state='WAITING'",
        now=_optuna_time(clock.wall_s()), t=proposal.waiting_id,
    )  # fmt: skip
    if taken.rowcount != 1:
        return None
    _insert_params(connection, proposal.waiting_id, proposal.internal)
    return proposal.waiting_id


def _insert_trial(connection: Connection, study_id: int, number: int, state: str, proposal: Proposal) -> int:
    trial_id = _execute(
        connection,
        "INSERT INTO trials (number, study_id, state, datetime_start) VALUES (:n, :s, :state, :start) RETURNING trial_id",
        n=number, s=study_id, state=state, start=None if state == "WAITING" else _optuna_time(clock.wall_s()),
    ).scalar_one()  # fmt: skip
    _insert_params(connection, trial_id, proposal.internal)
    _insert_attrs(connection, trial_id, proposal.system_attrs)
    return int(trial_id)


def _insert_params(connection: Connection, trial_id: int, internal: Mapping[str, tuple[float, str]]) -> None:
    rows = [{"t": trial_id, "n": name, "v": value, "d": text} for name, (value, text) in internal.items()]
    if rows:
        connection.execute(
            _INSERT_PARAM,
            rows,
        )


_INSERT_PARAM = sa.text(
    "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) VALUES (:t, :n, :v, :d) "
    "ON CONFLICT (trial_id, param_name) DO NOTHING"
)


def _params_of(connection: Connection, trial_id: int) -> dict[str, tuple[float, str]]:
    rows = _execute(
        connection,
        "SELECT param_name, param_value, distribution_json FROM trial_params WHERE trial_id=:t",
        t=trial_id,
    ).all()
    return {name: (value, text) for name, value, text in rows}


def _insert_attrs(connection: Connection, trial_id: int, attrs: Mapping[str, Any]) -> None:
    for key, value in attrs.items():
        _execute(
            connection,
            'INSERT INTO trial_system_attributes (trial_id, "key", value_json) VALUES (:t, :k, :v) '
            'ON CONFLICT (trial_id, "key") DO UPDATE SET value_json=excluded.value_json',
            t=trial_id, k=key, v=json.dumps(value),
        )  # fmt: skip


def _insert_report(connection: Connection, trial_id: int, *, step: int, value: float, prune: bool) -> None:
    number, kind = _optuna_value(value)
    _execute(
        connection,
        "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
        "VALUES (:t, :s, :v, :k) ON CONFLICT (trial_id, step) DO NOTHING",
        t=trial_id, s=step, v=number, k=kind,
    )  # fmt: skip
    _execute(
        connection,
        "INSERT INTO sweeper_verdict (trial_id, step, value, prune) VALUES (:t, :s, :v, :p) ON CONFLICT (trial_id, step) DO NOTHING",
        t=trial_id, s=step, v=number, p=prune,
    )  # fmt: skip


def _tell(connection: Connection, trial_id: int, state: State, value: float | None, now: float) -> None:
    """A trial is told once: only one that is still RUNNING."""
    told = _execute(
        connection,
        "UPDATE trials SET state=:state, datetime_complete=:now WHERE trial_id=:t AND state='RUNNING'",
        state=OPTUNA_STATE[state], now=_optuna_time(now), t=trial_id,
    )  # fmt: skip
    is_nan = (
        value is not None and value != value
    )  # a trial pruned at NaN has no value: Optuna knows no other way
    if told.rowcount == 1 and value is not None and not is_nan and state in (State.COMPLETED, State.PRUNED):
        number, kind = _optuna_value(value)
        _execute(
            connection,
            "INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (:t, 0, :v, :k)",
            t=trial_id, v=number, k=kind,
        )  # fmt: skip


def _insert_run(
    connection: Connection, run: Run, lease: Lease, *, owner: ProcessId, worker: str, now: float, until: float
) -> None:
    connection.execute(
        schema.run.insert(),
        {
            "run_id": run.run_id,
            "sweep_id": run.sweep_id,
            "number": run.number,
            "trial_id": run.trial_id,
            "trial": run.trial,
            "params": json.dumps(run.params),
            "seed": run.seed,
            "threads": run.threads,
            "path": run.path,
            "wandb_run_id": run.wandb_run_id,
            "state": str(State.RUNNING),
            "lease_epoch": lease.lease_epoch,
            "owner_token": lease.owner_token,
            "owner": _dump(owner),
            "worker": worker,
            "heartbeat": 1,
            "lease_until": until,
            "attempts": 1,
            "lost_count": run.lost_count,
            "crashed_count": run.crashed_count,
            "oom_count": run.oom_count,
            "replaces": run.replaces,
            "retry_of": run.retry_of,
            "created_at": now,
            "updated_at": now,
        },
    )


def _insert_attempt(
    connection: Connection, run_id: str, attempt: int, epoch: int, owner: ProcessId, now: float
) -> None:
    _execute(
        connection,
        "INSERT INTO sweeper_attempt (run_id, attempt, lease_epoch, owner, started_at) VALUES (:r, :a, :e, :o, :now)",
        r=run_id, a=attempt, e=epoch, o=_dump(owner), now=now,
    )  # fmt: skip


def _end_attempt(
    connection: Connection, run_id: str, epoch: int, ending: Ending, *, now: float, step: int | None = None
) -> None:
    """Write why the attempt ended, and count it against the budget of its class."""
    _execute(
        connection,
        "UPDATE sweeper_attempt SET ended_at=:now, outcome=:o, reason=:why, detail=:detail, "
        "end_step=COALESCE(:step, (SELECT global_step FROM sweeper_run WHERE run_id=:r)) "
        "WHERE run_id=:r AND lease_epoch=:e AND outcome IS NULL",
        now=now, o=str(ending.outcome), why=ending.reason, detail=ending.detail, step=step, r=run_id, e=epoch,
    )  # fmt: skip
    column = None if ending.is_disk_fault else _OURS.get(ending.outcome)
    count = f", {column}={column}+1" if column else ""
    committed = _execute(
        connection,
        "SELECT checkpoint_step FROM sweeper_attempt WHERE run_id=:r AND lease_epoch=:e",
        r=run_id,
        e=epoch,
    ).scalar_one_or_none()
    _execute(
        connection,
        f"UPDATE sweeper_run SET outcome=:o, reason=:why{count if committed is None else ''} WHERE run_id=:r",
        o=str(ending.outcome), why=ending.reason, r=run_id,
    )  # fmt: skip


# --- rows and values -----------------------------------------------------------------------


def _new_run(sweep: Sweep, number: int, *, trial_id: int, proposal: Proposal, threads: int) -> Run:
    run_id = rundir.run_id(sweep.name, number)
    return Run(
        run_id=run_id,
        sweep_id=sweep.sweep_id,
        number=number,
        trial_id=trial_id,
        trial=proposal.number,
        params=dict(proposal.params),
        seed=sweep.run_seed(proposal.number),
        threads=threads,
        path=rundir.relative_path(sweep.name, number),
        wandb_run_id=rundir.new_wandb_id(run_id),
        state=State.RUNNING,
        lease_epoch=1,
        attempts=1,
        global_step=0,
        total_steps=None,
        checkpoint_step=None,
        retry_of=proposal.retry_of,
    )


def _sweep(row: Row[Any]) -> Sweep:
    return Sweep(
        row.sweep_id, row.name, row.study_id, row.seed, row.n_trials, row.metric, row.direction,
        json.loads(row.config), bool(row.is_cancelled),
    )  # fmt: skip


def _run(row: Row[Any]) -> Run:
    params: dict[str, ParamValue] = json.loads(row.params)
    return Run(
        run_id=row.run_id, sweep_id=row.sweep_id, number=row.number, trial_id=row.trial_id, trial=row.trial,
        params=params, seed=row.seed, threads=row.threads, path=row.path, wandb_run_id=row.wandb_run_id,
        state=State(row.state), lease_epoch=row.lease_epoch, attempts=row.attempts, global_step=row.global_step,
        total_steps=row.total_steps, checkpoint_step=row.checkpoint_step, lost_count=row.lost_count,
        crashed_count=row.crashed_count, oom_count=row.oom_count, replaces=row.replaces, retry_of=row.retry_of,
    )  # fmt: skip


def _dump(process: ProcessId) -> str:
    return json.dumps(asdict(process))


def _load(text: str) -> ProcessId:
    return _process(json.loads(text))


def _process(data: dict[str, Any]) -> ProcessId:
    return ProcessId(**data)


def _optuna_time(now: float) -> str:
    """Optuna 5 keeps naive UTC."""
    return datetime.fromtimestamp(now, UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


def _optuna_value(value: float) -> tuple[float | None, str]:
    if value != value:
        return None, "NAN"
    if value in (float("inf"), float("-inf")):
        return None, "INF_POS" if value > 0 else "INF_NEG"
    return value, "FINITE"


def _python_value(value: float | None, kind: str | None) -> float | None:
    special = {"NAN": "nan", "INF_POS": "inf", "INF_NEG": "-inf"}
    return float(special[kind]) if kind in special else value


def _finite(value: float | None) -> float | None:
    return value if value is not None and _optuna_value(value)[1] == "FINITE" else None
