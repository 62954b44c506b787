"""A whole worker in a forked process: the real `sweeper.worker`, only its trainer runs inside it.

A test process with torch imported forks a child a case, which takes some tens of milliseconds. The
child works on a sweep of one trial: it draws or takes over the run, trains it with the real
`sweeper.torch.resumable`, and settles it. `fsops.probe` kills, fails or stops it at one operation.
What the next child makes of it must be what an undisturbed child makes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints, fsops, processes, recovery, rundir, search, supervisor, worker
from sweeper.channel import Message
from sweeper.database import create_database
from sweeper.errors import SweeperError
from sweeper.records import Ending, Lease, NewSweep, Run
from sweeper.search import Search
from sweeper.store import Store
from sweeper.torch import resumable, saves
from sweeper.trainer.main import train_and_tell
from sweeper.trainer.run import Spec

torch.set_num_threads(1)

SWEEP = "mini"
FIRST_RUN = "mini.r.00000"
CASE_LIMIT_S = 60
NUM_FORKS = 2
OPTUNA = {"completed": "COMPLETE", "pruned": "PRUNED"}
FILES = ("model.pth", "optimizer.pt", "rng_state.pt", "state.json")

Probe = Callable[[str, Path], None]
Trace = list[tuple[str, str]]


# --- the training --------------------------------------------------------------------------


def train(cfg: Any, run: Any) -> float:
    """Three steps an epoch, which use every generator; what a user would write."""
    x = torch.arange(24, dtype=torch.float32).reshape(12, 2) / 24
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(2, cfg.width), nn.Dropout(0.25), nn.Linear(cfg.width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    for inputs, targets in loop.batches(epochs=cfg.epochs):
        noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        optimizer.zero_grad()
        loss = ((model(inputs) - targets) ** 2).mean() * (1 + noise / 10)
        loss.backward()
        optimizer.step()
        loop.report(**{cfg.reports: loss.item()}, noise=noise)
    model.eval()
    with torch.no_grad():
        value = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().item()
    loop.report(loss=value)
    return value


def config(**changes: dict[str, Any]) -> dict[str, Any]:
    """What a launch of the one-trial sweep would store; `changes` are by group."""
    groups = {
        "sweep": {"name": SWEEP, "params": {"trainer.lr": "interval(0.01, 0.1)"}, "stop_after_s": None},
        "space": {"trainer.lr": search.distribution_of("trainer.lr", "interval(0.01, 0.1)")},
        "sampler": {"_target_": "optuna.samplers.RandomSampler"},
        "pruner": {"_target_": "optuna.pruners.NopPruner"},
        "launcher": {"kind": "local", "n_workers": 1},
        "trainer": {
            "_target_": "crash.mini.train",
            "lr": 0.1,
            "width": 3,
            "epochs": 2,
            "reports": "train_loss",
        },
        "checkpoint": {"every_n_steps": 2, "every_s": None, "keep_last": 2},
        "retry": {"max_lost": 20, "max_crashed": 0, "max_oom": 0},
        "resume": {"mode": "auto", "on_invalid": "fresh"},
        "lease": {"heartbeat_s": 10.0, "ttl_s": 60.0, "progress_s": 0, "grace_s": 5.0},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": {"enabled": False}},
    }
    made = {name: {**group, **changes.get(name, {})} for name, group in groups.items()}
    return {**made, "space": changes.get("space", groups["space"])}


class StoreLink:
    """A training's link straight to the store: what the supervisor does with its messages.

    A poll looks at the lease itself, as `WorkerLink` looks at the deadline that stands for it.
    """

    def __init__(
        self, store: Store, search: Search, run: Run, lease: Lease, on_start: supervisor.OnStart
    ) -> None:
        self._store, self._search, self._run, self._lease, self._on_start = (
            store,
            search,
            run,
            lease,
            on_start,
        )
        self.stop_reason: str | None = None
        self.said: Message | None = None
        self.refusals: list[str] = []

    def poll(self) -> None:
        self._store.check(self._lease)

    def tell(self, kind: str, **data: Any) -> None:
        if kind == "refused":
            self.refusals.append(f"step {data['step']}: {data['reason']}")
            worker.log(f"[RESUME] checkpoint step {data['step']} refused: {data['reason']}")
        elif kind == "complaint":
            worker.log(f"[CHECKPOINT] {data['text']}")
        elif kind != "progress":
            self.said = {"kind": kind, **data}

    def ask(self, kind: str, **data: Any) -> Message:
        self.poll()
        if kind in ("started", "resumed"):
            total = data.get("total_steps")
            self._store.record_start(self._lease, step=data["step"], total_steps=total)
            if kind == "started":
                self._on_start(data["step"], {})
        elif kind == "committed":
            self._store.record_checkpoint(self._lease, step=data["step"])
        elif kind == "report":
            return {"prune": self._judge(**data)}
        elif kind != "lease":
            raise AssertionError(f"the link does not know the question {kind}")
        return {}

    def _judge(self, *, step: int, value: float) -> bool:
        stored = self._store.verdict(self._run.trial_id, step)
        if stored is not None:
            return stored
        prune, attrs = self._search.judge(self._run, step=step, value=value)
        self._store.report(self._lease, self._run, step=step, value=value, prune=prune, system_attrs=attrs)
        return prune


class InlineSupervisor:
    """Runs the trainer's own code in this very process instead of supervising another."""

    def __init__(self, store: Store, *, search: Search, **_: object) -> None:
        self._store, self._search = store, search

    def run(
        self, run: Run, lease: Lease, spec: Spec, log_path: Path, *, on_start: supervisor.OnStart
    ) -> Ending:
        link = StoreLink(self._store, self._search, run, lease, on_start)
        train_and_tell(spec, link)  # type: ignore[arg-type]  # it needs no more than a Link
        assert link.said is not None
        return supervisor._told_ending(link.said)


# --- places ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A data directory with the database of the sweep in it."""

    data_dir: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.data_dir}/sweeper.db"

    @property
    def log(self) -> Path:
        """What the children of this place printed."""
        return self.data_dir / "log.txt"

    def run_dir(self, run_id: str = FIRST_RUN) -> Path:
        return self.data_dir / "sweep" / SWEEP / "runs" / run_id

    def root(self, run_id: str = FIRST_RUN) -> Path:
        return self.run_dir(run_id) / "checkpoints"

    def copy(self, target: Path) -> Place:
        """The same state somewhere else; nobody may be at work in it."""
        shutil.copytree(self.data_dir, target, symlinks=True)
        return Place(target)

    def rows(self, sql: str) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.data_dir / "sweeper.db")) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(sql)]

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@contextlib.contextmanager
def fast_dir() -> Iterator[Path]:
    """A directory in memory where there is one: what is tested is the order of operations."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sweeper-crash-", dir=base) as name:
        yield Path(name)


def new_place(data_dir: Path, **changes: dict[str, Any]) -> Place:
    """A data directory with a database that holds the sweep; no run was drawn yet."""
    place = Place(data_dir)
    data_dir.mkdir()
    create_database(place.url)
    store = Store(place.url)
    made = config(**changes)
    points = search.grid(made["space"]) if search.is_grid(made["sampler"]) else ()
    store.create_sweep(NewSweep(SWEEP, 7, max(1, len(points)), "loss", "minimize", made, points))
    store.close()
    return place


def warm_up() -> None:
    """Work once in this very process, so that children find everything imported and compiled."""
    from sweeper.trainer import server

    server.warm_up()
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in signals]
    supervisor_class, back_off_s = worker.Supervisor, recovery.MAX_BACK_OFF_S
    with fast_dir() as path, contextlib.redirect_stderr(io.StringIO()):
        try:
            assert work(new_place(path / "warm"))() == 0
        finally:
            worker.Supervisor, recovery.MAX_BACK_OFF_S = supervisor_class, back_off_s  # type: ignore[misc]
            signal.set_wakeup_fd(-1)
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)


# --- children --------------------------------------------------------------------------------


def forked(function: Callable[[], int], *, log: Path) -> int:
    """Run `function` in a forked child and return its wait status. It cannot hang for ever."""
    return wait(start(function, log=log))


def start(function: Callable[[], int], *, log: Path) -> int:
    """Fork a child that runs `function` and exits with what it returns; returns its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 97
    try:
        processes.die_with_parent(parent)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler is not for us
        signal.alarm(CASE_LIMIT_S)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
        code = function()
    except BaseException:  # noqa: BLE001 - nothing may return into the frames of pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The wait status of a child."""
    return os.waitpid(pid, 0)[1]


def was_killed(status: int) -> bool:
    """Whether a wait status says SIGKILL."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def work(place: Place, *, probe: Probe | None = None) -> Callable[[], int]:
    """What a worker process does, from opening the database to its exit code."""

    def run() -> int:
        worker.Supervisor = InlineSupervisor  # type: ignore[assignment,misc]  # in this child only
        recovery.MAX_BACK_OFF_S = 0.0
        worker.DISK_REST_S = 0.0
        saves.BESIDE_FROM_S = float("inf")  # on a slow machine, too: no saver without a link to the store
        if probe is not None:
            fsops.probe = probe
        try:
            return worker._work(
                SWEEP, storage=place.url, data_dir=place.data_dir, name="w0",
                server=None, stop=worker.StopFlag(),  # type: ignore[arg-type]
            )  # fmt: skip
        except SweeperError as error:
            worker.log(f"sweeper: {error}")
            return error.exit_code

    return run


def finish(place: Place, *, probe: Probe | None = None) -> int:
    """Let a worker work in a forked child; returns its wait status."""
    return forked(work(place, probe=probe), log=place.log)


# --- probes ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Tracing:
    """Writes down every operation, as (operation, path below the data directory)."""

    data_dir: Path
    target: Path

    def __call__(self, operation: str, path: Path) -> None:
        with open(self.target, "a") as file:
            file.write(json.dumps([operation, os.path.relpath(path, self.data_dir)]) + "\n")


@dataclass(slots=True)
class Watching:
    """Prints which checkpoints there are when each new one is begun."""

    root: Path

    def __call__(self, operation: str, path: Path) -> None:
        if operation == "mkdir" and path.name.startswith(".tmp-"):
            steps = [step for step, _ in checkpoints.steps_on_disk(self.root)]
            print("STEPS", json.dumps(steps), flush=True)

    @staticmethod
    def seen(place: Place) -> list[list[int]]:
        lines = place.printed().splitlines()
        return [json.loads(line.removeprefix("STEPS ")) for line in lines if line.startswith("STEPS ")]


def traced(place: Place, target: Path) -> Trace:
    """Let a worker finish undisturbed; returns the operations it did."""
    assert finish(place, probe=Tracing(place.data_dir, target)) == 0, place.printed()
    return [(operation, path) for operation, path in map(json.loads, target.read_text().splitlines())]


@dataclass(slots=True)
class KillAt:
    """SIGKILL in place of operation number `at`."""

    at: int
    count: int = 0

    def __call__(self, operation: str, path: Path) -> None:
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


@dataclass(slots=True)
class StopAt:
    """SIGSTOP before operation number `at`."""

    at: int
    count: int = 0

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.at + 1:
            signal.alarm(0)  # its time stands still as well
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.alarm(CASE_LIMIT_S)


@dataclass(slots=True)
class FailAt:
    """OSError in place of operation number `at`, and of all later ones when the disk stays bad."""

    at: int
    errno: int
    stays: bool = False
    count: int = 0

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.at + 1 or (self.stays and self.count > self.at):
            raise OSError(self.errno, os.strerror(self.errno), str(path))


def kind_of(operation: str, path: str) -> str:
    """An operation without the parts of its path that are random: what it does to what."""
    name = Path(path).name
    parent = Path(path).parent.name
    for mark, word in ((".tmp-", "draft"), (".aside-", "aside"), (".metrics", ".metrics")):
        if name.startswith(mark):
            return f"{operation} {word}"
        if parent.startswith(mark):
            return f"{operation} {word}/{name}"
    if fsops.is_temporary(name):
        name = "." + name[1:].rsplit(".", 2)[0]
    if parent in (checkpoints.TRASH, checkpoints.CONDEMNED):
        name = f"{parent}/…"
    return f"{operation} {name}"


# --- many cases ------------------------------------------------------------------------------


def failures(check: Callable[[int, Path], str | None], cases: Sequence[int]) -> list[str]:
    """Run `check(case, empty directory)` for all cases, two at a time; returns what they found wrong."""
    with fast_dir() as base:

        def share(index: int) -> Callable[[], int]:
            def run() -> int:
                signal.alarm(0)
                gc.freeze()
                for case in cases[index::NUM_FORKS]:
                    place = base / f"case-{index}"
                    found = check(case, place)
                    shutil.rmtree(place, ignore_errors=True)
                    if found:
                        print(json.dumps(f"operation {case}: {found}"))
                return 0

            return run

        logs = [base / f"share-{index}.txt" for index in range(NUM_FORKS)]
        pids = [start(share(index), log=log) for index, log in enumerate(logs)]
        statuses = [wait(pid) for pid in pids]
        lines = [line for log in logs for line in log.read_text().splitlines()]
    assert statuses == [0] * NUM_FORKS, "\n".join(lines)
    return [str(json.loads(line)) for line in lines]


def damage(step_dir: Path, name: str = "model.pth", *, at: int = 100) -> None:
    """Flip one bit of one file of a checkpoint, as a disk would."""
    data = bytearray((step_dir / name).read_bytes())
    data[at] ^= 1
    (step_dir / name).write_bytes(data)


# --- what must be true in the end ------------------------------------------------------------


def broken_order(place: Place) -> str | None:
    """What a crash may leave at no moment: a final state without its result, training without a marker."""
    for run in place.rows("SELECT run_id, state FROM sweeper_run"):
        run_dir = place.run_dir(run["run_id"])
        has_result = (run_dir / rundir.RESULT_FILE).exists()
        if run["state"] in OPTUNA and not has_result:
            return f"{run['run_id']} is {run['state']} in the database, and has no result.json"
        is_open = run["state"] in ("running", "interrupted")
        has_begun = has_result or (run_dir / rundir.METRICS_FILE).exists()
        if is_open and has_begun and not rundir.marker_path(run_dir).exists():
            return f"{run['run_id']} is {run['state']}, and has no marker"
    return None


@dataclass(frozen=True, slots=True)
class Final:
    """What an undisturbed worker leaves behind, as far as it may not depend on disturbances."""

    files: dict[str, bytes]
    metrics: bytes
    value: float
    state: str
    step: int
    problems: list[str] = field(default_factory=list)

    def differs(self, other: Final) -> str | None:
        """What is wrong with `other`, the end of a disturbed run; None if nothing."""
        found = list(other.problems)
        found += [
            f"{name} has other bytes" for name in self.files if self.files[name] != other.files.get(name)
        ]
        if self.metrics != other.metrics:
            found.append(f"metrics.jsonl is {other.metrics.decode(errors='replace')!r}")
        for name in ("state", "step", "value"):
            if getattr(self, name) != getattr(other, name):
                found.append(f"the {name} is {getattr(other, name)}, not {getattr(self, name)}")
        return "; ".join(found) or None


def final(place: Place) -> Final:
    """Read the end of the sweep from disk and database, and note what should not be there."""
    runs = place.rows("SELECT * FROM sweeper_run ORDER BY number")
    last = runs[-1]
    problems = [*_wrong_rows(place, runs), *_wrong_files(place, runs)]
    step, step_dir = _newest(place, last["run_id"])
    files = {name: (step_dir / name).read_bytes() if (step_dir / name).exists() else b"" for name in FILES}
    log = place.run_dir(last["run_id"]) / rundir.METRICS_FILE
    return Final(
        files, log.read_bytes() if log.exists() else b"", last["value"], last["state"], step, problems
    )


def _newest(place: Place, run_id: str) -> tuple[int, Path]:
    found = checkpoints.steps_on_disk(place.root(run_id))
    return found[0] if found else (0, place.root(run_id))


def _wrong_rows(place: Place, runs: list[dict[str, Any]]) -> Iterator[str]:
    states = [run["state"] for run in runs]
    if states[:-1] != ["superseded"] * (len(runs) - 1) or states[-1] not in OPTUNA:
        yield f"the runs are {states}"
    for run in runs:
        if run["owner_token"] is not None or run["lease_until"] is not None:
            yield f"{run['run_id']} still has a lease"
        attempts = place.rows(
            f"SELECT * FROM sweeper_attempt WHERE run_id='{run['run_id']}' ORDER BY attempt"
        )
        epochs = [attempt["lease_epoch"] for attempt in attempts]
        if epochs != sorted(set(epochs)) or any(attempt["outcome"] is None for attempt in attempts):
            yield f"{run['run_id']} has the attempts {[(a['lease_epoch'], a['outcome']) for a in attempts]}"
    trials = place.rows("SELECT t.state, v.value FROM trials t LEFT JOIN trial_values v USING (trial_id)")
    if trials != [{"state": OPTUNA.get(states[-1]), "value": runs[-1]["value"]}]:
        yield f"Optuna has the trials {trials}"


def _wrong_files(place: Place, runs: list[dict[str, Any]]) -> Iterator[str]:
    for path in sorted(place.data_dir.rglob("*")):
        name = path.name
        is_left = name.endswith((".tmp", ".incomplete")) or name.startswith((".tmp-", ".aside-", ".trash"))
        if is_left and not _is_in_shell(place, path):
            yield f"{path.relative_to(place.data_dir)} is left"
    for run, successor in zip(runs, [*runs[1:], None], strict=True):
        expected = {"state": run["state"], "value": run["value"], "by": successor and successor["run_id"]}
        try:
            result = rundir.read_result(place.run_dir(run["run_id"])) or {}
        except rundir.Damaged as error:
            result = {"state": str(error)}
        if {key: result.get(key) for key in expected} != expected:
            yield f"result.json of {run['run_id']} is {result}"
    last = runs[-1]["run_id"]
    starts = place.rows(f"SELECT lease_epoch, start_step FROM sweeper_attempt WHERE run_id='{last}'")
    known = [(row["lease_epoch"], row["start_step"]) for row in starts if row["start_step"] is not None]
    for found in checkpoints.inspect(place.root(last), run_id=last, starts=known):
        if found.reason is not None:
            yield f"{found.directory.name}: {found.reason}"
    stages = rundir.read_json(place.root(last) / checkpoints.STAGES)["stages"]
    if stages != [{"name": "train", "state": runs[-1]["state"], "global_step": _newest(place, last)[0]}]:
        yield f"the stages are {stages}"


def _is_in_shell(place: Place, path: Path) -> bool:
    """Below a directory that a superseder was killed in before it was a run's: a gap in the numbers."""
    run_dir = place.data_dir / Path(*path.relative_to(place.data_dir).parts[:4])
    return rundir.RUN_ID.match(run_dir.name) is not None and not (run_dir / rundir.RUN_FILE).exists()


def is_stopped(pid: int) -> bool:
    """Wait until child `pid` has stopped itself (True) or ended (False)."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return os.WIFSTOPPED(status)


def read_pointer(root: Path) -> dict[str, Any]:
    """The pointer of a run."""
    return rundir.read_json(root / checkpoints.POINTER)
