"""The worker's loop: claim an incomplete run, else draw a trial; train it; settle what became of it.

Torch-free, and the only process that talks to the database while training goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweeper import __version__, checkpoints, clock, costs, manifests, processes, recovery, rundir, slurm
from sweeper.config import changes, for_run, to_yaml
from sweeper.errors import (
    EXIT_OK,
    EXIT_RELEASED,
    ConfigError,
    Fenced,
    StorageBusy,
    StorageSilent,
    SweeperError,
)
from sweeper.mirror import MirrorSettings, generations
from sweeper.mirror.mirror import Mirror
from sweeper.observer import Observer, proof_of_death
from sweeper.records import Claim, Ending, Lease, Run, Sweep
from sweeper.recovery import Action, Decision
from sweeper.rundir import Damaged, Identity
from sweeper.search import Search
from sweeper.settling import check_data_dir, close, now_text, settle, supersede, tidy, tidy_final
from sweeper.states import FAILURES, Outcome, State
from sweeper.stopping import StopFlag
from sweeper.store import Store
from sweeper.supervisor import LeaseTimes, Supervisor
from sweeper.tracking import Tracker, TrackingSettings, last_step
from sweeper.trainer import nodes
from sweeper.trainer.run import DISK_FAULTS, Spec, in_attempt
from sweeper.trainer.warm import TrainerServer, num_nodes, num_ranks, uses_cuda, wants_plain

IDLE_POLL_S = 0.2
DISK_REST_S = 5.0
MAX_REFUSALS = 10
RESUMPTION_S = 10.0
"""How old what W&B is told of the sweep's resumes may be."""


def log(text: str) -> None:
    """One line for people; progress and logs go to stderr. Nobody listening ends no worker."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Worker:
    """One worker of one sweep.

    Args:
        store: The open database.
        sweep: What to work on.
        data_dir: Where run directories are.
        name: Stable name of this worker, e.g. `node7:0`; it prefers runs it owned before.
        server: Where trainers come from.
        stop: Set by signals and by the launcher's end.
        threads: Threads of a trainer that is drawn here.
    """

    def __init__(
        self,
        store: Store,
        sweep: Sweep,
        *,
        data_dir: Path,
        name: str,
        server: TrainerServer,
        stop: StopFlag,
        threads: int,
    ) -> None:
        self._store, self._sweep, self._data_dir, self._name = store, sweep, data_dir, name
        self._stop, self._threads = stop, threads
        self._me = processes.identify()
        self._rest_until_s, self._num_refusals = 0.0, 0
        self._grace_s: float | None = None
        self._refusal = ""
        self._resumption: costs.Resumption | None = None
        self._resumption_until_s = 0.0
        self._search = Search(store, sweep)
        self._times = LeaseTimes(**sweep.config["lease"])
        self._observer = Observer(ttl_s=self._times.ttl_s, proof=proof_of_death(slurm.Jobs()))
        self._tracker = Tracker(TrackingSettings.from_config(sweep.config["tracking"]))
        self._mirror = Mirror(
            MirrorSettings.from_config(sweep.config.get("mirror")), data_dir=data_dir, sweep=sweep.name
        )
        self._supervisor = Supervisor(
            store, search=self._search, times=self._times, server=server, log=log,
            stop_reason=lambda: self._refusal or stop.check(), wake_fds=stop.fds, tick=self._show_tracking,
            on_save=self._weigh_save if slurm.is_inside() else lambda seconds: None, fenced=self._look_at_copy,
        )  # fmt: skip

    # --- the loop --------------------------------------------------------------------------

    def work(self) -> int:
        """Work until nothing is left to do; returns the exit code."""
        if count := self._store.adopt_orphans(self._sweep.sweep_id):
            log(f"[RESUME] {count} trials of the study had no run; they are drawn again")
        pause_s = IDLE_POLL_S
        self._mirror.start()
        while self._stop.check() is None:
            if taken := self._look_at_copy():
                raise generations.fenced(self._sweep.name, taken)
            if time.monotonic() < self._rest_until_s:
                time.sleep(IDLE_POLL_S)
                continue
            claim = self._find()
            if claim is not None:
                pause_s = IDLE_POLL_S
                self._handle(claim)
            elif self._is_finished():
                return EXIT_OK
            else:
                if pause_s >= self._store.idle_poll_s:
                    self._store.rest(after_s=0.0)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, self._store.idle_poll_s)
        log(f"[WORKER] {self._name}: released ({self._stop.reason})")
        return EXIT_RELEASED

    def close(self) -> None:
        """Let the tracker finish what it has to send, and the mirror what it has to copy."""
        self._heed_tracking(self._tracker.close(self._tracker.settings.wandb.finish_timeout_s + 5.0))
        self._mirror.close(lambda text: log(f"[MIRROR] {text}"))

    def _is_finished(self) -> bool:
        left, incomplete = self._store.count_left(self._sweep.sweep_id)
        return incomplete == 0 and (left == 0 or self._search.propose() is None or self._is_late())

    def _find(self) -> Claim | None:
        sweep_id = self._sweep.sweep_id
        claim = self._store.claim(sweep_id, owner=self._me, worker=self._name)
        if claim is not None:
            return claim
        for suspect, death in self._observer.over(self._store.suspects(sweep_id)):
            claim = self._store.take_over(
                suspect, owner=self._me, worker=self._name, reason=death.reason, outcome=death.outcome
            )
            if claim is not None:
                return claim
        return None if self._is_late() else self._draw()

    def _is_late(self) -> bool:
        until = self._sweep.config.get("stop_at")
        return until is not None and clock.wall_s() >= until

    def _draw(self) -> Claim | None:
        while self._store.count_left(self._sweep.sweep_id)[0] > 0:
            proposal = self._search.propose()
            if proposal is None:
                return None
            claim = self._store.draw(
                self._sweep, proposal, owner=self._me, worker=self._name, threads=self._threads
            )
            if claim is not None:
                return claim
        return None

    # --- one claim -------------------------------------------------------------------------

    def _handle(self, claim: Claim) -> None:
        """Take one claimed run as far as it goes. Losing the lease is an ordinary result."""
        try:
            self._take(claim)
        except Fenced as error:
            log(f"[LEASE] {error}")
        except OSError as error:
            self._num_refusals += 1
            if error.errno not in DISK_FAULTS or self._num_refusals > MAX_REFUSALS:
                raise
            self._hand_back(claim, error)

    def _hand_back(self, claim: Claim, error: OSError) -> None:
        """The disk refused before or after a training: the run did nothing wrong, and costs no budget."""
        ending = Ending(Outcome.LOST, f"{error.strerror} ({error.filename})", is_disk_fault=True)
        decision = recovery.after(ending, count=0, retry={}, on_invalid="")
        lease = replace(claim.lease, lease_epoch=self._store.run(claim.run.run_id).lease_epoch)
        try:
            self._store.release(lease, ending, back_off_s=decision.back_off_s)
        except Fenced:  # it is settled already, only not tidied
            raise error from None
        log(_sentence(claim.run, ending, decision))
        self._rest_until_s = time.monotonic() + DISK_REST_S

    def _take(self, claim: Claim) -> None:
        run = claim.run
        run_dir = self._data_dir / run.path
        if claim.previous:
            tag = in_attempt(str(run_dir.resolve()), run.lease_epoch - 1)
            killed = processes.kill_leftovers(claim.previous, attempt_tag=tag)
            ended = f"; ended what was left of it ({', '.join(map(str, killed))})" if killed else ""
            log(f"[LEASE] {run.run_id}: taken over, {claim.reason}{ended}")
        # A superseder has just written this directory under the very epoch it claims.
        lease = claim.lease if claim.run.replaces and claim.is_new else self._raise_epoch(claim, run_dir)
        try:
            identity, config = self._own(claim, run_dir)
        except Damaged as error:
            self._finish(
                run, lease, run_dir, Ending(Outcome.CRASHED, str(error), no_checkpoint=True), count=0
            )
            return
        if not claim.is_new:
            self._record_end(lease, run_dir)
        decision = self._on_claim(claim, lease, run_dir)
        rundir.write_marker(
            run_dir,
            attempt=run.attempts,
            lease_epoch=lease.lease_epoch,
            owner=self._me,
            started_at=now_text(),
        )
        if decision.action is Action.ADOPT:
            self._adopt(run, lease, run_dir, decision)
        elif decision.action is Action.SUPERSEDE:
            self._supersede(run, lease, run_dir, Ending(Outcome.PREEMPTED, decision.reason))
        elif run.lost_count > int(self._sweep.config["retry"]["max_lost"]):
            self._finish(run, lease, run_dir, Ending(Outcome.LOST, claim.reason), count=run.lost_count)
        else:
            self._train(claim, lease, run_dir, self._spec(run, lease, run_dir, identity, config))

    def _own(self, claim: Claim, run_dir: Path) -> tuple[Identity, dict[str, Any]]:
        """The run's identity and its own configuration. Raises Damaged when they cannot be trusted."""
        identity = self._identity(claim.run, run_dir)
        if claim.is_new:
            return identity, self._sweep.config
        try:
            config = rundir.read_config(run_dir, identity.config_digest)
        except FileNotFoundError as error:
            raise Damaged(f"{run_dir / rundir.CONFIG_FILE} is gone") from error
        for change in changes(config, for_run(self._sweep.config, claim.run.params)):
            log(f"[RESUME] {claim.run.run_id} keeps its own {change}")
        return identity, config

    def _raise_epoch(self, claim: Claim, run_dir: Path) -> Lease:
        on_disk = rundir.largest_epoch(run_dir) if run_dir.exists() else 0
        if on_disk < claim.lease.lease_epoch:
            return claim.lease
        log(f"[LEASE] {claim.run.run_id}: lease epoch raised above {on_disk}, which is on disk")
        return self._store.raise_epoch(claim.lease, above=on_disk)

    def _identity(self, run: Run, run_dir: Path) -> Identity:
        """The run's identity from its directory, which is created now if it never was."""
        try:
            identity = rundir.read_identity(run_dir)
        except FileNotFoundError:
            return self._create(run, run_dir)
        if (identity.wandb_run_id, identity.params, identity.seed) != (
            run.wandb_run_id,
            run.params,
            run.seed,
        ):
            raise ConfigError(
                f"the directory {run_dir} belongs to another run of the name {run.run_id}",
                do="Choose another data_dir or sweep.name, or make the database anew with `sweeper rebuild`.",
            )
        return identity

    def _create(self, run: Run, run_dir: Path) -> Identity:
        config = to_yaml(for_run(self._sweep.config, run.params))
        identity = Identity(
            run_id=run.run_id, sweep=self._sweep.name, number=run.number, trial=run.trial, params=run.params,
            seed=run.seed, threads=run.threads, wandb_run_id=run.wandb_run_id, config_digest=manifests.digest(config),
            code_version=__version__, created_at=now_text(), replaces=run.replaces, retry_of=run.retry_of,
        )  # fmt: skip
        rundir.create(run_dir, identity, config=config, overrides=rundir.overrides_yaml(run.params))
        return identity

    def _on_claim(self, claim: Claim, lease: Lease, run_dir: Path) -> Decision:
        try:
            result = rundir.read_result(run_dir)
        except Damaged as error:
            log(f"[RESUME] {claim.run.run_id}: {error}; moved aside")
            result = {}
        decision = recovery.on_claim(
            claimed_epoch=claim.lease.lease_epoch,
            result=result,
            mode=self._sweep.config["resume"]["mode"],
            is_new=claim.is_new,
        )
        if result is not None and decision.action is not Action.ADOPT:
            rundir.move_result_aside(run_dir, lease_epoch=lease.lease_epoch)
        if not claim.is_new:
            step = claim.run.checkpoint_step
            log(
                f"[RESUME] Found incomplete run {claim.run.run_id} (trial {claim.run.trial}, attempt {claim.run.attempts}, "
                f"{claim.reason}, last checkpoint {'none' if step is None else f'step {step}'})"
            )
        return decision

    def _train(self, claim: Claim, lease: Lease, run_dir: Path, spec: Spec) -> None:
        run = claim.run
        rundir.clean(run_dir)
        checkpoints.clean(run_dir / rundir.CHECKPOINTS_DIR, lease_epoch=lease.lease_epoch)
        log_path = rundir.attempt_log(run_dir, run.attempts)
        if slurm.is_inside():
            self._weigh_save(self._store.longest_save_s(self._sweep.sweep_id))
        self._num_refusals = 0  # the disk has taken all that a training begins with
        ending = self._supervisor.run(
            run,
            lease,
            spec,
            log_path,
            on_start=lambda step, devices: self._track(run, lease, run_dir, step, devices),
        )
        if ending.outcome in FAILURES:  # any other end is told of itself, and costs no transaction
            with contextlib.suppress(Fenced):  # what comes next says so
                self._record_end(lease, run_dir)
        count = self._store.budget_after(lease, ending.outcome)
        try:
            self._finish(run, lease, run_dir, ending, count=count)
        finally:
            self._mirror.end(run_dir=run_dir, lease_epoch=lease.lease_epoch, attempt=run.attempts)

    def _record_end(self, lease: Lease, run_dir: Path) -> None:
        """How far the last training came that wrote rows, before the next one cuts them."""
        step = last_step(run_dir / rundir.METRICS_FILE)
        if step is not None:
            self._store.record_end(lease, step=step)

    def _spec(
        self, run: Run, lease: Lease, run_dir: Path, identity: Identity, config: dict[str, Any]
    ) -> Spec:
        sweep = self._sweep
        is_auto = config["checkpoint"].get("interval") == "auto"
        mtbf_s = self._store.mean_time_between_failures_s(sweep.sweep_id) if is_auto else math.inf
        return Spec(
            run_dir=str(run_dir.resolve()), run_id=run.run_id, sweep=sweep.name, trial=run.trial, params=run.params,
            seed=run.seed, threads=run.threads, attempt=run.attempts, lease_epoch=lease.lease_epoch,
            config_digest=identity.config_digest, deadline_s=clock.boot_s() + self._times.fence_s,
            metric=sweep.metric, direction=sweep.direction, has_pruner=_has_pruner(sweep.config["pruner"]),
            was_committed=run.checkpoint_step is not None, mtbf_s=mtbf_s,
            num_ranks=num_ranks(sweep.config), num_nodes=num_nodes(sweep.config), backend="nccl" if uses_cuda(sweep.config) else "gloo", ranks_s=self._times.ranks_s,
            starts=[list(pair) for pair in self._store.starts(run.run_id)], checkpoint=config["checkpoint"],
        )  # fmt: skip

    # --- after an attempt ------------------------------------------------------------------

    def _finish(self, run: Run, lease: Lease, run_dir: Path, ending: Ending, *, count: int) -> None:
        config = self._sweep.config
        if ending.outcome is Outcome.PREEMPTED and self._refusal:
            ending = replace(ending, reason=self._refusal, is_config=True)
        if ending.outcome is Outcome.PREEMPTED and self._stop.reason is not None and not ending.is_config:
            outcome, reason = self._stop.cause()
            ending = replace(ending, outcome=outcome, reason=reason)
        decision = recovery.after(
            ending, count=count, retry=config["retry"], on_invalid=config["resume"]["on_invalid"]
        )
        log(_sentence(run, ending, decision))
        self._tracker.end(
            run_id=run.run_id,
            outcome=ending.outcome,
            state=State.SUPERSEDED
            if decision.action is Action.SUPERSEDE
            else decision.state or State.INTERRUPTED,
            value=ending.value,
            summary=self._figures(run, ending),
        )
        if decision.action is Action.SETTLE:
            assert decision.state is not None
            settle(self._store, lease, run_dir, decision.state, replace(ending, reason=decision.reason))
        elif decision.action is Action.RELEASE:
            self._store.release(lease, ending, back_off_s=decision.back_off_s)
            if ending.is_config:
                raise ConfigError(f"run {run.run_id} cannot be trained", why=ending.reason)
        elif decision.action is Action.SUPERSEDE:
            self._supersede(run, lease, run_dir, ending)

    def _adopt(self, run: Run, lease: Lease, run_dir: Path, decision: Decision) -> None:
        """Finish what an owner began that died between result.json and the database."""
        result = rundir.read_result(run_dir) or {}
        assert decision.state is not None
        ending = Ending(_outcome_of(decision.state), str(result.get("reason", "")), value=result.get("value"))
        log(f"[RESUME] {run.run_id}: {decision.reason}; adopted")
        tidy(run_dir, lease)
        close(self._store, lease, run_dir, decision.state, ending)

    def _supersede(self, run: Run, lease: Lease, run_dir: Path, ending: Ending) -> None:
        claim = supersede(
            self._store,
            self._sweep,
            run,
            lease,
            ending,
            data_dir=self._data_dir,
            create=self._create,
            owner=self._me,
            worker=self._name,
        )
        log(f"[RESUME] {run.run_id}: {ending.reason}, starting fresh as {claim.run.run_id}")
        self._handle(claim)

    def _weigh_save(self, seconds: float) -> None:
        """Say once when a save takes longer than SLURM gives to a job that is preempted."""
        if not seconds:
            return
        if self._grace_s is None:
            self._grace_s = slurm.grace_s() or math.inf
        if seconds > self._grace_s:
            log(
                f"[SLURM] a save took {seconds:.0f} s, and SLURM kills a preempted job after {self._grace_s:.0f} s "
                "(GraceTime of the partition + KillWait): steps since the last checkpoint will be lost then"
            )
            self._grace_s = math.inf

    # --- tracking --------------------------------------------------------------------------

    def _track(
        self, run: Run, lease: Lease, run_dir: Path, start_step: int, devices: Mapping[str, Any]
    ) -> None:
        keep_last = int(self._sweep.config["checkpoint"]["keep_last"])
        self._mirror.begin(
            run_dir=run_dir, lease_epoch=lease.lease_epoch, attempt=run.attempts, keep_last=keep_last
        )
        config = for_run(self._sweep.config, run.params)["trainer"]
        self._tracker.begin(
            run_dir=run_dir, run_id=run.run_id, sweep=self._sweep.name, wandb_run_id=run.wandb_run_id, attempt=run.attempts,
            lease_epoch=lease.lease_epoch, config={**config, "trial": run.trial, "seed": run.seed, **devices},
            metric=self._sweep.metric, direction=self._sweep.direction, start_step=start_step,
            keep_last=keep_last,
        )  # fmt: skip

    def _figures(self, run: Run, ending: Ending) -> dict[str, Any]:
        """What W&B's summary says of a run's failures; the sweep's part is asked for now and then, for it grows."""
        if not self._tracker.settings.wandb.is_enabled:
            return {}
        if self._resumption is None or time.monotonic() >= self._resumption_until_s:
            self._resumption = self._store.resumption(run.sweep_id)
            self._resumption_until_s = time.monotonic() + RESUMPTION_S
        causes = [*self._store.causes(run.run_id), str(ending.outcome)]
        return costs.figures(run.attempts, causes, self._store.run_costs(run.run_id), self._resumption)

    def _look_at_copy(self) -> str:
        """Who has taken over the copy of the sweep; empty as long as it is ours."""
        for text in self._mirror.poll():
            log(f"[MIRROR] {text}")
        return self._mirror.fenced

    def _show_tracking(self) -> None:
        self._heed_tracking(self._tracker.poll())

    def _heed_tracking(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] in ("warning", "note"):
                log(f"[TRACKING] {event['text']}")
            elif event["event"] == "refused":
                self._refusal = str(event["text"])


def _outcome_of(state: State) -> Outcome:
    return Outcome(str(state)) if str(state) in set(Outcome) else Outcome.CRASHED


def _sentence(run: Run, ending: Ending, decision: Decision) -> str:
    value = f", value {ending.value:.6g}" if ending.value is not None else ""
    reason = f": {decision.reason}" if decision.reason else ""
    after = {
        Action.SETTLE: str(decision.state),
        Action.RELEASE: "may go on",
        Action.SUPERSEDE: "starts fresh",
    }
    return f"[RUN] {run.run_id} (trial {run.trial}): attempt {run.attempts} {ending.outcome}{value} → {after.get(decision.action, 'left alone')}{reason}"


def _has_pruner(config: Mapping[str, Any] | None) -> bool:
    return config is not None and not str(config["_target_"]).endswith(".NopPruner")


# --- the process -----------------------------------------------------------------------------


def main(
    sweep: str,
    *,
    storage: str,
    data_dir: Path,
    name: str | None = None,
    launcher_fd: int | None = None,
    server_fd: int | None = None,
) -> int:
    """Run one worker of `sweep` until nothing is left; returns the exit code."""
    stop = StopFlag(launcher_fd)
    server = TrainerServer(os.environ, fd=server_fd)
    server.start()  # imports torch while this process opens the database
    try:
        return _work(sweep, storage=storage, data_dir=data_dir, name=name, server=server, stop=stop)
    finally:
        server.stop()


def _work(
    sweep: str, *, storage: str, data_dir: Path, name: str | None, server: TrainerServer, stop: StopFlag
) -> int:
    try:
        store = Store(storage)
    except StorageBusy as error:
        raise StorageSilent(error.what, why=error.why, do=error.do) from error
    found = store.sweep(sweep)
    store.ttl_s = float(found.config["lease"]["ttl_s"])
    stop.warning_s = float(found.config["launcher"].get("signal_delay_s") or 0)
    if num_nodes(found.config) > 1:
        nodes.check()
    if wants_plain(found.config):
        server.go_plain()
    threads = int(os.environ.get("SWEEPER_THREADS", "1"))
    check_data_dir(store, found, data_dir)
    generations.check_token(
        MirrorSettings.from_config(found.config.get("mirror")).url, sweep, data_dir=data_dir
    )
    tidy_final(store, found, data_dir, say=log)
    worker = Worker(
        store,
        found,
        data_dir=data_dir,
        name=name or (slurm.worker_name() if slurm.is_inside() else f"{socket.gethostname()}:{os.getpid()}"),
        server=server,
        stop=stop,
        threads=threads,
    )
    try:
        return worker.work()
    except OSError as error:
        raise SweeperError(
            f"the data directory {data_dir} cannot be written",
            why=f"{error.strerror} ({error.filename})",
            do="Free some space or mend the disk; nothing is lost, run the same command again.",
        ) from error
    finally:
        worker.close()
        store.close()
