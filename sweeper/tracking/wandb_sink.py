"""One W&B run per run id, through the real client, in the tracker process only.

wandb-core, the client's service, is started anew for each attempt, so that it carries the run's
name in its environment and can be found and ended when it outlives the tracker (see `orphans`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import rundir
from sweeper.errors import SweeperError
from sweeper.states import Outcome, State
from sweeper.tracking import orphans, wandb_files
from sweeper.tracking.messages import Begin, End, WandbSettings
from sweeper.tracking.metrics import Row
from sweeper.tracking.wandb_checkpoints import CheckpointUploader

if TYPE_CHECKING:
    import wandb

STEP_KEY = "global_step"
DEFAULT_PROJECT = "sweeper"
UNREACHABLE_S = 600.0
"""How long a server that did not answer is not asked again: each time costs the whole timeout."""

CONFIRM_POLL_S = 0.5
CONFIRM_S = 5.0
"""How long a run's last row may take from W&B's door to its answers."""
SYNC = "`sweeper sync` sends what is missing"

_LOCAL_TIMEOUT_S = 90.0
_PREEMPTIONS = (Outcome.PREEMPTED, Outcome.TIMEOUT, Outcome.LOST)
# Variables that would set what is ours to set for each run.
_FOREIGN_VARIABLES = ("RUN_ID", "RESUME", "NAME", "RUN_GROUP", "SWEEP_ID", "MODE", "DIR", "TAGS", "NOTES")


# --- decisions -----------------------------------------------------------------------------


def decide_mode(mode: str | None, *, variable: str | None, has_key: bool) -> str:
    """online or offline: as configured, else as $WANDB_MODE says, else by whether there is a key."""
    if mode:
        return mode
    if variable in ("online", "offline", "disabled"):
        return variable
    return "online" if has_key else "offline"


def decide_identity(begin: Begin) -> tuple[str, str]:
    """W&B's id and `resume` argument for this attempt.

    A run's first attempt cannot find anything on the server, so `must` is for later ones. `never`
    gives each later attempt a W&B run of its own, into which the whole log is replayed.
    """
    return identity_of(begin.wandb_run_id, begin.attempt, begin.settings.wandb.resume)


def identity_of(wandb_run_id: str, attempt: int, resume: str) -> tuple[str, str]:
    """As `decide_identity`."""
    if attempt <= 1:
        return wandb_run_id, "allow"
    if resume == "never":
        return f"{wandb_run_id}-{attempt}", "allow"
    return wandb_run_id, resume


def project_of(settings: WandbSettings) -> str:
    """The W&B project of a sweep's runs."""
    return settings.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class Farewell:
    """How W&B is told about the end of an attempt."""

    exit_code: int
    is_preempting: bool


def decide_farewell(end: End) -> Farewell:
    """Truthful states in W&B: finished, failed, or preempted when the run will be continued."""
    state = State(end.state)
    if state in (State.COMPLETED, State.PRUNED):
        return Farewell(exit_code=0, is_preempting=False)
    is_preempting = not state.is_final and Outcome(end.outcome) in _PREEMPTIONS
    return Farewell(exit_code=1, is_preempting=is_preempting)


def decide_catching_up(*, next_step: int, start_step: int) -> str:
    """What is done about the rows between where W&B ends and where the training goes on, in words.

    Nothing is said of the last one: it is held back at the end of an attempt, for it may not be complete.
    """
    if next_step < start_step:
        has = f"has rows up to step {next_step - 1}" if next_step > 0 else "has no rows yet"
        return f"W&B {has}: those up to step {start_step} are sent again from metrics.jsonl"
    if next_step > start_step + 1:
        return f"W&B has rows up to step {next_step - 1} already: they are not sent again"
    return ""


class RunMissing(SweeperError):
    """tracking.wandb.resume=must, and W&B does not know the run."""


# --- the client ----------------------------------------------------------------------------


class WandbClient:
    """The imported wandb package, for all runs of one tracker.

    Args:
        warn: Takes texts for people.
        note: Takes texts for people that are no warnings.
        clock: Seconds that only go up.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        *,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mode_variable = os.environ.get("WANDB_MODE")
        for name in _FOREIGN_VARIABLES:
            os.environ.pop(f"WANDB_{name}", None)
        os.environ["WANDB_SILENT"] = "true"
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        self._warn, self._note = warn, note
        self._clock = clock
        self._online_again_s = 0.0

    def open(self, begin: Begin) -> WandbSink | None:
        """Start or resume the W&B run of a run; None when $WANDB_MODE disables W&B.

        Whatever keeps it from being online makes it offline, with the same id and a warning.
        """
        settings = begin.settings.wandb
        mode = decide_mode(settings.mode, variable=self._mode_variable, has_key=self._has_key())
        if mode == "disabled":
            return None
        orphans.end(orphans.RUN_VARIABLE, begin.wandb_run_id, wait_s=2.0)
        os.environ[orphans.RUN_VARIABLE] = begin.wandb_run_id
        if mode == "online" and self._clock() < self._online_again_s:
            self._warn(f"W&B did not answer a short while ago: {begin.run_id} is logged offline; {SYNC}")
            mode = "offline"
        for is_last in (False, True):
            try:
                return self._init(begin, mode)
            except Exception as error:
                let_go(begin.wandb_run_id)
                if mode == "offline":
                    raise
                if decide_identity(begin)[1] == "must" and "does not exist" in str(error):
                    raise self._missing(begin) from error
                if is_last or not self._is_local(error):
                    self._warn(self._advice(error, begin))
                    break
        return self._init(begin, "offline")

    def _is_local(self, error: Exception) -> bool:
        """Whether something happened to the client's service, rather than W&B having refused or been silent."""
        errors = self._wandb.errors
        return not isinstance(error, errors.CommError | errors.UsageError)

    def _missing(self, begin: Begin) -> RunMissing:
        return RunMissing(
            f"W&B run {begin.wandb_run_id} does not exist, and tracking.wandb.resume=must",
            do=f"Check the run's id, the key, and its access to project {project_of(begin.settings.wandb)}; "
            "tracking.wandb.resume=allow starts the W&B run anew. The training can go on in any case.",
        )

    def _init(self, begin: Begin, mode: str) -> WandbSink:
        settings = begin.settings.wandb
        wandb_run_id, resume = decide_identity(begin)
        root = Path(settings.dir or begin.run_dir)
        if settings.dir:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # else wandb takes one below /tmp
        on_disk = wandb_files.last_step(root / "wandb", wandb_run_id) if mode == "offline" else -1
        run = self._wandb.init(
            id=wandb_run_id,
            name=begin.run_id,
            group=settings.group or begin.sweep,
            project=project_of(settings),
            entity=settings.entity,
            tags=list(settings.tags) or None,
            dir=str(root),
            config=begin.config,
            resume=resume,  # type: ignore[arg-type]
            settings=self._settings(settings, mode),
        )
        if mode == "online":
            _save_identity(run, begin)
        run.define_metric(STEP_KEY)
        run.define_metric("*", step_metric=STEP_KEY)
        next_step = max(run.starting_step, on_disk + 1)
        if begin.start_step and (
            text := decide_catching_up(next_step=next_step, start_step=begin.start_step)
        ):
            self._note(f"{begin.run_id}: {text}")
        return WandbSink(run, begin, next_step=next_step, warn=self._warn)

    def _settings(self, settings: WandbSettings, mode: str) -> wandb.Settings:
        return self._wandb.Settings(
            mode=mode,  # type: ignore[arg-type]
            # Offline nobody is asked: what takes time then is a machine under load.
            init_timeout=settings.init_timeout_s if mode == "online" else _LOCAL_TIMEOUT_S,
            finish_timeout=settings.finish_timeout_s,
            finish_timeout_raises=True,
            reinit="create_new",
            silent=True,
            # What the tracker process is and uses says nothing about the training.
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def _has_key(self) -> bool:
        """Whether the client finds a key by itself: environment, netrc, settings. Asks nobody."""
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        try:
            host = wandb_setup.singleton().settings.base_url
            found = wbauth.authenticate_session(
                host=host, source="sweeper", prompt=False, update_session=False
            )
        except self._wandb.errors.Error:
            return True  # there is one, and it is not valid: `open` will say so
        return found is not None

    def _advice(self, error: Exception, begin: Begin) -> str:
        errors = self._wandb.errors
        if isinstance(error, errors.CommError) and not isinstance(error, errors.AuthenticationError):
            self._online_again_s = self._clock() + UNREACHABLE_S
        text = " ".join(str(error).split())[:300]
        return (
            f"W&B run {begin.wandb_run_id} is logged offline ({text}). "
            f"Check the key, the access to the project and the network; {SYNC} then."
        )


def _save_identity(run: wandb.Run, begin: Begin) -> None:
    """What the run is, for a machine that has nothing else, below `<run id>/`: W&B has a config.yaml of its own."""
    run_dir = Path(begin.run_dir)
    for name in (rundir.RUN_FILE, rundir.OVERRIDES_FILE, rundir.CONFIG_FILE):
        if (run_dir / name).is_file():
            run.save(run_dir / name, base_path=run_dir.parent, policy="now", glob=False)


def _save_result(run: wandb.Run, begin: Begin, end: End) -> None:
    """How the run ended, as result.json will say it."""
    path = Path(run.dir, begin.run_id, rundir.RESULT_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        rundir.result_json(
            begin.run_id, lease_epoch=begin.lease_epoch, state=end.state, value=end.value, reason="", outcome=end.outcome
        )
    )  # fmt: skip
    run.save(path, base_path=run.dir, policy="now", glob=False)


class WandbSink:
    """One attempt's part of a W&B run."""

    def __init__(self, run: wandb.Run, begin: Begin, *, next_step: int, warn: Callable[[str], None]) -> None:
        self.next_step = next_step
        self._run = run
        self._begin = begin
        self._service = begin.wandb_run_id
        self._warn = warn
        self._summary = Summary(begin.metric, is_maximized=begin.direction == "maximize")
        self._checkpoints = CheckpointUploader(run, begin, warn=warn)

    @property
    def place(self) -> dict[str, str]:
        """Where the run can be seen: `wandb_url` when online, else `wandb_dir`."""
        if self._run.offline:
            return {"wandb_dir": str(Path(self._run.dir).parent)}
        return {"wandb_url": self._run.url or ""}

    def observe(self, step: int, row: Row) -> None:
        """For the summary, which is ours: the client's own best values start anew at a resume."""
        self._summary.add(step, row)

    def write(self, step: int, row: Row) -> None:
        """One row; names that begin with an underscore are W&B's own and are left out."""
        values: dict[str, Any] = {key: value for key, value in row.items() if not key.startswith("_")}
        self._run.log({**values, STEP_KEY: step}, step=step, commit=True)

    def flush(self) -> None:
        """The client sends rows by itself; checkpoints are looked for."""
        self._checkpoints.pump()

    def finish(self, end: End) -> None:
        """Say truthfully how the attempt ended, and wait for the server no longer than agreed."""
        farewell = decide_farewell(end)
        told = {"sweeper/state": end.state, "sweeper/outcome": end.outcome, **end.summary}
        if end.value is not None:
            told["sweeper/value"] = end.value
        self._run.summary.update({**self._summary.values(), **told})
        if farewell.is_preempting:
            self._run.mark_preempting()
        if State(end.state).is_final and not self._run.offline:
            _save_result(self._run, self._begin, end)
        deadline_s = time.monotonic() + self._begin.settings.wandb.finish_timeout_s
        try:
            self._run.finish(exit_code=farewell.exit_code)
        except TimeoutError:
            self._warn(
                f"W&B did not take all rows of {self._begin.run_id} in time; `sweeper sync` sends them later"
            )
            self.abandon()
        else:
            if not self._run.offline:
                self._confirm(min(deadline_s, time.monotonic() + CONFIRM_S))
            if self._checkpoints.finish(max(0.0, deadline_s - time.monotonic())):
                _tear_down()
            else:
                let_go(self._service)

    def _confirm(self, deadline_s: float) -> None:
        """Ask W&B whether it has the last row: a client whose key was revoked ends without a word."""
        import wandb

        path, last = f"{self._run.entity}/{self._run.project}/{self._run.id}", self.next_step - 1
        try:
            api = wandb.Api(timeout=max(1, int(deadline_s - time.monotonic())))
            there = api.run(path).lastHistoryStep
            while there < last and time.monotonic() < deadline_s:
                time.sleep(CONFIRM_POLL_S)
                api.flush()  # type: ignore[no-untyped-call]
                there = api.run(path).lastHistoryStep
        except Exception as error:  # noqa: BLE001 - foreign code
            what = " ".join(str(error).split())[:300]
            self._warn(f"W&B does not say whether it has all rows of {self._begin.run_id} ({what}); {SYNC}")
        else:
            if there < last:
                self._warn(
                    f"W&B shows rows of {self._begin.run_id} up to step {there} of {last} so far; if it stays so, {SYNC}"
                )

    def abandon(self) -> None:
        """End the service at once: nothing more is sent, and W&B is told no end."""
        self._checkpoints.abandon()
        let_go(self._service)


class Summary:
    """The summary of a run, from all its rows: the last value of each key, and the best of the metric."""

    def __init__(self, metric: str, *, is_maximized: bool) -> None:
        self._metric, self._is_maximized = metric, is_maximized
        self._last: dict[str, Any] = {}
        self._best: tuple[float, int] | None = None

    def add(self, step: int, row: Row) -> None:
        """One more row; steps only go up. NaN is never the best."""
        self._last.update({key: value for key, value in row.items() if not key.startswith("_")})
        self._last[STEP_KEY] = step
        value = row.get(self._metric)
        if not isinstance(value, int | float) or value != value:
            return
        if self._best is None or (value > self._best[0] if self._is_maximized else value < self._best[0]):
            self._best = float(value), step

    def values(self) -> dict[str, Any]:
        """What W&B is told."""
        if self._best is None:
            return dict(self._last)
        return {**self._last, "sweeper/best": self._best[0], "sweeper/best_step": self._best[1]}


def let_go(wandb_run_id: str) -> None:
    """End the service of a run at once and forget it; the next `init` starts another."""
    orphans.end(orphans.RUN_VARIABLE, wandb_run_id, wait_s=2.0)
    _tear_down()


def _tear_down() -> None:
    import wandb

    # HAZARD: of a service that was killed it complains, or leaves by sys.exit with its exit code.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
