"""One attempt under supervision: start a trainer, keep the lease, hear it out, say how it ended.

Single-threaded on purpose: heartbeats, the trainer's messages, its death, the launcher's pipe
and signals are events of one loop, so nothing can die unseen beside it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper import clock, processes
from sweeper.channel import Channel, ChannelClosed, Message
from sweeper.errors import Fenced, StorageError
from sweeper.records import Ending, Lease, ProcessId, Run
from sweeper.recovery import signal_outcome
from sweeper.search import Search
from sweeper.states import Outcome
from sweeper.store import Store
from sweeper.trainer.run import Spec, in_attempt
from sweeper.trainer.warm import TrainerServer

OnStart = Callable[[int, dict[str, Any]], None]

DEATH = "death"
LAST_LINES = 20
HELLO_WAIT_S = 300.0
GOODBYE_WAIT_S = 30.0
RENEW_AGAIN_S = 1.0
_MAX_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """`lease.*` of the configuration, in seconds."""

    heartbeat_s: float = 10.0
    ttl_s: float = 60.0
    progress_s: float = 1800.0
    grace_s: float = 30.0
    ranks_s: float = 300.0

    @property
    def fence_s(self) -> float:
        """An owner that could not renew for so long fences itself: two thirds of the TTL."""
        return self.ttl_s * 2 / 3


@dataclass(slots=True)
class Attempt:
    """What the supervisor knows of the trainer while it runs."""

    channel: Channel
    saver: Channel
    spec: Spec
    log_path: Path
    trainer: ProcessId | None = None
    step: int = 0
    said: Message | None = None
    heard_at_s: float = field(default_factory=clock.awake_s)
    kill_reason: Ending | None = None
    exit_status: int | None = None
    on_start: OnStart = lambda step, devices: None
    has_saver: bool = False


class Supervisor:
    """Runs attempts of one worker, one at a time.

    Args:
        store: The database.
        search: Judges reports.
        times: Heartbeat and time-outs.
        server: Where trainers come from.
        log: Prints one line for people.
        stop_reason: Says why this worker should stop, or None.
        wake_fds: File descriptors whose readability must wake the loop (signals, launcher).
        tick: Called once a turn of the loop, for tracking.
        on_save: Told how long each save took.
        fenced: Says who has taken everything over, or nothing; then the attempt ends at once.
    """

    def __init__(
        self,
        store: Store,
        *,
        search: Search,
        times: LeaseTimes,
        server: TrainerServer,
        log: Callable[[str], None],
        stop_reason: Callable[[], str | None],
        wake_fds: tuple[int, ...] = (),
        tick: Callable[[], None] = lambda: None,
        on_save: Callable[[float], None] = lambda seconds: None,
        fenced: Callable[[], str] = lambda: "",
    ) -> None:
        self._store, self._search, self._times, self._server = store, search, times, server
        self._log, self._stop_reason, self._wake_fds, self._tick = log, stop_reason, wake_fds, tick
        self._on_save, self._fenced = on_save, fenced

    def run(self, run: Run, lease: Lease, spec: Spec, log_path: Path, *, on_start: OnStart) -> Ending:
        """Train one attempt to its end. The trainer and all it started are gone afterwards.

        `on_start` is called with the step where the trainer says that it starts, and its GPUs: its metrics
        log is cut by then.
        """
        oom_before = oom_kills()
        log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            channel, saver = self._server.spawn(spec, log_fd)
        finally:
            os.close(log_fd)
        attempt = Attempt(channel, saver, spec, log_path, step=run.global_step, on_start=on_start)
        try:
            self._loop(run, lease, attempt)
        finally:
            self._end(attempt)
        return self._ending(attempt, was_oom_killed=oom_kills() > oom_before)

    # --- the loop --------------------------------------------------------------------------

    def _loop(self, run: Run, lease: Lease, attempt: Attempt) -> None:
        started = clock.awake_s()
        renewed_boot_s = clock.boot_s()
        next_beat_s = started + self._times.heartbeat_s
        stop_at_s: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(attempt.channel, selectors.EVENT_READ)
            selector.register(attempt.saver, selectors.EVENT_READ)
            for fd in self._wake_fds:
                selector.register(fd, selectors.EVENT_READ)
            selector.register(self._server, selectors.EVENT_READ, DEATH)
            while not self._is_over(attempt):
                ready = selector.select(timeout=max(0.0, min(next_beat_s - clock.awake_s(), 0.5)))
                is_dead = any(key.data == DEATH for key, _ in ready)
                for key, _ in ready:
                    if key.fileobj is attempt.channel or (
                        key.fileobj is attempt.saver and not attempt.saver.is_closed
                    ):
                        continue
                    selector.unregister(key.fileobj)  # it woke us once; stop_reason() knows why
                now = clock.awake_s()
                if now >= next_beat_s:
                    before, renewed_boot_s = renewed_boot_s, self._beat(lease, attempt, renewed_boot_s)
                    is_renewed = renewed_boot_s > before
                    next_beat_s = now + (self._times.heartbeat_s if is_renewed else RENEW_AGAIN_S)
                self._listen(run, lease, attempt)
                if is_dead:  # whatever else may hold its end of the channel open
                    break
                self._tick()
                self._store.rest()
                stop_at_s = self._check_times(attempt, started, stop_at_s)

    def _listen(self, run: Run, lease: Lease, attempt: Attempt) -> None:
        for channel in (attempt.channel, attempt.saver):
            for message in [] if channel.is_closed else channel.receive():
                if attempt.kill_reason is None:
                    self._hear(message, channel, run, lease, attempt)

    def _is_over(self, attempt: Attempt) -> bool:
        return attempt.channel.is_closed or attempt.kill_reason is not None

    def _beat(self, lease: Lease, attempt: Attempt, renewed_boot_s: float) -> float:
        before = clock.boot_s()
        try:
            self._store.renew(lease, global_step=attempt.step)
        except Fenced as error:
            attempt.kill_reason = Ending(Outcome.FENCED, str(error))
        except StorageError as error:
            self._log(f"[LEASE] {lease.run_id}: could not be renewed: {error}")
            if before > renewed_boot_s + self._times.fence_s:
                attempt.kill_reason = Ending(
                    Outcome.FENCED, f"the lease could not be renewed in time: {error}"
                )
        else:
            renewed_boot_s = before
            self._tell(attempt.channel, "deadline", at=before + self._times.fence_s)
            if attempt.has_saver:  # it may be busy for long, or stopped: a full socket is no reason to wait
                with contextlib.suppress(ChannelClosed):
                    attempt.saver.offer("deadline", at=before + self._times.fence_s)
        return renewed_boot_s

    def _check_times(self, attempt: Attempt, started: float, stop_at_s: float | None) -> float | None:
        now = clock.awake_s()
        if attempt.trainer is None and now - started > HELLO_WAIT_S:
            attempt.kill_reason = Ending(
                Outcome.LOST, f"the trainer did not start within {HELLO_WAIT_S:.0f} s"
            )
        is_silent = attempt.trainer is not None and now - attempt.heard_at_s > self._times.progress_s
        if self._times.progress_s and is_silent:
            attempt.kill_reason = Ending(
                Outcome.LOST,
                f"no progress for {self._times.progress_s:.0f} s (lease.progress_s; call run.progress() in long evaluations)",
            )
        if taken := self._fenced():
            attempt.kill_reason = Ending(Outcome.FENCED, taken)
        reason = self._stop_reason()
        if reason and stop_at_s is None:
            self._tell(attempt.channel, "stop", reason=reason)
            return now + self._times.grace_s
        if stop_at_s is not None and now > stop_at_s:
            attempt.kill_reason = Ending(
                Outcome.PREEMPTED, f"{reason}; no step boundary within {self._times.grace_s:.0f} s"
            )
        return stop_at_s

    def _tell(self, channel: Channel, kind: str, **data: Any) -> None:
        with contextlib.suppress(ChannelClosed):
            channel.send(kind, **data)

    # --- what the trainer says -------------------------------------------------------------

    def _hear(self, message: Message, channel: Channel, run: Run, lease: Lease, attempt: Attempt) -> None:
        attempt.heard_at_s = clock.awake_s()
        kind = message["kind"]
        if kind == "hello":
            self._greet(message, lease, attempt)
        elif kind == "progress":
            attempt.step = message["step"] if message.get("step") is not None else attempt.step
        elif kind == "refused":
            self._log(
                f"[RESUME] {run.run_id}: checkpoint step {message['step']} refused: {message['reason']}"
            )
        elif kind == "complaint":
            self._log(f"[CHECKPOINT] {run.run_id}: {message['text']}")
        elif kind in ("started", "resumed", "lease", "committed", "report"):
            self._answer(message, channel, run, lease, attempt)
        elif kind == "saver":  # it listens: before, what it is told would only fill its socket
            attempt.has_saver = True
        else:
            attempt.said = message

    def _greet(self, message: Message, lease: Lease, attempt: Attempt) -> None:
        attempt.trainer = processes.identify(int(message["pid"]))
        try:
            self._store.record_processes(lease, [attempt.trainer])
        except Fenced as error:
            attempt.kill_reason = Ending(Outcome.FENCED, str(error))

    def _answer(self, message: Message, channel: Channel, run: Run, lease: Lease, attempt: Attempt) -> None:
        """Answer a question of the trainer; the lease is looked at in the database each time."""
        try:
            answer = self._act(message, run, lease, attempt)
        except Fenced as error:
            attempt.kill_reason = Ending(Outcome.FENCED, str(error))
            answer = {"fenced": str(error)}
        self._tell(channel, "answer", **answer)

    def _act(self, message: Message, run: Run, lease: Lease, attempt: Attempt) -> Message:
        kind = message["kind"]
        if kind == "started":
            attempt.step = message["step"]
            devices = message.get("devices") or {}
            self._store.record_start(
                lease, step=message["step"], total_steps=message["total_steps"],
                num_gpus=int(devices.get("gpu_count", 0)) * attempt.spec.num_nodes,
            )  # fmt: skip
            attempt.on_start(attempt.step, devices)
        elif kind == "resumed":
            self._log(f"[RESUME] {run.run_id}: going on from step {message['step']}")
            self._store.record_start(lease, step=message["step"], total_steps=None)
        elif kind == "lease":
            self._store.check(lease)
        elif kind == "committed":
            seconds = float(message.get("seconds", 0.0))
            self._store.record_checkpoint(lease, step=message["step"], seconds=seconds)
            self._on_save(seconds)
        elif kind == "report":
            return {"prune": self._judge(run, lease, step=message["step"], value=message["value"])}
        return {}

    def _judge(self, run: Run, lease: Lease, *, step: int, value: float) -> bool:
        """The stored verdict for a step that is replayed; else the pruner's, stored with the report."""
        stored = self._store.verdict(run.trial_id, step)
        if stored is not None:
            return stored
        prune, attrs = self._search.judge(run, step=step, value=value)
        self._store.report(lease, run, step=step, value=value, prune=prune, system_attrs=attrs)
        return prune

    # --- the end ---------------------------------------------------------------------------

    def _end(self, attempt: Attempt) -> None:
        """Wait for a trainer that said goodbye, kill one that did not, and all it started."""
        if attempt.kill_reason is None:
            attempt.exit_status = self._server.wait(wait_s=GOODBYE_WAIT_S)
        if self._server.has_trainer and attempt.trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(attempt.trainer.pid, signal.SIGKILL)
            attempt.exit_status = self._server.wait(wait_s=GOODBYE_WAIT_S)
        if attempt.exit_status is None:  # the server died or hangs, perhaps before anything had begun
            self._server.stop()
            tag = in_attempt(attempt.spec.run_dir, attempt.spec.lease_epoch)
            processes.kill_leftovers([attempt.trainer] if attempt.trainer else [], attempt_tag=tag)
        attempt.channel.close()
        attempt.saver.close()

    def _ending(self, attempt: Attempt, *, was_oom_killed: bool) -> Ending:
        if attempt.kill_reason is not None:
            return attempt.kill_reason
        if attempt.said is not None:
            printed = "" if attempt.said.get("detail", "-") else last_lines(attempt.log_path)
            return _told_ending(attempt.said, was_oom_killed=was_oom_killed, printed=printed)
        return silent_ending(
            attempt.exit_status, was_oom_killed=was_oom_killed, detail=last_lines(attempt.log_path)
        )


def _told_ending(said: Message, *, was_oom_killed: bool = False, printed: str = "") -> Ending:
    kind, reason = said["kind"], said.get("reason", "")
    if kind == "result":
        return Ending(Outcome.COMPLETED, value=said["value"])
    if kind == "pruned":
        return Ending(Outcome.PRUNED, reason, value=said["value"])
    if kind == "preempted":
        return Ending(Outcome.PREEMPTED, reason)
    if kind == "fenced":
        return Ending(Outcome.FENCED, reason)
    if kind == "no_checkpoint":
        return Ending(Outcome.CRASHED, reason, no_checkpoint=True)
    if said["is_bad_value"]:
        return Ending(Outcome.CRASHED, reason, detail=said["detail"], is_hopeless=True)
    if said["is_config"]:
        return Ending(Outcome.PREEMPTED, reason, is_config=True)
    if said["is_disk_fault"]:
        return Ending(Outcome.LOST, reason, detail=said["detail"], is_disk_fault=True)
    is_oom = said["is_oom"] or (said["is_lost"] and was_oom_killed)  # it was no trainer that was killed
    outcome = Outcome.OOM if is_oom else Outcome.LOST if said["is_lost"] else Outcome.CRASHED
    return Ending(outcome, reason, detail=said["detail"] or printed)


def silent_ending(status: int | None, *, was_oom_killed: bool, detail: str) -> Ending:
    """How a trainer ended that said nothing, from its wait status."""
    if status is None:
        return Ending(Outcome.LOST, "the warm server died, and the trainer with it", detail=detail)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name
        why = "the kernel ran out of memory" if was_oom_killed else f"the trainer was ended by {name}"
        return Ending(signal_outcome(number, was_oom_killed=was_oom_killed), why, detail=detail)
    code = os.WEXITSTATUS(status)
    return Ending(
        Outcome.CRASHED, f"the trainer exited with code {code} without returning a value", detail=detail
    )


def last_lines(path: Path) -> str:
    """The last lines an attempt printed."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _MAX_TAIL_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LAST_LINES:])
    except OSError:
        return ""


def oom_kills() -> int:
    """How often the kernel's OOM killer struck in this process's control group.

    Source: cgroup-v2.rst, memory.events; memory.oom_control for version 1. 0 where there is none.
    """
    try:
        text = Path("/proc/self/cgroup").read_text()
    except OSError:
        return 0
    total = 0
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        name = (
            f"/sys/fs/cgroup/memory{path}/memory.oom_control"
            if controllers == "memory"
            else f"/sys/fs/cgroup{path}/memory.events"
        )
        with contextlib.suppress(OSError, ValueError, IndexError):
            for row in Path(name).read_text().splitlines():
                if row.startswith("oom_kill "):
                    total += int(row.split()[1])
    return total
