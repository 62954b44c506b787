"""Workers as one SLURM job array, through submitit. The launch returns at once; `--wait` follows.

submitit writes the sbatch file and the pickles, and submits. What becomes of a run is in the
database and the run directories: submitit's states and results are not asked.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from blake3 import blake3
from sqlalchemy.engine import make_url
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

from sweeper import slurm
from sweeper.database import database_path
from sweeper.errors import EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_OK, ConfigError
from sweeper.launch import slurm_settings
from sweeper.launch.progress import Display, final_report
from sweeper.launch.slurm_worker import Worker
from sweeper.reading import Reading
from sweeper.records import Sweep
from sweeper.report.hints import next_command

POLL_S = 2.0
OURS = ("kind", "n_workers")
"""Keys of the launcher group that are not submitit's."""
ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED")
"""States of a worker that has started, or will without anybody's doing, unless it is held."""
ENDING = ("COMPLETING", "REQUEUED", "PREEMPTED", "STAGE_OUT", "SIGNALING", "RESIZING")
"""States of a worker that is over, or is about to be requeued: nobody can say yet."""
HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")
ENDING_WAIT_S = 30.0
TEST_WAIT_S = 60.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FIXED = {"name", "job_name", "wckey", "teardown", "stderr_to_stdout", "srun_args", "use_srun"}
"""Parameters of submitit's that are not for users: what is here depends on them."""

OTHER_NODES = """\
# What runs ranks on the other nodes is started here, because SLURM warns what is in the worker's step.
export SWEEPER_NODES_DIR={folder}/nodes_"$SLURM_JOB_ID"_"${{SLURM_RESTART_COUNT:-0}}"
if [ "${{SWEEPER_NODES%:*}}" != "$$" ] || ! kill -0 "${{SWEEPER_NODES#*:}}"; then
  srun --overlap --nodes={others} --ntasks={others} --ntasks-per-node=1 --cpus-per-task={cpus} --exclude="$SLURMD_NODENAME" --kill-on-bad-exit=0 --input=none --output={folder}/%j_nodes.out {python} -m sweeper.trainer.nodes "$SWEEPER_NODES_DIR" &
  export SWEEPER_NODES="$$:$!"
fi
"""
"""Lines before the worker's srun when a training has several nodes; the worker writes its orders into the directory."""

AFTERWARDS = """\
code=$?
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
# 75: the worker has released its run, to be continued. A job that ends by itself is not requeued by SLURM.
# This script gets no signal in the grace of a preemption or before a time limit, and dies at scancel.
if [ "$code" -eq 75 ]; then
  for attempt in $(seq 60); do
    scontrol requeue "$job" && sleep 60  # until SLURM ends this script
    sleep 5
  done
fi
# 69: the database has not answered the worker once. It has no run to release: asked again from here, for half an hour.
[ "$code" -eq 69 ] && SWEEPER_ASKED=$((SWEEPER_ASKED + 1)) || SWEEPER_ASKED=0
if [ "$code" -eq 69 ] && [ "$SWEEPER_ASKED" -lt 20 ]; then
  sleep 60
  export SWEEPER_ASKED
  exec bash "$0"
fi
# Above 128: the worker was killed. The next one goes on in its place, unless five die at once in a row.
[ "$SECONDS" -lt 20 ] && SWEEPER_DEATHS=$((SWEEPER_DEATHS + 1)) || SWEEPER_DEATHS=0
if [ "$code" -gt 128 ] && [ "$SWEEPER_DEATHS" -lt 5 ]; then
  export SWEEPER_DEATHS
  exec bash "$0"
fi
[ "${SWEEPER_NODES%:*}" != "$$" ] || rm -rf "$SWEEPER_NODES_DIR"  # of this script, not of a job it was submitted from
exit "$code"
"""
"""The end of the sbatch file. It is outside of any container, so that `scontrol` is there."""


class _Executor(SlurmExecutor):
    """submitit's, which can also be made where there is no SLURM, to show the sbatch file."""

    @classmethod
    def affinity(cls) -> int:
        return 2


@dataclass(frozen=True, slots=True)
class Submission:
    """A job array that is to be, or was, submitted.

    Attributes:
        folder: Where its sbatch files, pickles and logs lie.
        label: What the comment of its jobs ends with, to be known among others of the same name.
    """

    sweep: str
    launcher: Mapping[str, Any]
    folder: Path
    worker: Worker

    @classmethod
    def of(cls, sweep: str, launcher: Mapping[str, Any], *, storage: str, data_dir: Path) -> Submission:
        """The submission of a sweep's workers. Raises ConfigError."""
        url = make_url(storage)
        if url.password or "password" in url.query:
            raise ConfigError(
                "a database URL with a password cannot be handed to SLURM jobs",
                why="it would stand in files",
                do="Put the password into ~/.pgpass, or into a file that ?passfile= in storage.url names.",
            )
        folder = data_dir.resolve() / "sweep" / sweep / "slurm"
        _check_printable("data_dir", folder)
        if {"%", "\\"} & set(str(folder)):
            raise ConfigError(
                f"data_dir={data_dir} cannot be used with launcher=slurm",
                why="SLURM reads % and \\ in the names of its logs as patterns",
                do="Choose another data_dir.",
            )
        worker = Worker(
            sweep, _absolute(storage), str(data_dir.resolve()), int(launcher["cpus_per_task"] or 1)
        )
        return cls(sweep, launcher, folder, worker)

    @property
    def job_name(self) -> str:
        return f"sweeper-{self.sweep}"

    @property
    def label(self) -> str:
        return f"sweeper {blake3(self.worker.data_dir.encode()).hexdigest(6)}"

    def text(self, num_workers: int) -> str:
        """The sbatch file. Raises ConfigError when submitit does not know a parameter."""
        executor = self._executor()
        executor.parameters["map_count"] = num_workers
        return str(executor._make_submission_file_text(executor._submitit_command_str, "")) + "\n"

    def check(self, num_workers: int) -> None:
        """Let SLURM look at the sbatch file before anything is recorded. Raises ConfigError in SLURM's words."""
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "launcher=slurm needs SLURM's commands",
                why="there is no sbatch on the PATH",
                do="Use launcher=local.",
            )
        try:
            done = subprocess.run(
                ["sbatch", "--test-only"], input=self.text(num_workers), capture_output=True, text=True, timeout=TEST_WAIT_S
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"sbatch --test-only does not answer within {TEST_WAIT_S:.0f} s",
                do="Nothing was started; try again when SLURM's controller is back.",
            ) from None
        if done.returncode:
            raise refused(done.stderr)

    def submit(self, num_workers: int) -> list[str]:
        """Submit so many workers; returns their job ids. Raises ConfigError in SLURM's words."""
        make_private(self.folder)
        executor = self._executor()
        try:
            with executor.batch():
                jobs = [executor.submit(self.worker) for _ in range(num_workers)]
            return [str(job.job_id) for job in jobs]
        except FailedJobError as error:
            raise refused(str(error)) from error

    def queue(self) -> Queue:
        """The workers of this sweep and data directory that SLURM has. Raises ConfigError."""
        command = [
            "squeue", "--me", "--noheader", "--array", f"--name={self.job_name}", "--format=%i|%T|%r|%k"
        ]  # fmt: skip
        answer = slurm.run(command)
        if answer is None:
            raise ConfigError(
                "squeue does not answer",
                do="Nothing was submitted; try again when SLURM's controller is back.",
            )
        return Queue.parse(answer, label=self.label)

    def _num_nodes(self) -> int:
        return int(self.launcher["nodes"] or 1)

    def _cpus_per_node(self) -> int:
        return int(self.launcher["tasks_per_node"] or 1) * self.worker.threads

    def _other_nodes(self) -> list[str]:
        """Lines of the script for a training on several nodes."""
        if self._num_nodes() == 1:
            return []
        lines = OTHER_NODES.format(
            folder=shlex.quote(str(self.folder)), others=self._num_nodes() - 1,
            cpus=self._cpus_per_node(), python=shlex.quote(sys.executable),
        )  # fmt: skip
        return lines.splitlines()

    def _srun_arguments(self) -> list[str]:
        """The worker is one task on the first node, which starts the ranks; it has what they need there."""
        num_cpus = self._cpus_per_node()
        # HAZARD: since 22.05 srun does not take --cpus-per-task from sbatch. Source: srun(1).
        cpus = [f"--cpus-per-task={num_cpus}"] if num_cpus > 1 else []
        is_alone = int(self.launcher["tasks_per_node"] or 1) * self._num_nodes() == 1
        return cpus if is_alone else ["--nodes=1", "--ntasks=1", f"--cpus-per-task={num_cpus}"]

    def _executor(self) -> _Executor:
        given = {name: value for name, value in self.launcher.items() if name not in OURS}
        additional = slurm_settings.additional(given.pop("additional_parameters"))
        for name, value in additional.items():
            _check_printable(f"launcher.additional_parameters.{name}", value)
        comments = (given.pop("comment", None), additional.pop("comment", None), self.label)
        additional |= {"requeue": True, "comment": " ".join(str(comment) for comment in comments if comment)}
        _check_known(given)
        given["setup"] = [*(given.get("setup") or []), *self._other_nodes()]
        parameters = {name: value for name, value in given.items() if value is not None and value != []}
        try:
            executor = _Executor(folder=self.folder)
            executor.update_parameters(
                job_name=self.job_name, wckey=None, teardown=AFTERWARDS.splitlines(), stderr_to_stdout=True,
                additional_parameters=additional, srun_args=self._srun_arguments(),
                **{"time": None, **executor._convert_parameters(parameters)},  # submitit's own default is 5 minutes
            )  # fmt: skip
        except (ValueError, TypeError, AssertionError, NameError) as error:
            raise ConfigError(
                "the launcher group is refused", why=" ".join(str(error).split())[:500]
            ) from error
        return executor


def _check_printable(key: str, value: object) -> None:
    if not f"{key}{value}".isprintable():
        raise ConfigError(
            f"{key!r} cannot be {str(value)!r}",
            do="It becomes a line of a script: use printable characters only.",
        )


def _check_known(given: Mapping[str, Any]) -> None:
    known = {*_Executor._valid_parameters(), *_Executor._equivalence_dict()} - FIXED
    for name in sorted(set(given) - known):
        near = get_close_matches(name, known, n=1)
        meant = f"Did you mean launcher.{near[0]}? " if near else ""
        raise ConfigError(
            f"launcher.{name} is not known",
            do=f"{meant}What else sbatch can do is set by launcher.additional_parameters.",
        )


def _absolute(storage: str) -> str:
    """The URL with an absolute path: a job may start in another directory."""
    url = make_url(storage)
    if url.get_backend_name() != "sqlite":
        return storage
    return f"sqlite:///{Path(str(url.database)).resolve()}"


@dataclass(frozen=True, slots=True)
class Queue:
    """Ids of a sweep's jobs, array members one by one.

    Attributes:
        active: That train, or will without anybody's doing.
        ending: That are over, or are being requeued.
        held: That wait until somebody releases them: id → why.
    """

    active: list[str]
    ending: list[str]
    held: dict[str, str]

    @classmethod
    def parse(cls, text: str, *, label: str) -> Queue:
        """Read lines `id|state|reason|comment`; jobs of another label are somebody else's."""
        queue = cls([], [], {})
        for line in text.splitlines():
            job, state, reason, comment = (line.rstrip().split("|", 3) + [""] * 3)[:4]
            if not comment.endswith(label):
                continue
            is_held = "held" in reason.lower() or reason == "DependencyNeverSatisfied"
            if state in HELD or (state == "PENDING" and is_held):
                queue.held[job] = reason
            elif state in ACTIVE:
                queue.active.append(job)
            elif state in ENDING:
                queue.ending.append(job)
        return queue

    def held_text(self) -> str:
        """What to do about held jobs."""
        why = ", ".join(sorted(set(self.held.values())))
        return f"held by SLURM ({why}): `scontrol release {','.join(self.held)}` lets them run, `scancel` ends them"


def refused(said: str) -> ConfigError:
    """What SLURM said, as an error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    words = [line.partition("error:")[2].strip() for line in lines if "error:" in line] or lines
    return ConfigError(
        "SLURM refuses the job",
        why="; ".join(words),
        do="Nothing was started. Change launcher.* and launch again.",
    )


def make_private(folder: Path) -> None:
    """Create the folder of pickles, which jobs execute: nobody else may write there. Raises ConfigError."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    for above in (folder.parent, folder.parent.parent, folder.parent.parent.parent):
        status = os.lstat(above)
        is_open = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
        if is_open or status.st_uid not in (0, os.getuid()):
            raise ConfigError(
                f"{above} is not safe for what SLURM jobs execute",
                why="everybody can write to it" if is_open else "it is another user's",
                do="Make it yours alone (chmod o-w), or choose another data_dir.",
            )
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(
            f"{folder} is not a directory of yours", do="Remove it, or choose another data_dir or sweep.name."
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        os.chmod(folder, 0o700)


# --- launching -----------------------------------------------------------------------------


def launch(sweep: Sweep, *, storage: str, data_dir: Path, num_left: int, is_waiting: bool) -> int:
    """Submit the workers that are missing; returns the exit code."""
    submission = Submission.of(sweep.name, sweep.config["launcher"], storage=storage, data_dir=data_dir)
    num_wanted = min(int(sweep.config["launcher"]["n_workers"]), num_left)
    queue = _settled_queue(submission, num_wanted)
    num_there = len(queue.active) + len(queue.ending)
    if queue.held:
        print(
            f"[LAUNCH] {len(queue.held)} workers of sweep {sweep.name} are {queue.held_text()}",
            file=sys.stderr,
        )
    if num_there < num_wanted:
        jobs = submission.submit(num_wanted - num_there)
        print(f"submitted {len(jobs)} workers: {', '.join(jobs)}")
    else:
        ending = (
            f" ({len(queue.ending)} of them ending; launch again if they do not come back)"
            if queue.ending
            else ""
        )
        print(f"SLURM has {num_there} workers of sweep {sweep.name} already{ending}; nothing was submitted")
    if database_path(storage) is not None:
        print(
            "the database is SQLite: jobs on other machines than this one will refuse it; "
            "`sweeper db up --host ADDRESS` starts a PostgreSQL that they reach",
            file=sys.stderr,
        )
    elif (make_url(storage).host or "localhost") in LOOPBACK:
        print(
            f"the database is at {make_url(storage).host or 'a local socket'}: jobs on other machines than this one cannot "
            "reach it; `sweeper db up --host ADDRESS` starts one that they reach",
            file=sys.stderr,
        )
    status = next_command("status", sweep.name, "--watch", storage=storage, data_dir=data_dir)
    print(f"logs: {submission.folder}\nfollow with: {status}", file=sys.stderr)
    return follow(submission, storage=storage, data_dir=data_dir) if is_waiting else EXIT_OK


def _settled_queue(submission: Submission, num_wanted: int) -> Queue:
    """The queue once nobody is about to be requeued, or is still after a while: then it counts as there."""
    deadline = time.monotonic() + ENDING_WAIT_S
    queue, has_said = submission.queue(), False
    while queue.ending and len(queue.active) < num_wanted and time.monotonic() < deadline:
        if not has_said:
            has_said = True
            print(
                f"[LAUNCH] {len(queue.ending)} workers are ending or being requeued; waiting {ENDING_WAIT_S:.0f} s at most",
                file=sys.stderr,
            )
        time.sleep(POLL_S)
        queue = submission.queue()
    return queue


def follow(submission: Submission, *, storage: str, data_dir: Path) -> int:
    """Show the sweep until it is complete, or SLURM has no worker of it any more."""
    sweep = submission.sweep
    jobs: list[str] = []
    try:
        with Display(sweep, storage=storage) as display:
            said, num_empty = "", 0
            while True:
                try:
                    if _is_complete(sweep, storage):
                        break
                    queue = submission.queue()
                    jobs = [*queue.active, *queue.ending] or jobs
                    num_empty = 0 if queue.active or queue.ending else num_empty + 1
                    # Twice: between the end of a job and its requeue SLURM may know of neither.
                    if num_empty >= 2 and not _is_complete(sweep, storage):
                        again = next_command("resume", sweep, storage=storage, data_dir=data_dir)
                        held = f"; {len(queue.held)} are {queue.held_text()}" if queue.held else ""
                        display.line(
                            f"[LAUNCH] SLURM has no worker of {sweep} any more, and it is not complete: {again}{held}"
                        )
                        return EXIT_NOT_WELL
                except ConfigError as error:  # controller or database are away: the workers are not
                    if error.what != said:
                        said = error.what
                        display.line(f"[LAUNCH] {said}; asked again each {POLL_S:g} s")
                display.refresh()
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        # By number: jobs of the same name may be another data directory's. An array is one submission.
        numbers = sorted({job.partition("_")[0] for job in jobs}, key=int)
        ends = f"; `scancel {' '.join(numbers)}` ends them" if numbers else ""
        print(f"\nthe workers of {sweep} go on{ends}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return final_report(sweep, storage=storage, data_dir=data_dir)


def _is_complete(sweep: str, storage: str) -> bool:
    with Reading(storage) as reading:
        return bool(reading.progress(sweep)["is_complete"])
