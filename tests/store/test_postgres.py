"""What only a server does: it goes away in the middle, loses a reply, has its own clock and few connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
import sweeps
from sqlalchemy.engine import make_url

from sweeper import clock, connections, embedded, postgres, processes, worker
from sweeper.database import create_database, make_engine, upgrade_schema
from sweeper.errors import (
    EXIT_CONFIG,
    EXIT_UNAVAILABLE,
    Fenced,
    StorageBusy,
    StorageError,
    StorageLost,
    StorageSilent,
)
from sweeper.records import Claim, Ending, Sweep
from sweeper.states import Outcome, State
from sweeper.store import Store

pytestmark = pytest.mark.slow

ME = processes.identify()


@pytest.fixture
def on_server(postgres: Callable[[], str]) -> str:
    """The URL of an empty database of ours on a server."""
    return postgres()


# --- away for a while --------------------------------------------------------------------------


@pytest.fixture
def own_server(memory_dir: Path) -> Iterator[embedded.Server]:
    """A server that only this test uses."""
    memory_dir.chmod(0o711)
    server = embedded.Server(memory_dir / "postgres")
    server.up()
    yield server
    server.down()


def new_store(url: str) -> Store:
    create_database(url)
    return Store(url)


def postmaster(server: embedded.Server) -> int:
    return int((server.data / "postmaster.pid").read_text().split()[0])


def kill(server: embedded.Server) -> None:
    """SIGKILL the server with all its processes: without the first, the others answer for a moment longer."""
    parent = postmaster(server)
    pids = [parent]
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(entry.name))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while any(processes.start_ticks(pid) is not None for pid in pids):
        threading.Event().wait(0.01)


def test_a_server_that_is_killed_and_comes_back_is_waited_for(own_server: embedded.Server) -> None:
    store = new_store(own_server.url)
    sweep = sweeps.make(store)
    claim = sweeps.must_draw(store, sweep)

    kill(own_server)
    with pytest.raises(StorageBusy, match="once the server answers"):
        store.renew(claim.lease)  # it does not wait: the worker has its trainer to listen to
    with ThreadPoolExecutor(1) as pool:
        recorded = pool.submit(store.record_checkpoint, claim.lease, step=5)
        own_server.up()
        recorded.result(timeout=30)

    store.renew(claim.lease)
    assert store.run(claim.run.run_id).checkpoint_step == 5
    kill(own_server)
    own_server.up()
    store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=1.0))
    assert store.run(claim.run.run_id).state is State.COMPLETED
    store.close()


def test_a_server_that_stays_away_is_reported_in_time(own_server: embedded.Server) -> None:
    store = new_store(own_server.url)
    store.ttl_s = 0.6
    own_server.down()
    with pytest.raises(StorageBusy, match=r"refused.*Nothing is lost; run the same command again"):
        store.find_sweep("simple")
    store.close()


def test_a_server_that_is_made_again_by_up_keeps_what_it_held(own_server: embedded.Server) -> None:
    store = new_store(own_server.url)
    sweeps.make(store)
    store.close()
    assert own_server.down()
    assert not own_server.is_up
    url = own_server.up()
    assert own_server.is_up
    again = Store(url)
    assert again.find_sweep("simple") is not None
    again.close()


# --- lost replies ------------------------------------------------------------------------------


@dataclass
class Proxy:
    """Between client and server; cuts the connection at the next COMMIT, before or after it got there."""

    target: tuple[str, int]
    cut: str = ""  # "before" or "after"
    num_cuts: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            threading.Thread(target=self.carry, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self.carry, args=(server, client, False), daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        awaits_reply = False
        try:
            while data := source.recv(1 << 16):
                if is_client and self.cut and b"COMMIT" in data:
                    self.num_cuts += 1
                    where, self.cut = self.cut, ""
                    if where == "after":
                        source.shutdown(socket.SHUT_RDWR)  # whatever is answered will not arrive
                        sink.sendall(data)
                        awaits_reply = True
                    break
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source,) if awaits_reply else (source, sink):
                with contextlib.suppress(OSError):  # closing would not wake whoever reads from it
                    end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(on_server: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server, and the URL through it."""
    url = make_url(on_server)
    assert url.host is not None
    assert url.port is not None
    proxy = Proxy((url.host, url.port))
    threading.Thread(target=proxy.serve, daemon=True).start()
    through = url.set(port=proxy.listener.getsockname()[1])
    password = Path(str(url.query["passfile"])).read_text().strip().split(":")[-1]
    yield proxy, through.set(password=password, query={}).render_as_string(hide_password=False)
    # A listening socket that is closed while a thread accepts would accept once more.
    proxy.listener.shutdown(socket.SHUT_RDWR)
    proxy.listener.close()


def draw(store: Store, sweep: Sweep, claim: Claim) -> None:
    sweeps.must_draw(store, sweep)
    assert len(store.runs(sweep.sweep_id)) == 2


def take_interrupted(store: Store, sweep: Sweep, claim: Claim) -> None:
    found = None
    while found is None:  # a row that the server has not unlocked yet is skipped, not waited for
        found = store.claim(sweep.sweep_id, owner=ME, worker="w:1")
    assert found.lease.lease_epoch == claim.lease.lease_epoch + 1
    store.renew(found.lease)


def release(store: Store, sweep: Sweep, claim: Claim) -> None:
    store.release(claim.lease, Ending(Outcome.PREEMPTED, "so"))
    assert store.run(claim.run.run_id).state is State.INTERRUPTED


def settle(store: Store, sweep: Sweep, claim: Claim) -> None:
    store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=0.5))
    assert store.run(claim.run.run_id).state is State.COMPLETED


def raise_epoch(store: Store, sweep: Sweep, claim: Claim) -> None:
    store.renew(store.raise_epoch(claim.lease, above=7))
    assert store.run(claim.run.run_id).lease_epoch == 8


def create(store: Store, sweep: Sweep, claim: Claim) -> None:
    sweeps.make(store, "another")


def supersede(store: Store, sweep: Sweep, claim: Claim) -> None:
    store.renew(sweeps.supersede(store, sweep, claim).lease)
    assert store.run(claim.run.run_id).state is State.SUPERSEDED


def record(store: Store, sweep: Sweep, claim: Claim) -> None:
    store.record_checkpoint(claim.lease, step=7)
    assert store.run(claim.run.run_id).checkpoint_step == 7


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    "act", [draw, take_interrupted, release, settle, raise_epoch, create, supersede, record]
)
def test_a_lost_reply_to_commit_is_settled(
    act: Callable[[Store, Sweep, Claim], None], where: str, proxy: tuple[Proxy, str]
) -> None:
    """Whether COMMIT arrived or not: it happened once, and the caller knows."""
    cutting, url = proxy
    store = Store(url)
    sweep = sweeps.make(store)
    claim = sweeps.must_draw(store, sweep)
    if act is take_interrupted:
        store.release(claim.lease, Ending(Outcome.PREEMPTED, "so"))
    attempts = len(sweeps.rows(store, "sweeper_attempt"))
    cutting.cut = where
    act(store, sweep, claim)
    assert cutting.num_cuts == 1
    new_attempts = {draw: 1, take_interrupted: 1, supersede: 1}.get(act, 0)
    assert len(sweeps.rows(store, "sweeper_attempt")) == attempts + new_attempts
    store.close()


# --- its clock, its locks, its connections -----------------------------------------------------


def test_a_lease_is_counted_by_the_servers_clock(on_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "wall_s", lambda: 1.0)  # this machine believes in 1970
    with closing(Store(on_server, ttl_s=60.0)) as store:
        sweep = sweeps.make(store)
        claim = sweeps.must_draw(store, sweep)
        for _ in range(2):
            (row,) = sweeps.rows(store, "sweeper_run")
            assert 50 < row["lease_until"] - store.now_s() <= 60
            store.renew(claim.lease)
        store.release(claim.lease, sweeps.LOST, back_off_s=20.0)
        assert store.claim(sweep.sweep_id, owner=ME, worker="w:1") is None
        (row,) = sweeps.rows(store, "sweeper_run")
        assert 10 < row["not_before"] - store.now_s() <= 20


def test_the_lock_of_a_node_that_died_in_a_transaction_is_given_up(
    on_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(on_server)
    sweep = sweeps.make(store)
    claim = sweeps.must_draw(store, sweep)
    store.release(claim.lease, Ending(Outcome.PREEMPTED, "so"))
    quick = {**postgres.CONNECT_ARGS, "options": "-c idle_in_transaction_session_timeout=500"}
    with psycopg.connect(on_server, **quick) as dead:
        dead.execute("SELECT * FROM sweeper_run FOR UPDATE")
        assert store.claim(sweep.sweep_id, owner=ME, worker="w:1") is None, "skipped, not waited for"
        with psycopg.connect(on_server) as waiting:  # until the server has ended the other one
            waiting.execute("SELECT * FROM sweeper_run FOR UPDATE")
        assert store.claim(sweep.sweep_id, owner=ME, worker="w:1") is not None
        dead.close()
    store.close()


def test_our_sessions_bound_what_a_dead_client_can_hold(on_server: str) -> None:
    with closing(Store(on_server)) as store, store._engine.connect() as connection:
        shown = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("idle_in_transaction_session_timeout", "tcp_keepalives_idle", "lock_timeout")
        }
    assert shown == {
        "idle_in_transaction_session_timeout": "30s",
        "tcp_keepalives_idle": "10",
        "lock_timeout": "20s",
    }


def test_who_rests_holds_no_connection(on_server: str) -> None:
    store = Store(on_server)
    database = make_url(on_server).database
    with psycopg.connect(on_server.replace(f"/{database}?", "/sweeper?"), autocommit=True) as watching:

        def held() -> int:
            row = watching.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname=%s", [database]
            ).fetchone()
            return int(row[0]) if row else 0

        store.rest()
        assert held() == 1, "it was used just now"
        store.rest(after_s=0.0)
        while held():  # the server's process takes a moment to end
            pass
    assert store.find_sweep("simple") is None
    store.close()


def test_200_workers_share_fewer_connections(
    own_server: embedded.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives its connection back while it trains; who finds none free waits."""
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    with psycopg.connect(own_server.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET max_connections=40")
        connection.execute("ALTER SYSTEM SET fsync=off")
    own_server.down()
    own_server.up()
    first = new_store(own_server.url)
    sweep = sweeps.make(first, n_trials=200)
    first.rest()

    def work(number: int) -> None:
        # On a busy machine the last of them waits longer than two thirds of a minute.
        store = Store(own_server.url, ttl_s=180.0)
        claim = sweeps.must_draw(store, sweep, worker=f"w:{number}")
        store.rest()
        store.record_checkpoint(claim.lease, step=1)
        store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=float(number)))
        store.rest()

    with ThreadPoolExecutor(200) as pool:
        for done in [pool.submit(work, number) for number in range(200)]:
            done.result(timeout=120)
    assert first.count_left(sweep.sweep_id) == (0, 0)
    assert sorted(run.trial for run in first.runs(sweep.sweep_id)) == list(range(200))
    first.close()


def test_32_workers_draw_and_claim_each_run_once(on_server: str) -> None:
    with closing(Store(on_server)) as store:
        sweep = sweeps.make(store, n_trials=64)

    def work(number: int) -> list[tuple[str, int]]:
        mine = []
        with closing(Store(on_server)) as store:
            for turn in range(20):
                claim = store.claim(sweep.sweep_id, owner=ME, worker=f"w:{number}") or sweeps.draw(
                    store, sweep
                )
                if claim is None:
                    continue
                mine.append((claim.run.run_id, claim.lease.lease_epoch))
                if turn % 3 == 0:
                    store.settle(claim.lease, State.COMPLETED, Ending(Outcome.COMPLETED, value=0.5))
                else:
                    store.release(claim.lease, Ending(Outcome.PREEMPTED, "so"))
                with pytest.raises(Fenced):
                    store.renew(claim.lease)
        return mine

    with ThreadPoolExecutor(32) as pool:
        claims = [claim for mine in pool.map(work, range(32)) for claim in mine]
    assert len(claims) == len(set(claims)), "two owners had the same run under the same epoch"
    with closing(Store(on_server)) as store:
        assert len(store.runs(sweep.sweep_id)) <= 64


# --- what cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"password": "wrong", "query": {}}, "authentication failed.*Check user, database and password"),
        ({"database": "missing"}, "does not exist.*Check user, database and password"),
        ({"database": "postgres"}, "not one of sweeper's"),
    ],
)
def test_what_cannot_pass_is_said_at_once(on_server: str, change: dict[str, object], says: str) -> None:
    url = make_url(on_server).set(**change)  # type: ignore[arg-type]
    started = clock.awake_s()
    with pytest.raises(StorageError, match=says) as caught:
        Store(url.render_as_string(hide_password=False))
    assert clock.awake_s() - started < 10
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("passfile=/nowhere/pgpass", "Does this machine see /nowhere/pgpass, with mode 0600"),
        ("passfile={open}", "Does this machine see {open}, with mode 0600"),
        ("host=no-such-host.invalid", "not known. Check host, port and options"),
        ("port=99999", "invalid port number.*Check host, port and options"),
        ("foo=bar", "foo.*Check host, port and options"),
        ("service=none", "definition of service.*Check host, port and options"),
        ("sslmode=require", "does not support SSL.*Check host, port and options"),
    ],
)
def test_a_url_that_can_never_do_is_no_server_that_is_away(
    on_server: str, tmp_path: Path, change: str, says: str
) -> None:
    """Nothing is waited for, and a SLURM job does not requeue itself for it."""
    url, query = make_url(on_server), dict(make_url(on_server).query)
    readable = tmp_path / "pgpass"
    readable.write_text(Path(str(query["passfile"])).read_text())
    readable.chmod(0o644)
    key, _, value = change.replace("{open}", str(readable)).partition("=")
    changed = url.set(**{key: value}) if key == "host" else url.set(query={**query, key: value})
    if key == "port":
        changed = url.set(port=int(value))
    text = changed.render_as_string(hide_password=False)
    started = clock.awake_s()
    for use in (Store, create_database, upgrade_schema):
        with pytest.raises(StorageError, match=says.replace("{open}", str(readable))) as caught:
            use(text)
        assert caught.value.exit_code == EXIT_CONFIG
    assert clock.awake_s() - started < 10


def test_what_has_worked_once_is_away_when_its_name_is_not_known(on_server: str) -> None:
    with closing(Store(on_server)) as store:
        store.ttl_s = 0.1
        store._engine.dispose()
        store._engine = make_engine(
            make_url(on_server).set(host="no-such-host.invalid").render_as_string(hide_password=False)
        )
        with pytest.raises(StorageLost, match="not known"):
            store.find_sweep("simple")


def test_a_worker_that_was_never_answered_says_so_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no run: its batch script asks again from where it is, and does not requeue the job for ever."""
    impatient = partial(Store, ttl_s=0.1)
    monkeypatch.setattr(worker, "Store", impatient)
    storage, unused = "postgresql://sweeper@127.0.0.1:1/sweeper", cast("Any", None)
    with pytest.raises(StorageSilent, match="refused") as caught:
        worker._work("simple", storage=storage, data_dir=Path(), name=None, server=unused, stop=unused)
    assert caught.value.exit_code == EXIT_UNAVAILABLE
