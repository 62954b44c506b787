"""Rows 5 to 7: kill the trainer, or everything, and see what it costs."""

from __future__ import annotations

import math
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from bench import processes, trace
from bench.contenders import Contender
from bench.processes import Failed
from bench.table import Cell, Missing, Series
from bench.trace import Event

Victim = Literal["trainer", "everything"]
EVERY_STEPS = 50
"""A checkpoint each half second: steps take 10 ms."""

START_S = 60.0
"""Nobody may take longer to start, or to start again."""


@dataclass(slots=True)
class Session:
    """One contender at work in a scratch directory, started again as often as needed."""

    contender: Contender
    directory: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    trace: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.trace, self.log = self.directory / "trace", self.directory / "log"

    def start(self) -> None:
        """Start the command; the same one continues."""
        env = {**self.contender.env, "BENCH_TRACE": str(self.trace)}
        self.process = processes.start(self.contender.argv(self.directory), log=self.log, env=env)

    def keep_alive(self) -> None:
        """Start the command again when it ended, as a user's shell loop or SLURM would."""
        if self.process is None or self.process.poll() is not None:
            self.restarts += 1
            if self.restarts > 200:
                raise Failed("it ends again and again")
            self.start()

    def wait_for_step(self, *, after_s: float, not_of: int = 0) -> Event:
        """The first step after a moment, of another process than `not_of`."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            newest = trace.tail(self.trace)
            if newest and newest.name == "step" and newest.at_s > after_s and newest.pid != not_of:
                return next(
                    event
                    for event in trace.read(self.trace)
                    if event.name == "step" and event.at_s > after_s and event.pid != not_of
                )
            self.keep_alive()
            time.sleep(0.002)
        raise Failed(f"no step within {START_S:.0f} s: {processes.last_line(self.log.read_bytes())}")

    def kill(self, victim: Victim) -> int:
        """Kill the trainer or everything; returns the trainer's pid."""
        newest = trace.tail(self.trace)
        assert newest is not None
        if victim == "trainer":
            processes.kill(newest.pid)
            if not self.contender.is_supervised and self.process is not None:
                processes.kill(self.process.pid)
        else:
            processes.kill_all()
        if (victim == "everything" or not self.contender.is_supervised) and self.process is not None:
            self.process.wait()
        return newest.pid


@contextmanager
def session(contender: Contender) -> Iterator[Session]:
    """A contender that has made its first steps."""
    with processes.scratch() as directory:
        running = Session(contender, directory)
        running.start()
        running.wait_for_step(after_s=0.0)
        yield running


def restart_s(contender: Contender, victim: Victim, *, repeats: int) -> Cell:
    """Seconds from the kill (of everything: from the next command) to the first new step."""
    seconds = []
    scratched = 0
    try:
        with session(contender) as running:
            for _ in range(repeats):
                time.sleep(3 * EVERY_STEPS * 0.010)
                killed_s = time.monotonic()
                pid = running.kill(victim)
                if victim == "everything":
                    killed_s = time.monotonic()
                if victim == "everything" or not contender.is_supervised:
                    running.start()
                step = running.wait_for_step(after_s=killed_s, not_of=pid)
                seconds.append(step.at_s - killed_s)
                scratched += step.step == 1
    except Failed as error:
        return Missing(str(error))
    return Series(tuple(seconds), note=f"{scratched} from scratch" if scratched else "")


def goodput(contender: Contender, victim: Victim, *, window_s: float, mean_s: float, step_s: float) -> Cell:
    """Steps that count × time of a step ÷ wall time, under the same kills for everybody."""
    gaps = gaps_s(round(window_s / mean_s), mean_s=mean_s)
    try:
        with session(contender) as running:
            first = next(event for event in trace.read(running.trace) if event.name == "step")
            for since_s in accumulate(gaps):
                _keep_until(running, first.at_s + since_s)
                running.kill(victim)
                running.keep_alive()
            _keep_until(running, first.at_s + window_s)
            end_s = time.monotonic()
            steps = [event for event in trace.read(running.trace) if event.name == "step"]
            done = steps[-1].step - first.step
    except Failed as error:
        return Missing(str(error))
    return Series((done * step_s / (end_s - first.at_s),), note=f"{len(gaps)} kills")


def gaps_s(count: int, *, mean_s: float) -> list[float]:
    """Exponential gaps with the given mean: its quantiles in a fixed order, so that a short window is typical."""
    quantiles = [-mean_s * math.log(1 - (index + 0.5) / count) for index in range(count)]
    random.Random(0).shuffle(quantiles)
    return quantiles


def _keep_until(running: Session, moment_s: float) -> None:
    while (left_s := moment_s - time.monotonic()) > 0:
        running.keep_alive()
        time.sleep(min(left_s, 0.01))


def young_daly(*, save_s: float, restart_s: float, mean_s: float) -> float:
    """The best goodput that is possible with checkpoints that cost `save_s`.

    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart
    dumps, FGCS 2006: T(w) = M e^(R/M) (e^((w+C)/M) - 1) per w of work, w = sqrt(2 C M) (Young 1974).
    """
    work_s = math.sqrt(2 * save_s * mean_s)
    total_s = mean_s * math.exp(restart_s / mean_s) * (math.exp((work_s + save_s) / mean_s) - 1)
    return work_s / total_s
