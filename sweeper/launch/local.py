"""Workers as processes of this machine: started, respawned while work is left, ended with us.

Each worker lives in a session of its own and holds the read end of a pipe; when this launcher
is gone the pipe ends, and the worker releases its run and goes.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sweeper import clock
from sweeper.errors import (
    EXIT_CONFIG,
    EXIT_FENCED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RELEASED,
    ConfigError,
    StorageError,
    SweeperError,
)
from sweeper.launch.progress import Display, final_report
from sweeper.launch.settings import thread_count
from sweeper.launch.tensorboard import Board, BoardSettings
from sweeper.reading import Reading
from sweeper.records import Sweep
from sweeper.report.hints import next_command
from sweeper.trainer.warm import Template, wants_plain

QUICK_DEATH_S = 5.0
MAX_QUICK_DEATHS = 5
POLL_S = 0.25


@dataclass(slots=True)
class Slot:
    """One worker's place: its name and devices stay, its process may change."""

    name: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    pipe: int | None = None
    started_at_s: float = 0.0
    quick_deaths: int = 0
    not_before_s: float = 0.0
    exit_code: int | None = None


def commands(sweep: str, *, n_workers: int) -> list[list[str]]:
    """The worker commands of a launch, one a slot."""
    host = socket.gethostname()
    return [
        [sys.executable, "-m", "sweeper", "worker", sweep, "--name", f"{host}:{index}"]
        for index in range(n_workers)
    ]


def run(
    sweep: Sweep,
    *,
    storage: str,
    data_dir: Path,
    num_left: int,
    is_detached: bool,
    template: Template | None = None,
) -> int:
    """Run workers until the sweep is complete or somebody stops us; returns the exit code.

    `template` is where workers' servers come from; without one each worker imports torch itself.
    """
    launcher = sweep.config["launcher"]
    num_workers = max(1, min(int(launcher["n_workers"]), num_left))
    slots = _slots(sweep.name, num_workers, launcher, storage=storage, data_dir=data_dir)
    if is_detached:
        return _detach(slots, sweep, storage=storage, data_dir=data_dir)
    stop_at_s = sweep.config.get("stop_at")
    if wants_plain(sweep.config):
        template = None
    return Local(
        sweep.name, slots, storage=storage, data_dir=data_dir, stop_at_s=stop_at_s, template=template,
        board=BoardSettings.from_config(sweep.config["tracking"]),
    ).follow()  # fmt: skip


def _slots(
    sweep: str, num_workers: int, launcher: dict[str, object], *, storage: str, data_dir: Path
) -> list[Slot]:
    # By what is configured, not by how many are left to start: the number of threads changes the bits.
    threads = thread_count(int(str(launcher["n_workers"])))
    gpus = int(str(launcher.get("gpus_per_worker") or 0))
    devices = _devices(gpus * num_workers) if gpus else []
    result = []
    for index in range(num_workers):
        environment = {
            **os.environ,
            "SWEEPER_STORAGE": storage,  # may hold a password: never on a command line
            "SWEEPER_DATA_DIR": str(data_dir),
            "SWEEPER_THREADS": str(threads),
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[index * gpus : (index + 1) * gpus])
        result.append(Slot(f"{socket.gethostname()}:{index}", environment))
    return result


def _devices(count: int) -> list[str]:
    """Ids of `count` devices, from CUDA_VISIBLE_DEVICES or counted from 0."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = (
        [name for name in given.split(",") if name]
        if given is not None
        else [str(index) for index in range(count)]
    )
    if len(ids) < count:
        raise ConfigError(
            f"launcher.gpus_per_worker asks for {count} devices in all, CUDA_VISIBLE_DEVICES={given!r} has {len(ids)}",
            do="Lower launcher.n_workers or launcher.gpus_per_worker.",
        )
    return ids


def _spawn(slot: Slot, sweep: str, *, stderr: int | None, stdin: int, server_fd: int | None = None) -> None:
    argv = [sys.executable, "-m", "sweeper", "worker", sweep, "--name", slot.name]
    if stdin != subprocess.DEVNULL:
        argv += ["--launcher-fd", "0"]
    if server_fd is not None:
        argv += ["--server-fd", str(server_fd)]
    slot.process = subprocess.Popen(
        argv, env=slot.environment, stdin=stdin, stdout=stderr, stderr=stderr,
        pass_fds=() if server_fd is None else (server_fd,), start_new_session=True,
    )  # fmt: skip
    slot.started_at_s = time.monotonic()
    slot.exit_code = None


def _detach(slots: list[Slot], sweep: Sweep, *, storage: str, data_dir: Path) -> int:
    log_path = data_dir / "sweep" / sweep.name / "workers.log"
    with open(log_path, "ab") as log:
        for slot in slots:
            _spawn(slot, sweep.name, stderr=log.fileno(), stdin=subprocess.DEVNULL)
            assert slot.process is not None
            print(f"worker {slot.name}: pid {slot.process.pid}")
    follow = next_command("status", sweep.name, "--watch", storage=storage, data_dir=data_dir)
    print(f"log: {log_path}\nfollow with: {follow}")
    return EXIT_OK


class Local:
    """Follows the workers of one launch."""

    def __init__(
        self,
        sweep: str,
        slots: list[Slot],
        *,
        storage: str,
        data_dir: Path,
        stop_at_s: float | None,
        template: Template | None = None,
        board: BoardSettings,
    ) -> None:
        self._sweep, self._slots, self._storage, self._data_dir = sweep, slots, storage, data_dir
        self._template, self._board = template, board
        self._stop_at_s = stop_at_s
        self._stop: int | None = None
        self._selector = selectors.DefaultSelector()
        self._partial: dict[int, bytes] = {}

    def follow(self) -> int:
        """Start, show, respawn; returns the exit code."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_signal)
        with (
            Display(self._sweep, storage=self._storage) as display,
            Board(self._board, say=display.line) as board,
        ):
            for slot in self._slots:
                self._start(slot)
            board.start()
            while any(slot.process is not None for slot in self._slots) or self._is_waiting():
                self._turn(display)
                board.look()
        return self._result()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stop is not None:  # the second time: now
            for slot in self._slots:
                if slot.process is not None:
                    slot.process.kill()
        self._stop = signum

    def _is_waiting(self) -> bool:
        return self._stop is None and any(slot.not_before_s for slot in self._slots)

    def _turn(self, display: Display) -> None:
        for key, _ in self._selector.select(timeout=POLL_S):
            self._read(key.fd, display.line)
        if self._stop is not None:
            if any(slot.pipe is not None for slot in self._slots):
                display.line(
                    "[LAUNCH] stopping: runs are checkpointed at their next step and released; again to kill"
                )
            self._ask_to_stop(display)
        for slot in self._slots:
            self._look_after(slot, display)
        display.refresh()

    def _read(self, fd: int, line: Callable[[str], None]) -> None:
        data = os.read(fd, 1 << 16)
        *lines, rest = (self._partial.get(fd, b"") + data).split(b"\n")
        self._partial[fd] = rest
        for text in lines:
            line(text.decode(errors="replace"))
        if not data:
            self._selector.unregister(fd)
            os.close(fd)

    def _ask_to_stop(self, display: Display) -> None:
        for slot in self._slots:
            slot.not_before_s = 0.0
            if slot.pipe is not None:
                with contextlib.suppress(OSError):
                    os.write(slot.pipe, f"stopped by {signal.Signals(self._stop or 0).name}".encode())
                os.close(slot.pipe)  # the worker sees the end of the pipe, releases and goes
                slot.pipe = None

    def _look_after(self, slot: Slot, display: Display) -> None:
        if slot.process is None:
            if slot.not_before_s and time.monotonic() >= slot.not_before_s:
                slot.not_before_s = 0.0
                self._start(slot)
            return
        code = slot.process.poll()
        if code is None:
            return
        slot.process, slot.exit_code = None, code
        if slot.pipe is not None:
            os.close(slot.pipe)
            slot.pipe = None
        if (
            self._stop is None
            and code not in (EXIT_OK, EXIT_CONFIG, EXIT_FENCED)
            and self._is_work_left(display)
        ):
            self._plan_respawn(slot, display, code)

    def _plan_respawn(self, slot: Slot, display: Display, code: int) -> None:
        # Somebody who kills workers is no reason to give up; a worker that cannot start is.
        quick = code > 0 and time.monotonic() - slot.started_at_s < QUICK_DEATH_S
        slot.quick_deaths = slot.quick_deaths + 1 if quick else 0
        if slot.quick_deaths > MAX_QUICK_DEATHS:
            display.line(
                f"[LAUNCH] worker {slot.name} died {slot.quick_deaths} times in a row right after its start; given up"
            )
            return
        wait_s = 0.5 * 2**slot.quick_deaths if slot.quick_deaths else 0.0
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        display.line(
            f"[LAUNCH] worker {slot.name} died ({why}); started again{f' in {wait_s:.0f} s' if wait_s else ''}"
        )
        slot.not_before_s = time.monotonic() + wait_s or 1e-9

    def _is_work_left(self, display: Display) -> bool:
        try:
            with Reading(self._storage) as reading:
                return not reading.progress(self._sweep)["is_complete"]
        except SweeperError as error:
            display.line(f"[LAUNCH] {error}")
            return isinstance(error, StorageError)  # it may come back; a sweep that is gone does not

    def _start(self, slot: Slot) -> None:
        out_r, out_w = os.pipe()
        in_r, in_w = os.pipe()
        server_fd = None if self._template is None else self._template.order(slot.environment)
        _spawn(slot, self._sweep, stderr=out_w, stdin=in_r, server_fd=server_fd)
        if server_fd is not None:
            os.close(server_fd)
        os.close(out_w)
        os.close(in_r)
        slot.pipe = in_w
        self._selector.register(out_r, selectors.EVENT_READ)

    def _result(self) -> int:
        self._drain()
        if self._stop is not None:
            print(
                f"sweep {self._sweep} was stopped; go on with: {self._command('resume', self._sweep)}",
                file=sys.stderr,
            )
            return EXIT_INTERRUPTED if self._stop == signal.SIGINT else EXIT_RELEASED
        codes = [slot.exit_code for slot in self._slots]
        for code in (EXIT_CONFIG, EXIT_FENCED):  # neither is better when it is tried again
            if code in codes:
                return code
        is_late = self._stop_at_s is not None and clock.wall_s() >= self._stop_at_s
        return final_report(self._sweep, storage=self._storage, data_dir=self._data_dir, is_late=is_late)

    def _command(self, *words: str) -> str:
        return next_command(*words, storage=self._storage, data_dir=self._data_dir)

    def _drain(self) -> None:
        """Print what dead workers had still said."""
        for key in list(self._selector.get_map().values()):
            os.set_blocking(key.fd, False)
            with contextlib.suppress(BlockingIOError):
                while data := os.read(key.fd, 1 << 16):
                    sys.stderr.write(data.decode(errors="replace"))
        self._selector.close()
