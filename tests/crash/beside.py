"""Workers of `crash.mini` whose checkpoints are all saved beside the training, by a forked saver.

The saver is the real one, `sweeper.trainer.saver.serve`, with a probe of its own. Where the trainer
would look whether a save has ended, it waits for that instead, one step later: so each run saves
after the same steps.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash import mini
from crash.mini import CASE_LIMIT_S, InlineSupervisor, Place, Probe, StoreLink, Trace, Tracing

from sweeper import fsops, images, processes
from sweeper.store import Store
from sweeper.torch import loop, saves
from sweeper.trainer import saver


class Supervisor(InlineSupervisor):
    """Remembers whose attempt it is, for the saver's own link."""

    owner: tuple[Any, Any] = (None, None)

    def run(self, run: Any, lease: Any, *args: Any, **more: Any) -> Any:
        Supervisor.owner = (run, lease)
        return super().run(run, lease, *args, **more)


@dataclass(frozen=True, slots=True)
class Forked:
    """A saver that was forked."""

    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def work(place: Place, *, probe: Probe | None = None) -> Callable[[], int]:
    """What a worker does; `probe` sees the operations of its first saver."""
    probes = itertools.chain([probe], itertools.repeat(None))

    def start_saver(fd: int, channel_fd: int) -> Forked:
        return fork_saver(place, fd, next(probes))

    def run() -> int:
        mini.InlineSupervisor = Supervisor  # type: ignore[misc]  # all this in this child only
        saves.BESIDE_FROM_BYTES = 0
        loop.Saves = Steady  # type: ignore[misc]
        saver.start_process = start_saver
        return mini.work(place)()

    return run


class Steady(saves.Saves):
    """Waits for a save in flight at the boundary after the one it was begun at."""

    _is_fresh = False

    def begin(self, *args: Any, wait: bool, **more: Any) -> bool:
        has_begun = super().begin(*args, wait=wait, **more)
        self._is_fresh = has_begun and not wait
        return has_begun

    def poll(self) -> Any:
        if self._is_fresh and self.is_busy:
            self._is_fresh = False
            return None
        return self.wait()


def fork_saver(place: Place, fd: int, probe: Probe | None) -> Forked:
    """Fork a process that serves as the saver at `fd`, linked to the store."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return Forked(pid)
    try:
        signal.alarm(CASE_LIMIT_S)
        processes.die_with_parent(parent)
        images._DIRECT_FROM_BYTES, images._CHUNK_BYTES = 1, images.PAGE_BYTES  # as large files are written
        fsops.probe = probe or fsops._no_probe
        run, lease = Supervisor.owner
        link = StoreLink(Store(place.url), None, run, lease, lambda: None)  # type: ignore[arg-type]
        saver.serve(socket.socket(fileno=os.dup(fd)), None, link=link)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing may return into the frames of pytest
        traceback.print_exc()
    finally:
        os._exit(98)


def finish(place: Place, *, probe: Probe | None = None) -> int:
    """Let a worker with savers work in a forked child; returns its wait status."""
    return mini.forked(work(place, probe=probe), log=place.log)


def traced(place: Place, target: Path) -> Trace:
    """Let a worker finish undisturbed; returns the operations of its saver."""
    assert finish(place, probe=Tracing(place.data_dir, target)) == 0, place.printed()
    return [(operation, path) for operation, path in map(json.loads, target.read_text().splitlines())]


# --- probes of a saver -----------------------------------------------------------------------


@dataclass(slots=True)
class KillBothAt:
    """SIGKILL of trainer and saver in place of operation number `at`, as a machine that loses power."""

    at: int
    count: int = 0

    def __call__(self, operation: str, path: Path) -> None:
        if self.count == self.at:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


@dataclass(slots=True)
class StopBothAt:
    """SIGSTOP of trainer and saver before operation number `at`."""

    at: int
    count: int = 0

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self.at + 1:
            signal.alarm(0)  # its time stands still as well
            os.kill(os.getppid(), signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            signal.alarm(CASE_LIMIT_S)


__all__ = ["KillBothAt", "StopBothAt", "Tracing", "finish", "traced", "work"]
