"""The store: one method is one transaction, and this is the one door for all SQL that writes.

No file, network or user code inside a transaction. Slot, trial and run are one transaction, and so
are the final state and the tell. Statements that several methods share are in `sweep_rows`, all
on Optuna's tables in `optuna_rows`, and what a rebuild writes in `restored`.

A server may be away for a while: a `patient` method runs again when its transaction did not happen.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy.engine import Connection

from sweeper import costs, optuna_rows, restored, rundir, sweep_rows
from sweeper.connections import Database, Proof, patient
from sweeper.costs import Resumption, Steps
from sweeper.database import execute, shown
from sweeper.errors import Fenced, NotFound, SweeperError
from sweeper.records import Claim, Ending, Lease, NewSweep, ProcessId, Proposal, Run, Suspect, Sweep
from sweeper.recovery import MAX_BACK_OFF_S
from sweeper.states import FAILURES, INCOMPLETE, SETTLES, Event, Outcome, State, source, target

ASSUMED_S = 3600.0


class Store(Database):
    """An open database. Not for several threads at once.

    Raises (every method): StorageError when the database cannot be used; methods that write
    under a Lease, and `check`, raise Fenced when it is lost.
    """

    # --- sweeps ----------------------------------------------------------------------------

    @patient
    def find_sweep(self, name: str) -> Sweep | None:
        """The sweep of that name, or None."""
        with self._reading() as connection:
            row = execute(connection, "SELECT * FROM sweeper_sweep WHERE name=:n", n=name).one_or_none()
        return sweep_rows.sweep_of(row) if row else None

    def sweep(self, name: str) -> Sweep:
        """The sweep of that name. Raises NotFound."""
        found = self.find_sweep(name)
        if found is None:
            raise NotFound(
                f"there is no sweep {name!r} in {shown(self.url)}", do="`sweeper list` shows what is there."
            )
        return found

    @patient
    def create_sweep(self, new: NewSweep) -> bool:
        """Create sweep, Optuna study and grid in one transaction; False if the name is taken."""
        same = {"n": new.name, "c": json.dumps(new.config)}
        proof = "SELECT 1 FROM sweeper_sweep WHERE name=:n AND config=:c"
        with self._transaction((proof, same)) as connection:
            if execute(connection, "SELECT 1 FROM sweeper_sweep WHERE name=:n", n=new.name).first():
                return False
            sweep_rows.insert_sweep(connection, new)
        return True

    @patient
    def update_sweep(self, name: str, *, n_trials: int, config: dict[str, Any]) -> None:
        """A launch of an existing sweep: new total, new launch configuration, no longer cancelled."""
        with self._transaction() as connection:
            execute(
                connection,
                "UPDATE sweeper_sweep SET n_trials=:n, config=:config, is_cancelled=:false WHERE name=:name",
                n=n_trials, config=json.dumps(config), false=False, name=name,
            )  # fmt: skip

    @patient
    def cancel_sweep(self, name: str) -> None:
        """No worker draws another trial of this sweep."""
        with self._transaction() as connection:
            execute(connection, "UPDATE sweeper_sweep SET is_cancelled=:t WHERE name=:n", t=True, n=name)

    @patient
    def count_left(self, sweep_id: int) -> tuple[int, int]:
        """(trials that may still be drawn, runs that are incomplete)."""
        with self._reading() as connection:
            left = sweep_rows.count_left(connection, sweep_id)
            incomplete = execute(
                connection,
                f"SELECT count(*) FROM sweeper_run WHERE sweep_id=:s AND state IN ({sweep_rows.quoted(INCOMPLETE)})",
                s=sweep_id,
            ).scalar_one()
        return left, incomplete

    # --- drawing ---------------------------------------------------------------------------

    @patient
    def adopt_orphans(self, sweep_id: int) -> int:
        """Put RUNNING trials of the study that no run stands behind back in the queue."""
        with self._transaction() as connection:
            return optuna_rows.requeue_orphans(connection, sweep_id)

    @patient
    def queue(self, study_id: int) -> tuple[optuna_rows.TrialRow | None, int]:
        """(the trial that waits in the study to be drawn first: a retry, a grid point; the next free number)."""
        with self._reading() as connection:
            first = optuna_rows.first_waiting(connection, study_id)
            number = optuna_rows.next_trial(connection, study_id)
            if first is None:
                return None, number
            (waiting,) = optuna_rows.read_trials(connection, study_id, after=number, numbers=[first])
        return waiting, number

    @patient
    def draw(
        self, sweep: Sweep, proposal: Proposal, *, owner: ProcessId, worker: str, threads: int
    ) -> Claim | None:
        """Take a slot of the sweep, its trial and a new run in one transaction.

        Returns:
            The claim on the new run; None when the slots are taken or the proposal is stale
            (look at `count_left`, then propose again).
        """
        token = secrets.token_hex(8)
        with self._transaction(_owned_by(token)) as connection:
            optuna_rows.lock_study(connection, sweep.study_id)
            now = self._now(connection)
            if sweep_rows.count_left(connection, sweep.sweep_id) == 0:
                return None
            trial_id = optuna_rows.take_trial(connection, sweep.study_id, proposal)
            if trial_id is None:
                return None
            number = sweep_rows.reserve_number(connection, sweep.sweep_id)
            run = _new_run(sweep, number, trial_id=trial_id, proposal=proposal, threads=threads)
            lease = Lease(run.run_id, run.lease_epoch, token)
            sweep_rows.insert_run(
                connection, run, lease, owner=owner, worker=worker, now=now, until=now + self.ttl_s
            )
            sweep_rows.insert_attempt(connection, run.run_id, 1, run.lease_epoch, owner, now)
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
        waited = f"AND (not_before<=:now OR not_before>:now+{MAX_BACK_OFF_S})"
        select = (
            f"SELECT run_id FROM sweeper_run WHERE sweep_id=:s AND state='{source(Event.CLAIM)}' {waited if is_patient else ''} {only} "
            "ORDER BY CASE WHEN worker=:worker THEN 0 ELSE 1 END, "
            "1.0 * COALESCE(checkpoint_step, 0) / COALESCE(NULLIF(total_steps, 0), 1) DESC, number LIMIT 1"
        )
        if self._path is None:
            select += " FOR UPDATE SKIP LOCKED"
        return self._own(
            f"run_id=({select}) AND state='{source(Event.CLAIM)}'",
            {"s": sweep_id, "only": run_id},
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

    @patient
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
        token = secrets.token_hex(8)
        with self._transaction(_owned_by(token)) as connection:
            now = self._now(connection)
            row = execute(
                connection,
                f"UPDATE sweeper_run SET state='{State.RUNNING}', lease_epoch=lease_epoch+1, attempts=attempts+1, owner_token=:token, "
                "owner=:owner, processes=NULL, worker=:worker, heartbeat=heartbeat+1, lease_until=:until, updated_at=:now "
                f"WHERE {where} RETURNING *",
                token=token, owner=sweep_rows.dump_process(owner), worker=worker, until=now + self.ttl_s, now=now, **params,
            ).one_or_none()  # fmt: skip
            if row is None:
                return None
            run = sweep_rows.run_of(row)
            if ended is not None:
                sweep_rows.end_attempt(connection, run.run_id, *ended, now=now)
                run = sweep_rows.run_of(
                    execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run.run_id).one()
                )
            sweep_rows.insert_attempt(connection, run.run_id, run.attempts, run.lease_epoch, owner, now)
        return Claim(
            run, Lease(run.run_id, run.lease_epoch, token), is_new=False, reason=reason, previous=previous
        )

    @patient
    def suspects(self, sweep_id: int) -> list[Suspect]:
        """All running runs of a sweep, for an observer to watch."""
        with self._reading() as connection:
            rows = execute(
                connection,
                f"SELECT * FROM sweeper_run WHERE sweep_id=:s AND state='{State.RUNNING}' ORDER BY number",
                s=sweep_id,
            ).all()
        return [sweep_rows.suspect_of(row) for row in rows]

    @patient
    def now_s(self) -> float:
        """The database's clock, Unix seconds; this machine's on SQLite, which has none."""
        with self._reading() as connection:
            return self._now(connection)

    @patient
    def raise_epoch(self, lease: Lease, *, above: int) -> Lease:
        """Lift the lease's epoch above one found on disk, so that no number is handed out twice."""
        raised = {"r": lease.run_id, "e": above + 1, "t": lease.owner_token}
        proof = "SELECT 1 FROM sweeper_run WHERE run_id=:r AND lease_epoch=:e AND owner_token=:t"
        with self._transaction((proof, raised)) as connection:
            self._guarded(connection, lease, "lease_epoch=:epoch_after", epoch_after=above + 1)
            execute(
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
        done = execute(
            connection,
            f"UPDATE sweeper_run SET {assignments}, updated_at=:now WHERE run_id=:run AND lease_epoch=:epoch AND owner_token=:token AND state=:state",
            now=self._now(connection), run=lease.run_id, epoch=lease.lease_epoch, token=lease.owner_token, state=str(state), **params,
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
                until=self._now(connection) + self.ttl_s, step=global_step,
            )  # fmt: skip

    @patient
    def check(self, lease: Lease) -> None:
        """Raise Fenced unless the lease holds at this moment."""
        with self._reading() as connection:
            held = execute(
                connection,
                "SELECT 1 FROM sweeper_run WHERE run_id=:r AND lease_epoch=:e AND owner_token=:t AND state=:s",
                r=lease.run_id, e=lease.lease_epoch, t=lease.owner_token, s=str(State.RUNNING),
            ).first()  # fmt: skip
        if not held:
            raise _lost(lease)

    @patient
    def record_processes(self, lease: Lease, trainers: Sequence[ProcessId]) -> None:
        """Remember the processes of this attempt, so that a takeover can end what is left of them."""
        with self._transaction() as connection:
            self._guarded(connection, lease, "processes=:p", p=json.dumps([asdict(p) for p in trainers]))

    @patient
    def record_start(
        self, lease: Lease, *, step: int, total_steps: int | None, num_gpus: int | None = None
    ) -> None:
        """The trainer starts from `step`: from now on this epoch's lineage is known."""
        with self._transaction() as connection:
            self._guarded(
                connection,
                lease,
                "global_step=:step, total_steps=COALESCE(:total, total_steps)",
                step=step,
                total=total_steps,
            )
            execute(
                connection,
                "UPDATE sweeper_attempt SET start_step=:step, went_on_at=:now, num_gpus=COALESCE(:gpus, num_gpus) "
                "WHERE run_id=:r AND lease_epoch=:e",
                step=step, now=self._now(connection), gpus=num_gpus, r=lease.run_id, e=lease.lease_epoch,
            )  # fmt: skip

    @patient
    def record_checkpoint(self, lease: Lease, *, step: int, seconds: float = 0.0) -> None:
        """A checkpoint is durable on disk under this lease, and took so long: budgets start anew."""
        with self._transaction() as connection:
            self._guarded(
                connection, lease,
                "checkpoint_step=:step, global_step=:step, lost_count=0, crashed_count=0, oom_count=0", step=step,
            )  # fmt: skip
            execute(
                connection,
                "UPDATE sweeper_attempt SET checkpoint_step=:step, longest_save_s=CASE WHEN longest_save_s > :seconds "
                "THEN longest_save_s ELSE :seconds END WHERE run_id=:r AND lease_epoch=:e",
                step=step, seconds=seconds, r=lease.run_id, e=lease.lease_epoch,
            )  # fmt: skip

    @patient
    def longest_save_s(self, sweep_id: int) -> float:
        """Seconds that the longest save of this sweep took so far; 0 when there was none."""
        with self._reading() as connection:
            found = execute(
                connection,
                "SELECT MAX(a.longest_save_s) FROM sweeper_attempt a JOIN sweeper_run r ON r.run_id=a.run_id "
                "WHERE r.sweep_id=:s",
                s=sweep_id,
            ).scalar()
        return float(found or 0.0)

    @patient
    def mean_time_between_failures_s(self, sweep_id: int) -> float:
        """Seconds an attempt of this sweep runs between two failures, as observed so far.

        One failure in an hour is assumed beside what was seen. Preemptions lose nothing, and count
        for nothing.
        """
        failures = ", ".join(f"'{outcome}'" for outcome in sorted(FAILURES))
        with self._reading() as connection:
            seconds, count = execute(
                connection,
                "SELECT COALESCE(sum(COALESCE(a.ended_at, :now) - a.started_at), 0), "
                f"COALESCE(sum(CASE WHEN a.outcome IN ({failures}) THEN 1 ELSE 0 END), 0) "
                "FROM sweeper_attempt a JOIN sweeper_run r ON r.run_id=a.run_id WHERE r.sweep_id=:s",
                now=self._now(connection), s=sweep_id,
            ).one()  # fmt: skip
        return (ASSUMED_S + max(0.0, float(seconds))) / (1 + int(count))

    @patient
    def starts(self, run_id: str) -> list[tuple[int, int]]:
        """(lease_epoch, start step) of every attempt that said where it started: the lineage."""
        with self._reading() as connection:
            rows = execute(
                connection,
                "SELECT lease_epoch, start_step FROM sweeper_attempt WHERE run_id=:r AND start_step IS NOT NULL ORDER BY lease_epoch",
                r=run_id,
            ).all()
        return [(row[0], row[1]) for row in rows]

    @patient
    def verdict(self, trial_id: int, step: int) -> bool | None:
        """The stored answer to a report of this step, or None if it was never reported."""
        with self._reading() as connection:
            found = execute(
                connection,
                "SELECT prune FROM sweeper_verdict WHERE trial_id=:t AND step=:s",
                t=trial_id,
                s=step,
            ).scalar_one_or_none()
        return None if found is None else bool(found)

    @patient
    def report(
        self, lease: Lease, run: Run, *, step: int, value: float, prune: bool, system_attrs: Mapping[str, Any]
    ) -> None:
        """Store an intermediate value with the pruner's verdict and what the pruner wrote down."""
        with self._transaction() as connection:
            self._guarded(connection, lease, "global_step=:step", step=step)
            optuna_rows.insert_report(connection, run.trial_id, step=step, value=value)
            sweep_rows.insert_verdict(connection, run.trial_id, step=step, value=value, prune=prune)
            optuna_rows.insert_attrs(connection, run.trial_id, system_attrs)

    # --- ending an attempt -----------------------------------------------------------------

    @patient
    def record_end(self, lease: Lease, *, step: int) -> None:
        """The metrics log ends at `step`: so far came, at least, the newest attempt whose trainer has started.

        Without the lease it would be another attempt's log.
        """
        with self._transaction() as connection:
            self._guarded(connection, lease, "heartbeat=heartbeat")
            execute(
                connection,
                "UPDATE sweeper_attempt SET end_step=:step WHERE run_id=:r AND attempt=(SELECT MAX(attempt) "
                "FROM sweeper_attempt WHERE run_id=:r AND start_step IS NOT NULL) AND COALESCE(end_step, start_step)<:step",
                step=step, r=lease.run_id,
            )  # fmt: skip

    @patient
    def release(self, lease: Lease, ending: Ending, *, back_off_s: float = 0.0) -> None:
        """The attempt is over, the run is not: any claimer may go on with it, after `back_off_s` seconds."""
        with self._transaction(_ended_as(lease, ending)) as connection:
            now = self._now(connection)
            self._guarded(
                connection, lease, "state=:after, owner_token=NULL, lease_until=NULL, processes=NULL, not_before=:nb",
                after=str(target(Event.RELEASE)), nb=now + back_off_s if back_off_s else 0.0,
            )  # fmt: skip
            sweep_rows.end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)

    @patient
    def budget_after(self, lease: Lease, outcome: Outcome) -> int:
        """How many consecutive attempts without a newer checkpoint end so, this one included.

        A read: with a lost lease it says nothing, and what is decided from it raises Fenced.
        """
        column = sweep_rows.BUDGETS.get(outcome)
        if column is None:
            return 0
        with self._reading() as connection:
            count, committed = execute(
                connection,
                f"SELECT r.{column}, a.checkpoint_step FROM sweeper_run r JOIN sweeper_attempt a "
                "ON a.run_id=r.run_id AND a.lease_epoch=r.lease_epoch WHERE r.run_id=:r",
                r=lease.run_id,
            ).one()
        return int(count) + (committed is None)

    def run_costs(self, run_id: str) -> tuple[Steps, Resumption]:
        """What failures cost a run, and how resuming it went."""
        with self._reading() as connection:
            query = _query(connection, run_id)
            return costs.steps_of(query, "r.run_id = :id"), costs.resumption_of(query, "r.run_id = :id")

    def resumption(self, sweep_id: int) -> Resumption:
        """How resuming went in a sweep. It looks at all attempts: 10,000 take 0.06 s."""
        with self._reading() as connection:
            return costs.resumption_of(_query(connection, sweep_id), "r.sweep_id = :id")

    def causes(self, run_id: str) -> list[str]:
        """The outcomes of a run's attempts that are over, in order."""
        with self._reading() as connection:
            return list(
                execute(
                    connection,
                    "SELECT outcome FROM sweeper_attempt WHERE run_id=:r AND outcome IS NOT NULL ORDER BY attempt",
                    r=run_id,
                ).scalars()
            )

    @patient
    def settle(self, lease: Lease, state: State, ending: Ending) -> None:
        """Final state, attempt and tell in one transaction. result.json must be durable already.

        Raises:
            ValueError: A completed run without a number, which Optuna could not read.
        """
        if state is State.COMPLETED and (ending.value is None or ending.value != ending.value):
            raise ValueError(f"run {lease.run_id} cannot be completed without a number: {ending.value}")
        event_ = SETTLES[state]
        with self._transaction(_ended_as(lease, ending)) as connection:
            now = self._now(connection)
            self._guarded(
                connection, lease,
                "state=:after, value=:value, owner_token=NULL, lease_until=NULL, processes=NULL",
                state=source(event_), after=str(target(event_)), value=sweep_rows.finite(ending.value),
            )  # fmt: skip
            trial_id = sweep_rows.end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)
            optuna_rows.tell(connection, trial_id, state, ending.value, now)

    # --- superseding -----------------------------------------------------------------------

    @patient
    def reserve_number(self, sweep_id: int) -> int:
        """A run number nobody else gets; gaps are allowed."""
        with self._transaction() as connection:
            return sweep_rows.reserve_number(connection, sweep_id)

    @patient
    def supersede(self, lease: Lease, ending: Ending, fresh: Run, *, owner: ProcessId, worker: str) -> Claim:
        """Old run superseded, fresh one running, in one transaction."""
        new_lease = Lease(fresh.run_id, fresh.lease_epoch, secrets.token_hex(8))
        with self._transaction(_owned_by(new_lease.owner_token)) as connection:
            now = self._now(connection)
            self._guarded(
                connection, lease, "state=:after, owner_token=NULL, lease_until=NULL, processes=NULL",
                after=str(target(Event.SUPERSEDE)),
            )  # fmt: skip
            sweep_rows.end_attempt(connection, lease.run_id, lease.lease_epoch, ending, now=now)
            sweep_rows.insert_run(
                connection, fresh, new_lease, owner=owner, worker=worker, now=now, until=now + self.ttl_s
            )
            sweep_rows.insert_attempt(connection, fresh.run_id, 1, fresh.lease_epoch, owner, now)
        return Claim(fresh, new_lease, is_new=True, reason=f"replaces {lease.run_id}")

    # --- retry, cancel, look up ------------------------------------------------------------

    @patient
    def run(self, run_id: str) -> Run:
        """One run. Raises NotFound."""
        with self._reading() as connection:
            row = execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run_id).one_or_none()
        if row is None:
            raise NotFound(
                f"there is no run {run_id!r} in {shown(self.url)}", do="`sweeper list` shows what is there."
            )
        return sweep_rows.run_of(row)

    @patient
    def runs(self, sweep_id: int, states: Sequence[State] = tuple(State)) -> list[Run]:
        """The runs of a sweep in one of `states`, by number."""
        with self._reading() as connection:
            rows = execute(
                connection,
                f"SELECT * FROM sweeper_run WHERE sweep_id=:s AND state IN ({sweep_rows.quoted(states)}) ORDER BY number",
                s=sweep_id,
            ).all()
        return [sweep_rows.run_of(row) for row in rows]

    @patient
    def retry(self, run_id: str) -> int:
        """Queue a new trial with the parameters of a failed or cancelled run; returns its number.

        Raises:
            SweeperError: The run is not failed or cancelled, or was retried before.
        """
        with self._transaction() as connection:
            row = execute(connection, "SELECT * FROM sweeper_run WHERE run_id=:r", r=run_id).one_or_none()
            if row is None:
                raise NotFound(f"there is no run {run_id!r}", do="`sweeper list` shows what is there.")
            if row.state not in (State.FAILED, State.CANCELLED) or row.is_retried:
                why = "it was retried before" if row.is_retried else f"it is {row.state}"
                raise SweeperError(
                    f"run {run_id} cannot be retried", why=why, do="Only a failed or cancelled run can, once."
                )
            if row.state == State.CANCELLED and sweep_rows.is_full(connection, row.sweep_id):
                raise SweeperError(
                    f"run {run_id} cannot be retried",
                    why="another trial has taken the place of the cancelled one, and the sweep is full",
                    do="Launch it with a higher sweep.n_trials first.",
                )
            execute(connection, "UPDATE sweeper_run SET is_retried=:t WHERE run_id=:r", t=True, r=run_id)
            study_id = execute(
                connection, "SELECT study_id FROM sweeper_sweep WHERE sweep_id=:s", s=row.sweep_id
            ).scalar_one()
            optuna_rows.lock_study(connection, study_id)
            number = optuna_rows.next_trial(connection, study_id)
            again = Proposal(
                number,
                json.loads(row.params),
                optuna_rows.params_of(connection, row.trial_id),
                system_attrs={"sweeper:retry_of": run_id},
            )
            optuna_rows.insert_trial(connection, study_id, number, "WAITING", again)
        return number

    @patient
    def restore(self, sweep: restored.Restored) -> None:
        """Write a rebuilt sweep in one transaction."""
        with self._transaction() as connection:
            restored.write(connection, sweep, self._now(connection))

    # --- Optuna's view ---------------------------------------------------------------------

    @patient
    def trials(
        self, study_id: int, *, after: int = -1, numbers: Sequence[int] = ()
    ) -> list[optuna_rows.TrialRow]:
        """Trials of a study with number > `after` or in `numbers`, by number."""
        with self._reading() as connection:
            return optuna_rows.read_trials(connection, study_id, after=after, numbers=numbers)


def _owned_by(token: str) -> Proof:
    return "SELECT 1 FROM sweeper_run WHERE owner_token=:t", {"t": token}


def _query(connection: Connection, id: object) -> Callable[[str], costs.Row]:
    """How `sweeper.costs` asks: one text of SQL about `:id`, one row."""
    return lambda sql: dict(execute(connection, sql, id=id).mappings().one())


def _ended_as(lease: Lease, ending: Ending) -> Proof:
    """Nobody else ends an attempt with the words of its owner."""
    select = (
        "SELECT 1 FROM sweeper_attempt WHERE run_id=:r AND lease_epoch=:e AND outcome=:o "
        "AND COALESCE(reason, '')=:why AND COALESCE(detail, '')=:detail"
    )
    said = {"o": str(ending.outcome), "why": ending.reason, "detail": ending.detail}
    return select, {"r": lease.run_id, "e": lease.lease_epoch, **said}


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


def _lost(lease: Lease) -> Fenced:
    return Fenced(
        f"run {lease.run_id} belongs to another owner now",
        why=f"lease epoch {lease.lease_epoch} is over",
        do="Nothing more of this attempt counts; the new owner goes on from the last checkpoint.",
    )
