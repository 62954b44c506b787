"""A database that cannot be used: one paragraph with what, why and what to do; nothing is lost."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sweeps

from sweeper import database, schema
from sweeper.database import (
    create_database,
    database_path,
    file_system_of,
    refuse_network_file_system,
    upgrade_schema,
)
from sweeper.errors import EXIT_CONFIG, EXIT_RELEASED, ConfigError, StorageError
from sweeper.reading_server import Server
from sweeper.records import Sweep
from sweeper.store import Store

pytestmark = pytest.mark.sqlite


def refusal(act: Callable[[], object], *, exit_code: int = EXIT_CONFIG) -> str:
    """What the user is told; every refusal says what to do, and most exit with 78."""
    with pytest.raises(StorageError) as caught:
        act()
    assert caught.value.exit_code == exit_code
    assert caught.value.do
    text = str(caught.value)
    assert "\n" not in text
    assert "Background on this error" not in text
    return text


# --- what is there is not ours -----------------------------------------------------------------


@pytest.mark.parametrize("use", [Store, upgrade_schema])
def test_a_missing_file_is_not_created(tmp_path: Path, use: Callable[[str], object]) -> None:
    path = tmp_path / "data" / "sweeper.db"
    assert f"there is no database at {path}" in refusal(lambda: use(f"sqlite:///{path}"))
    assert not path.parent.exists()


NOT_OURS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("some notes\n" * 100),
    "cut short": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\0" * 50),
}


@pytest.mark.parametrize("use", [Store, create_database, upgrade_schema])
@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_not_a_database_is_left_as_it_is(
    tmp_path: Path, kind: str, use: Callable[[str], object]
) -> None:
    path = tmp_path / "sweeper.db"
    NOT_OURS[kind](path)
    before = path.read_bytes()
    assert "cannot be used: file is not a database. Name another file" in refusal(
        lambda: use(f"sqlite:///{path}")
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"", None])
def test_an_empty_or_foreign_database_is_said_to_be_no_sweepers(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "sweeper.db"
    if damage is not None:
        path.write_bytes(damage)
    else:
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE holidays (day TEXT)")
        connection.close()
    assert "not one of sweeper's, or only half created" in refusal(lambda: Store(f"sqlite:///{path}"))
    assert "not one of sweeper's" in refusal(lambda: upgrade_schema(f"sqlite:///{path}"))


def test_a_database_that_optuna_made_gets_our_tables_beside_its_own(tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path / 'sweeper.db'}"
    optuna.create_study(study_name="somebody's", storage=url)
    assert "not one of sweeper's" in refusal(lambda: Store(url))
    create_database(url)
    store = Store(url)
    sweeps.must_draw(store, sweeps.make(store))
    assert {s.study_name for s in optuna.get_all_study_summaries(url)} == {"somebody's", "simple"}


def test_garbage_inside_the_file_is_reported_not_believed(store: Store) -> None:
    sweep = sweeps.make(store, n_trials=300)
    for _ in range(60):
        sweeps.must_draw(store, sweep)
    store.close()
    path = database_path(store.url)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)

    def use() -> None:
        again = Store(store.url)
        again.runs(again.sweep("simple").sweep_id)

    assert "malformed" in refusal(use)


# --- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "advice"), [("9999", "Install the newer sweeper."), ("0000", "Run `sweeper db upgrade`.")]
)
def test_a_schema_of_another_version_is_refused_with_the_way_out(
    store: Store, ours: str, advice: str
) -> None:
    sweeps.execute(store, f"UPDATE {schema.VERSION_TABLE} SET version_num='{ours}'")
    text = refusal(lambda: Store(store.url))
    assert f"has schema {ours}, this sweeper has {schema.HEAD}" in text
    assert advice in text


def test_a_newer_schema_is_not_upgraded_backwards(store: Store) -> None:
    sweeps.execute(store, f"UPDATE {schema.VERSION_TABLE} SET version_num='9999'")
    assert "newer than this sweeper" in refusal(lambda: upgrade_schema(store.url))


def test_tables_of_another_optuna_are_refused(store: Store) -> None:
    sweeps.execute(store, "UPDATE alembic_version SET version_num='v2.6.0.a'")
    text = refusal(lambda: Store(store.url))
    assert f"Optuna's tables in revision v2.6.0.a, not {schema.OPTUNA_REVISION}" in text
    assert "optuna>=5" in text


@pytest.mark.parametrize("table", [schema.VERSION_TABLE, "alembic_version"])
def test_a_version_table_without_a_version_is_half_created(store: Store, table: str) -> None:
    sweeps.execute(store, f"DELETE FROM {table}")
    assert "half created" in refusal(lambda: Store(store.url))


@pytest.mark.parametrize("table", ["alembic_version", "trial_values"])
def test_a_creation_that_was_killed_is_finished_by_the_next(tmp_path: Path, table: str) -> None:
    """Optuna creates its tables one by one, each in a transaction of its own."""
    url = f"sqlite:///{tmp_path / 'sweeper.db'}"
    create_database(url)
    store = Store(url)
    store.close()
    for name in ("sweeper_attempt", "sweeper_run", "sweeper_sweep", "sweeper_verdict", "sweeper_meta"):
        sweeps.execute(store, f"DROP TABLE {name}")
    sweeps.execute(store, "DROP TABLE sweeper_version")
    for index in ("sweeper_trials_number", "sweeper_trials_waiting"):
        sweeps.execute(store, f"DROP INDEX {index}")
    if table == "alembic_version":
        sweeps.execute(store, "DELETE FROM alembic_version")
    else:
        sweeps.execute(store, "DROP TABLE alembic_version")
        sweeps.execute(store, f"DROP TABLE {table}")

    create_database(url)
    again = Store(url)
    sweeps.complete(again, sweeps.must_draw(again, sweeps.make(again)))


def create_until(index: int, url: str, kill_at: int) -> bool:
    """Create a database and end like a process killed before write number `kill_at`; whether it was."""
    real, count = database.connect_sqlite, 0

    def traced(path: Path) -> sqlite3.Connection:
        def before(statement: str) -> None:
            nonlocal count
            count += statement.startswith(("CREATE", "INSERT", "COMMIT"))
            if count == kill_at:
                os._exit(9)

        connection = real(path)
        connection.set_trace_callback(before)
        return connection

    database.connect_sqlite = traced
    pid = os.fork()
    if pid == 0:
        create_database(url)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.slow
def test_a_creation_killed_before_any_of_its_writes_is_finished_by_the_next(memory_dir: Path) -> None:
    kill_at, was_killed = 1, True
    while was_killed:
        url = f"sqlite:///{memory_dir / str(kill_at) / 'sweeper.db'}"
        (was_killed,) = sweeps.crowd(1, create_until, url, kill_at)
        create_database(url)
        store = Store(url)
        sweeps.complete(store, sweeps.must_draw(store, sweeps.make(store)))
        store.close()
        kill_at += 1
    assert kill_at > 12


# --- locked ------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)
    return 0.2


@pytest.fixture
def holder(store: Store) -> Iterator[sqlite3.Connection]:
    """Somebody who holds the write lock."""
    path = database_path(store.url)
    assert path is not None
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield connection
    connection.close()


def test_a_locked_database_is_waited_for_then_reported(
    impatient: float, store: Store, holder: sqlite3.Connection
) -> None:
    started = time.monotonic()
    text = refusal(lambda: Store(store.url), exit_code=EXIT_RELEASED)
    assert time.monotonic() - started >= impatient
    assert "cannot be used: database is locked. Another process holds its write lock" in text
    holder.rollback()
    Store(store.url).close()


def test_a_write_to_a_locked_database_changes_nothing_and_works_later(impatient: float, url: str) -> None:
    store = Store(url)
    sweep = sweeps.make(store)
    claim = sweeps.must_draw(store, sweep)
    before = sweeps.everything(store)
    path = database_path(url)
    assert path is not None
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")

    assert "locked" in refusal(lambda: store.record_checkpoint(claim.lease, step=5), exit_code=EXIT_RELEASED)
    assert store.sweep("simple") == sweep, "readers are not held up"
    holder.rollback()
    holder.close()
    assert sweeps.everything(store) == before
    store.record_checkpoint(claim.lease, step=5)


# --- where it cannot be written ----------------------------------------------------------------


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    text = refusal(lambda: create_database(f"sqlite:///{tmp_path / 'data' / 'sweeper.db'}"))
    assert f"{tmp_path / 'data'}" in text
    assert "cannot be created" in text
    assert "storage.url=" in text


def test_a_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweeper.db").mkdir()
    url = f"sqlite:///{tmp_path / 'sweeper.db'}"
    for use in (create_database, Store):
        assert "unable to open database file. Make the file and its directory writable" in refusal(
            lambda use=use: use(url)  # type: ignore[misc]
        )


def test_a_directory_of_proc_cannot_be_written_by_root_either() -> None:
    assert "cannot be created" in refusal(lambda: create_database("sqlite:////proc/self/fdinfo/x/sweeper.db"))


def test_a_read_only_file_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweeps.make(store)

    def read_only(path: Path) -> sqlite3.Connection:
        # Root may write to a file of mode 0444, so the mode is asked for at open(2) instead.
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
        return connection

    monkeypatch.setattr(database, "connect_sqlite", read_only)
    opened = Store.__new__(Store)
    opened.url, opened.ttl_s, opened._path = store.url, 60.0, store._path
    opened._used_s = 0.0
    opened._engine = database.make_engine(store.url)
    text = refusal(lambda: opened.cancel_sweep(sweep.name))
    assert "readonly database. Make the file and its directory writable" in text


def test_a_full_disk_is_reported_and_nothing_is_half_written(store: Store) -> None:
    sweep = sweeps.make(store, n_trials=500)
    sweeps.must_draw(store, sweep)
    with store._engine.connect() as connection:
        connection.exec_driver_sql(
            f"PRAGMA max_page_count={connection.exec_driver_sql('PRAGMA page_count').scalar_one()}"
        )
    before: dict[str, object] = {}

    def fill() -> None:
        nonlocal before
        while True:
            before = sweeps.everything(store)
            sweeps.must_draw(store, sweep)

    assert "database or disk is full. Free some space" in refusal(fill)
    assert sweeps.everything(store) == before


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_survives_nothing_and_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="has no file"):
        create_database(url)


# --- network file systems, other machines ------------------------------------------------------

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/nvme0 /home/local xfs rw 0 0
//nas/data /mnt/with\\040space cifs rw 0 0
tank /scratch lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/sweeper.db", "ext4"),
        ("/home/me/sweeper.db", "nfs4"),
        ("/home/local/sweeper.db", "xfs"),
        ("/homework/sweeper.db", "ext4"),
        ("/mnt/with space/sweeper.db", "cifs"),
        ("/scratch/sweeper.db", "lustre"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_longest_mount(path: str, kind: str) -> None:
    assert file_system_of(Path(path).parent, MOUNTS) == kind
    if kind in ("ext4", "xfs"):
        refuse_network_file_system(Path(path), mounts=MOUNTS)
    else:
        text = refusal(lambda: refuse_network_file_system(Path(path), mounts=MOUNTS))
        assert f"would lie on a network file system ({kind})" in text
        assert "storage.allow_network_file_system=true" in text


def test_the_directory_counts_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mounts = f"/dev/sda1 / ext4 rw 0 0\nx {tmp_path.resolve() / 'real'} nfs rw 0 0\n"
    assert "(nfs)" in refusal(
        lambda: refuse_network_file_system(tmp_path / "link" / "sweeper.db", mounts=mounts)
    )


def test_a_network_file_system_needs_permission_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setattr(database, "file_system_of", lambda path, mounts: "nfs4")
    url = f"sqlite:///{tmp_path / 'sweeper.db'}"
    assert "(nfs4)" in refusal(lambda: create_database(url))
    assert "(nfs4)" in refusal(lambda: Store(store.url)), "made before it lay there"
    Store(store.url, allow_network_file_system=True).close()

    create_database(url, allow_network_file_system=True)
    Store(url).close()  # every worker opens it so: the database remembers


@pytest.mark.parametrize(
    "kind",
    [
        "fuse.glusterfs",
        "fuse.ceph-fuse",
        "wekafs",
        "panfs",
        "pvfs2",
        "ocfs2",
        "gfs2",
        "virtiofs",
        "fuse.beegfs",
    ],
)
def test_file_systems_of_clusters_are_known_with_and_without_fuse(kind: str) -> None:
    text = refusal(lambda: refuse_network_file_system(Path("/x/sweeper.db"), mounts=f"a / {kind} rw 0 0\n"))
    assert f"network file system ({kind})" in text
    assert "`sweeper db up --host ADDRESS`" in text


@pytest.mark.parametrize("kind", ["ext4", "fuseblk", "fuse.fuse-overlayfs", "overlay", "tmpfs", "zfs"])
def test_file_systems_of_one_machine_are_not_refused(kind: str) -> None:
    refuse_network_file_system(Path("/x/sweeper.db"), mounts=f"a / {kind} rw 0 0\n")


def put_meta(store: Store, **values: str) -> None:
    for key, value in values.items():
        sweeps.execute(store, "UPDATE sweeper_meta SET value=:v WHERE key=:k", v=value, k=key)


def test_a_file_that_came_from_another_machine_is_refused(store: Store) -> None:
    put_meta(store, machine_id="f" * 32, boot_id="another")
    text = refusal(lambda: Store(store.url))
    assert "belongs to another machine (" in text
    assert "SQLite is for the workers of one machine. Use PostgreSQL" in text
    assert "`sweeper db up --host ADDRESS`" in text
    assert "sweeper rebuild" in text


def test_another_machine_of_the_same_image_is_another_machine(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_on = database._machine()
    monkeypatch.setattr(database, "_machine", lambda: {**made_on, "boot_id": "another", "host": "node2"})
    assert f"belongs to another machine ({made_on['host']})" in refusal(lambda: Store(store.url))
    assert {row["key"]: row["value"] for row in sweeps.rows(store, "sweeper_meta")} == made_on


def test_a_database_that_names_no_host_gets_one_after_a_reboot(store: Store) -> None:
    sweeps.execute(store, "DELETE FROM sweeper_meta WHERE key='host'")
    put_meta(store, boot_id="another")
    Store(store.url).close()
    assert {row["key"]: row["value"] for row in sweeps.rows(store, "sweeper_meta")} == database._machine()


def test_a_machine_that_rebooted_keeps_its_database(store: Store) -> None:
    put_meta(store, boot_id="another")
    Store(store.url).close()
    meta = {row["key"]: row["value"] for row in sweeps.rows(store, "sweeper_meta")}
    assert meta["boot_id"] == database._machine()["boot_id"]


def test_a_container_of_this_boot_with_another_machine_id_is_this_machine(store: Store) -> None:
    put_meta(store, machine_id="f" * 32)
    Store(store.url).close()


# --- the file goes away under us ---------------------------------------------------------------


@pytest.fixture
def sweep(store: Store) -> Sweep:
    return sweeps.make(store)


@pytest.mark.parametrize("replacement", ["nothing", "a copy"])
def test_a_heartbeat_notices_that_the_file_was_removed_or_replaced(
    store: Store, sweep: Sweep, replacement: str
) -> None:
    claim = sweeps.must_draw(store, sweep)
    store.renew(claim.lease)
    path = database_path(store.url)
    assert path is not None
    copy = path.read_bytes()
    path.rename(path.with_name("moved.db"))
    if replacement == "a copy":
        path.write_bytes(copy)
    text = refusal(lambda: store.renew(claim.lease))
    assert "was removed or replaced while in use" in text
    assert "sweeper rebuild" in text


# --- secrets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["postgresql://me:canary@h:notaport/d", "nonsense", "mysql://me:canary@h/d", ""]
)
def test_what_is_no_url_of_a_database_is_said_by_all(url: str) -> None:
    for use in (create_database, Store, database.upgrade_schema, reading_server):
        with pytest.raises(ConfigError, match="is not a database that sweeper can use") as caught:
            use(url)
        assert "canary" not in str(caught.value)


def reading_server(url: str) -> None:
    Server(url, url=url, timeout_s=1.0)


def test_no_message_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:canary@db.example/sweeper?password=canary&sslpassword=canary"
    with pytest.raises(StorageError) as caught, database.explained(url):
        raise sqlite3.OperationalError("connection refused")
    assert "canary" not in str(caught.value)
    assert "me:***@db.example" in str(caught.value)
