"""When somebody else's lease is over: by proof, or by a heartbeat that stands still.

SQLite has no clock of its own and wall clocks jump, so wall time alone never ends a lease. An
observer either proves the owner gone, or watches the heartbeat *number* stand still for a whole
TTL by its own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sweeper import clock, processes
from sweeper.records import Death, ProcessId, Suspect
from sweeper.recovery import back_off_s
from sweeper.slurm import Jobs
from sweeper.states import Outcome


def proof_of_death(jobs: Jobs) -> Callable[[ProcessId], Death | None]:
    """Positive proof only: the process is gone from this machine, or SLURM says that its job is over."""

    def prove(owner: ProcessId) -> Death | None:
        gone = processes.proof_of_death(owner)
        return jobs.death(owner, is_gone=gone is not None) or (Death(gone) if gone else None)

    return prove


@dataclass(slots=True)
class _Watch:
    lease_epoch: int
    heartbeat: int
    since_s: float
    proved_at_s: float | None = None


class Observer:
    """Remembers what it saw of others' leases.

    Args:
        ttl_s: How long a heartbeat must stand still.
        proof: Why a process is gone for certain, or None.
    """

    def __init__(self, *, ttl_s: float, proof: Callable[[ProcessId], Death | None]) -> None:
        self._ttl_s = ttl_s
        self._proof = proof
        self._watches: dict[str, _Watch] = {}

    def over(self, suspects: Iterable[Suspect]) -> list[tuple[Suspect, Death]]:
        """Those whose lease is over, each with the reason; call it again and again."""
        found = []
        seen = set()
        for suspect in suspects:
            seen.add(suspect.run_id)
            death = self._why_over(suspect)
            if death:
                found.append((suspect, death))
        for run_id in set(self._watches) - seen:
            del self._watches[run_id]
        return found

    def _why_over(self, suspect: Suspect) -> Death | None:
        now = clock.awake_s()
        watch = self._watches.get(suspect.run_id)
        if watch is None or (watch.lease_epoch, watch.heartbeat) != (suspect.lease_epoch, suspect.heartbeat):
            watch = self._watches[suspect.run_id] = _Watch(suspect.lease_epoch, suspect.heartbeat, now)
        proof = self._proof(suspect.owner)
        if proof:
            watch.proved_at_s = now if watch.proved_at_s is None else watch.proved_at_s
            waited = now - watch.proved_at_s
            is_free = proof.outcome is not Outcome.LOST
            return proof if is_free or waited >= back_off_s(suspect.lost_count + 1) else None
        if now - watch.since_s >= self._ttl_s:
            return Death(f"its heartbeat stood still for {self._ttl_s:.0f} s")
        return None
