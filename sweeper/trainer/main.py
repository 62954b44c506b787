"""What one trainer process does: take its identity, train, and say how it ended.

Called in a child of the warm server (`sweeper.trainer.server`), or in a plain process:
`python -m sweeper.trainer.main FD LOG_FD SAVER_FD PARENT_PID`, which reads the request from its stdin.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sweeper import manifests, processes, rundir
from sweeper.channel import Channel, ChannelClosed, Message, WorkerLink
from sweeper.errors import EXIT_FENCED, EXIT_RELEASED, CheckpointError, ConfigError, Fenced
from sweeper.trainer.run import (
    DISK_FAULTS,
    BadValue,
    NoValidCheckpoint,
    Preempted,
    Run,
    Spec,
    TrainingFailed,
    TrialPruned,
    checked_value,
    in_attempt,
    say,
)
from sweeper.trainer.saver import SaverLost

MAX_TRACEBACK_CHARS = 20_000
PEER_WAIT_S = 5.0


def be_trainer(spec: Spec, channel: Channel, *, log_fd: int, saver_fd: int) -> int:
    """Train one attempt in this process; returns the exit code. `saver_fd` is the saver's own channel."""
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    processes.ignore_signals()  # the worker decides, and tells at a step boundary
    os.environ["SWEEPER_ATTEMPT"] = in_attempt(spec.run_dir, spec.lease_epoch)
    return be_first(spec, channel, saver_fd=saver_fd)


def be_first(spec: Spec, channel: Channel, *, saver_fd: int) -> int:
    """Train as the process that talks to the worker; returns the exit code."""
    # Loader workers of a dead trainer would linger for seconds.
    trainer_pid = os.getpid()
    os.register_at_fork(after_in_child=lambda: processes.die_with_parent(trainer_pid))
    channel.send("hello", pid=trainer_pid)
    link = WorkerLink(channel, deadline_s=spec.deadline_s)
    try:
        return train_and_tell(spec, link, saver_fd=saver_fd)
    except ChannelClosed:
        say("[RUN] the worker is gone; this attempt ends here")
        return EXIT_RELEASED


def train_and_tell(spec: Spec, link: WorkerLink, *, saver_fd: int = -1) -> int:
    """Run the training function and tell the worker the outcome."""
    code, ending = ending_of(Run(spec, link, saver_fd=saver_fd))
    link.tell(ending.pop("kind"), **ending)
    return code


def ending_of(run: Run) -> tuple[int, Message]:
    """Train to the end, whatever it is: the exit code, and what the worker should be told.

    Raises:
        ChannelClosed: There is no worker any more.
    """
    try:
        verdict = train(run)
        run.finish()
    except Preempted as stop:
        return EXIT_RELEASED, {"kind": "preempted", "reason": str(stop)}
    except Fenced as error:
        say(f"[RUN] {error}")
        return EXIT_FENCED, {"kind": "fenced", "reason": str(error)}
    except NoValidCheckpoint as error:
        return 1, {"kind": "no_checkpoint", "reason": str(error)}
    except ChannelClosed:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever a user's code raises is an outcome
        if is_others := run.spec.num_ranks > 1 and is_another_ranks(error):
            say(f"[RUN] another rank is gone or hangs: {error}")
            if "timed out" not in str(error).lower():
                time.sleep(PEER_WAIT_S)  # torchrun ends us meanwhile: that rank has ended, and tells how
        return 1, _told_error(error, run, is_others=is_others)
    return 0, verdict


def train(run: Run) -> Message:
    """What to tell of a training that came to its end: its value, or that it was pruned."""
    function, run.config = load_training(run.spec)
    prepare_process(run.spec)
    try:
        value = function(run.config.trainer, run)
        if run.stopped is not None:
            raise run.stopped  # the training swallowed it
        return {"kind": "result", "value": checked_value(value)}
    except TrialPruned as stop:
        return {"kind": "pruned", "value": run.last_value, "reason": str(stop)}
    except Exception as error:
        if type(error).__module__.startswith("optuna") and type(error).__name__ == "TrialPruned":
            reason = str(error) or "the training raised TrialPruned"
            return {"kind": "pruned", "value": run.last_value, "reason": reason}
        raise


def _told_error(error: BaseException, run: Run, *, is_others: bool) -> Message:
    # Of a program, what it printed says more than a traceback of ours.
    text = "" if isinstance(error, TrainingFailed) else traceback.format_exc()
    say(text or f"[RUN] {error}")
    is_plain = isinstance(error, ConfigError | BadValue | TrainingFailed)
    reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
    return {
        "kind": "error",
        "reason": reason[:2000],
        "detail": text[-MAX_TRACEBACK_CHARS:],
        "is_bad_value": isinstance(error, BadValue),
        "is_config": isinstance(error, ConfigError),
        "is_oom": is_out_of_memory(error),
        "is_disk_fault": _is_disk_fault(error, run.directory),
        "is_lost": is_others
        or _is_loader_killed(error)
        or isinstance(error, SaverLost)
        or (isinstance(error, TrainingFailed) and error.is_lost),
        "is_others": is_others,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Python's or torch's memory error, on whatever device."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_another_ranks(error: BaseException) -> bool:
    """A collective failed because a rank is gone or did not come in time."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    )


def _is_loader_killed(error: BaseException) -> bool:
    """Somebody killed a loader process; torch tells of it in the trainer as a RuntimeError."""
    return isinstance(error, RuntimeError) and "is killed by signal: Killed" in str(error)


def _is_disk_fault(error: BaseException, run_dir: Path) -> bool:
    """The disk refused what this run writes: below its directory, or to the attempt's log.

    A fault at another path is the training's own affair: waiting would not mend it.
    """
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return any(
        isinstance(link, CheckpointError | OSError)
        and getattr(link, "errno", None) in DISK_FAULTS
        and _is_ours(getattr(link, "filename", None), run_dir)
        for link in chain
    )


def _is_ours(filename: object, run_dir: Path) -> bool:
    return filename is None or Path(os.fsdecode(str(filename))).absolute().is_relative_to(run_dir)


def load_training(spec: Spec) -> tuple[Callable[[Any, Run], object], Any]:
    """The training function and the run's configuration, from the run directory.

    Raises:
        ConfigError: config.yaml is not the run's own, or the function cannot be imported.
    """
    import yaml
    from omegaconf import OmegaConf

    data = rundir.read_bytes(Path(spec.run_dir) / rundir.CONFIG_FILE)
    if manifests.digest(data) != spec.config_digest:
        raise ConfigError(
            f"config.yaml of run {spec.run_id} was changed", do="Restore it, or cancel and retry the run."
        )
    cfg = OmegaConf.create(yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    target = OmegaConf.select(cfg, "trainer._target_")
    del cfg.trainer["_target_"]
    return find_function(str(target)), cfg


def find_function(target: str) -> Callable[[Any, Run], object]:
    """Import `package.module.function`; modules in the current directory are found too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # also a SyntaxError: no trial could do better
        raise ConfigError(
            f"trainer._target_={target} cannot be imported",
            why=f"{type(error).__name__}: {error}",
            do="Name an importable function def train(cfg, run) -> float.",
        ) from error
    if not callable(function):
        raise ConfigError(f"trainer._target_={target} is not a function")
    return function  # type: ignore[no-any-return]


def prepare_process(spec: Spec) -> None:
    """Seed every generator with the run's seed, and fix the number of threads."""
    random.seed(spec.seed)
    with contextlib.suppress(ImportError):
        import numpy as np

        np.random.seed(spec.seed)
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)


def leave(code: int) -> NoReturn:
    """End a forked process: flush and run exit handlers, but none of the parent's frames."""
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(argv: list[str]) -> int:
    """A plain trainer process."""
    channel_fd, log_fd, saver_fd, parent_pid = map(int, argv)
    processes.die_with_parent(parent_pid)
    request = json.load(sys.stdin)
    channel = Channel(socket.socket(fileno=channel_fd))
    return be_trainer(Spec(**request["spec"]), channel, log_fd=log_fd, saver_fd=saver_fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
