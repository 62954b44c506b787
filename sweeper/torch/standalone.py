"""Exact, verified, preemption-safe checkpoints for a script of one's own, without a sweep.

with open_run("out/mine", seed=0, metric="loss", keep_last=3) as run:
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    for batch in loop.batches(epochs=10):
        ...

The directory is the run: `metrics.jsonl`, `checkpoints/`, and a lock that keeps a second process
out. SIGTERM and SIGUSR1 (SLURM's warning) stop the script at the next step with a checkpoint and
exit code 75; started again, it goes on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from sweeper import checkpoints, rundir
from sweeper.channel import NoLink
from sweeper.errors import EXIT_RELEASED, ConfigError, SweeperError
from sweeper.trainer.main import prepare_process
from sweeper.trainer.run import Preempted, Run, Spec, Stop
from sweeper.trainer.settings import DEFAULTS, check

LOCK_FILE = ".lock"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptedExit(Preempted, SystemExit):
    """Ends the script with exit code 75: run me again."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = EXIT_RELEASED


class _SignalLink(NoLink):
    """Signals set a flag with a reason; the loop looks at it between two steps."""

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        self._before: dict[signal.Signals, Any] = {}
        for number in signals:
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError as error:  # not the main thread
                raise ConfigError(
                    "open_run cannot take signals here",
                    why=str(error),
                    do="Call it in the main thread, or with signals=().",
                ) from error

    def put_back(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_reason = self.stop_reason or f"got {signal.Signals(number).name}"


class StandaloneRun(Run):
    """A run that no worker stands behind."""

    ADVICE_UNFIT = "Put the script back as it was, or give it another directory."

    lock: Lock
    signals: _SignalLink

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.end_savers()  # while the directory is still ours
            self.lock.release()
            self.signals.put_back()

    def preempted(self, reason: str) -> Stop:
        print(f"[RUN] {self.run_id}: stopped at a checkpoint ({reason}); run it again to go on", flush=True)
        return PreemptedExit(reason)


def open_run(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    metric: str = "loss",
    direction: str = "minimize",
    config: Mapping[str, Any] | None = None,
    signals: Iterable[signal.Signals] = _SIGNALS,
    **checkpoint: Any,
) -> StandaloneRun:
    """Open a directory as a run: a new one, or one to go on with.

    Python's, NumPy's and torch's generators are seeded.

    Args:
        directory: Created as needed, mode 0700.
        seed: Of all generators and of the data order.
        metric: The reported value of which the best is remembered.
        direction: `minimize` or `maximize` it.
        config: What the script was started with; a checkpoint of another one is refused by name.
        signals: Those that stop the script at the next step with a checkpoint.
        checkpoint: As `checkpoint.*` of a sweep: `every_s` (default 60), `every_n_steps`, `at_epoch_end`,
            `interval`, `async_save`, `keep_last`, `keep_best`, `keep_every_n_steps`, `export_weights`.

    Raises:
        ConfigError: There is no such setting, or no such value of it; the directory cannot be written;
            or this is one rank of several.
        SweeperError: Another process has the directory open.
    """
    _check_alone()
    trainer = json.loads(json.dumps(dict(config or {}), default=_plain_value))
    settings = {**DEFAULTS, **checkpoint}
    check(settings, config=trainer, prefix="")
    _check_rest(seed=seed, metric=metric, direction=direction)
    run_dir = Path(directory).absolute()
    root = run_dir / rundir.CHECKPOINTS_DIR
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Lock(run_dir)
        epoch = rundir.largest_epoch(run_dir) + 1
        checkpoints.clean(root, lease_epoch=epoch)
        rundir.clean(run_dir)
    except OSError as error:
        raise ConfigError(
            f"{run_dir} cannot be used as the directory of a run",
            why=str(error),
            do="Give open_run a directory that can be written, or change the permissions of this one.",
        ) from error
    spec = Spec(
        run_dir=str(run_dir), run_id=checkpoints.run_id_inside(root), sweep="", trial=0, params={}, seed=seed,
        threads=torch.get_num_threads(), attempt=epoch, lease_epoch=epoch, config_digest="", deadline_s=math.inf,
        metric=metric, direction=direction, has_pruner=False, was_committed=False, checkpoint=settings,
    )  # fmt: skip
    try:
        link = _SignalLink(signals)
    except ConfigError:
        lock.release()
        raise
    run = StandaloneRun(spec, link, config=OmegaConf.create({"trainer": trainer}))
    run.lock, run.signals = lock, link
    prepare_process(spec)
    return run


def _check_alone() -> None:
    """Refuse to be one rank of several. Raises ConfigError."""
    launched = int(os.environ.get("WORLD_SIZE") or 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    joined = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if (ranks := max(launched, joined)) > 1:
        raise ConfigError(
            f"open_run is for one process, and this is one of {ranks} ranks",
            do=f"Make a function train(cfg, run) of it and start that by `sweeper launch`, with launcher.ranks_per_worker={ranks}.",
        )


def _check_rest(*, seed: object, metric: object, direction: object) -> None:
    if type(seed) is not int or abs(seed) >= 2**63:
        raise ConfigError(f"seed={seed!r} cannot be used", do="Use a whole number of at most 63 bits.")
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"metric={metric!r} cannot be used", do="Use the name of a reported metric.")
    if direction not in ("minimize", "maximize"):
        raise ConfigError(f"direction={direction!r} cannot be used", do="Use minimize or maximize.")


def _plain_value(value: Any) -> Any:
    """What JSON takes of a value it does not know: the number of a NumPy scalar, the text of a path."""
    return value.item() if hasattr(value, "item") else str(value)


class Lock:
    """One process has a run directory, as long as it lives or until `release`.

    Raises:
        SweeperError: Another one has it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._fd = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise SweeperError(
                f"{run_dir} is open in another process", do="Wait for it, or use another directory."
            ) from None
        # A forked loader process outlives us by seconds, and would hold the lock as long.
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Let another process have it; in a forked child: hold it no more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
