"""When somebody else's lease is over: by proof, or by a heartbeat that stands still. Never by a wall clock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from sweeper import alive, clock, processes
from sweeper.observer import Observer, proof_of_death
from sweeper.records import Death, ProcessId, Suspect
from sweeper.slurm import Jobs

TTL_S = 60.0
HEARTBEAT_S = 10.0
PROOF = proof_of_death(Jobs())


class Clocks:
    """The two clocks of this machine, moved by hand and apart from each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = 1_800_000_000.0
        self.awake_s = 5_000.0
        monkeypatch.setattr(clock, "wall_s", lambda: self.wall_s)
        monkeypatch.setattr(clock, "awake_s", lambda: self.awake_s)

    def pass_s(self, seconds: float) -> None:
        self.wall_s += seconds
        self.awake_s += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def suspect(owner: ProcessId, **changes: object) -> Suspect:
    seen = Suspect(
        run_id="simple.r.00000", lease_epoch=1, heartbeat=1, lease_until=0.0, lost_count=0, owner=owner, processes=()
    )  # fmt: skip
    return replace(seen, **changes)  # type: ignore[arg-type]


def reason(observer: Observer, seen: Suspect) -> str | None:
    found = observer.over([seen])
    return found[0][1].reason if found else None


# --- proof -------------------------------------------------------------------------------------


def test_a_live_owner_is_left_alone_and_a_dead_one_is_over_at_once(
    sleeper: subprocess.Popen[bytes],
) -> None:
    observer, owner = Observer(ttl_s=TTL_S, proof=PROOF), processes.identify(sleeper.pid)
    assert reason(observer, suspect(owner)) is None
    sleeper.kill()
    sleeper.wait()
    assert reason(observer, suspect(owner)) == f"its process {owner.pid} is gone"


def test_an_owner_that_nobody_waited_for_is_gone_too(sleeper: subprocess.Popen[bytes]) -> None:
    owner = processes.identify(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert reason(Observer(ttl_s=TTL_S, proof=PROOF), suspect(owner)) == f"its process {owner.pid} is gone"


def test_a_pid_that_was_given_to_another_process_is_not_the_owner() -> None:
    me = processes.identify()
    earlier = replace(me, start_ticks=me.start_ticks - 1)
    assert reason(Observer(ttl_s=TTL_S, proof=PROOF), suspect(earlier)) == f"its process {me.pid} is gone"


def test_a_reboot_of_this_machine_is_proof() -> None:
    before = replace(processes.identify(), boot_id="11111111-2222-3333-4444-555555555555")
    assert reason(Observer(ttl_s=TTL_S, proof=PROOF), suspect(before)) == "this machine has rebooted since"


GONE = 4_190_000  # above the kernel's largest pid
ELSEWHERE: dict[str, dict[str, object]] = {
    "another PID namespace of this boot": {"pid_namespace": "pid:[1]", "pid": GONE},
    "another user": {"uid": 4242, "pid": GONE},
    "another machine": {"machine_id": "f" * 32, "boot_id": "other", "pid": GONE},
    "a container of another name on a machine with this id": {
        "host": "other",
        "boot_id": "other",
        "pid": GONE,
    },
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_nothing_is_proof_and_only_a_still_heartbeat_ends_a_lease(
    clocks: Clocks, where: str
) -> None:
    owner = replace(processes.identify(), **ELSEWHERE[where])  # type: ignore[arg-type]
    observer = Observer(ttl_s=TTL_S, proof=PROOF)
    assert alive.proof_of_death(owner) is None
    assert reason(observer, suspect(owner)) is None
    clocks.pass_s(TTL_S - 0.1)
    assert reason(observer, suspect(owner)) is None
    clocks.pass_s(0.1)
    assert reason(observer, suspect(owner)) == "its heartbeat stood still for 60 s"


def test_a_process_that_cannot_be_read_is_not_proved_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, real = replace(processes.identify(), pid=1), alive._read
    monkeypatch.setattr(alive, "_read", lambda path: "" if path.startswith("/proc/1/") else real(path))
    assert alive.proof_of_death(hidden) is None


# --- a heartbeat that stands still -------------------------------------------------------------


def never(owner: ProcessId) -> str | None:
    return None


def test_a_heartbeat_that_moves_is_never_over(clocks: Clocks) -> None:
    observer, owner = Observer(ttl_s=TTL_S, proof=never), processes.identify()
    for beat in range(1, 100):
        assert reason(observer, suspect(owner, heartbeat=beat)) is None
        clocks.pass_s(TTL_S - 0.1)


def test_a_new_owner_gets_its_full_time(clocks: Clocks) -> None:
    observer, owner = Observer(ttl_s=TTL_S, proof=never), processes.identify()
    reason(observer, suspect(owner))
    clocks.pass_s(TTL_S - 1)
    assert reason(observer, suspect(owner, lease_epoch=2)) is None
    clocks.pass_s(TTL_S - 1)
    assert reason(observer, suspect(owner, lease_epoch=2)) is None
    clocks.pass_s(1)
    assert reason(observer, suspect(owner, lease_epoch=2))


def test_a_run_that_was_away_in_between_is_watched_anew(clocks: Clocks) -> None:
    observer, seen = Observer(ttl_s=TTL_S, proof=never), suspect(processes.identify())
    reason(observer, seen)
    clocks.pass_s(TTL_S - 1)
    assert observer.over([]) == []
    clocks.pass_s(2)
    assert reason(observer, seen) is None


def test_an_observer_that_just_came_waits_a_full_ttl_whatever_the_row_says(clocks: Clocks) -> None:
    long_ago = suspect(processes.identify(), lease_until=clocks.wall_s - 1e6)
    observer = Observer(ttl_s=TTL_S, proof=never)
    clocks.pass_s(TTL_S)
    assert reason(observer, long_ago) is None
    clocks.pass_s(TTL_S)
    assert reason(observer, long_ago)


@pytest.mark.parametrize("jump_s", [7200.0, -7200.0])
def test_a_clock_moved_by_two_hours_steals_no_living_lease(clocks: Clocks, jump_s: float) -> None:
    observer, owner = Observer(ttl_s=TTL_S, proof=never), processes.identify()
    until = clocks.wall_s + TTL_S
    assert reason(observer, suspect(owner, lease_until=until)) is None
    clocks.wall_s += jump_s
    for beat in range(1, 20):
        assert reason(observer, suspect(owner, heartbeat=beat, lease_until=until)) is None
        clocks.pass_s(HEARTBEAT_S)


@pytest.mark.parametrize("jump_s", [7200.0, -7200.0])
def test_a_clock_moved_by_two_hours_blocks_no_takeover(clocks: Clocks, jump_s: float) -> None:
    observer, seen = Observer(ttl_s=TTL_S, proof=never), suspect(processes.identify())
    reason(observer, seen)
    clocks.wall_s += jump_s
    clocks.pass_s(TTL_S)
    assert reason(observer, seen)
    dead = Observer(ttl_s=TTL_S, proof=lambda owner: Death("gone"))
    assert reason(dead, seen) == "gone"


def test_a_machine_that_slept_does_not_count_the_sleep(clocks: Clocks) -> None:
    observer, seen = Observer(ttl_s=TTL_S, proof=never), suspect(processes.identify())
    reason(observer, seen)
    clocks.wall_s += 36_000.0  # awake_s stood still
    assert reason(observer, seen) is None


# --- backing off -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost_before", "wait_s"),
    [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (5, 4), (6, 8), (7, 16), (8, 30), (19, 30)],
)
def test_a_run_that_kills_its_owners_is_taken_over_more_and_more_slowly(
    clocks: Clocks, lost_before: int, wait_s: float
) -> None:
    observer = Observer(ttl_s=TTL_S, proof=lambda owner: Death("gone"))
    seen = suspect(processes.identify(), lost_count=lost_before)
    if wait_s:
        assert reason(observer, seen) is None
        clocks.pass_s(wait_s - 0.01)
        assert reason(observer, seen) is None
        clocks.pass_s(0.01)
    assert reason(observer, seen) == "gone"


def test_each_suspect_is_judged_by_itself(clocks: Clocks) -> None:
    dead: Callable[[ProcessId], Death | None] = lambda owner: Death("gone") if owner.pid == 2 else None  # noqa: E731
    observer, me = Observer(ttl_s=TTL_S, proof=dead), processes.identify()
    seen = [
        suspect(replace(me, pid=1), run_id="a.r.00000"),
        suspect(replace(me, pid=2), run_id="a.r.00001"),
        suspect(replace(me, pid=3), run_id="a.r.00002"),
    ]
    assert observer.over(seen) == [(seen[1], Death("gone"))]
