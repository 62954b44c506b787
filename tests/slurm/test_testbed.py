"""The testbed does what a real cluster does to a job, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testbed import Testbed, TestbedError, default_dir

pytestmark = pytest.mark.slow

COMMANDS = Path(__file__).parents[2] / "slurm/testbed"
LIMIT_S = 90.0
COUNT_RUNS = "echo run ${SLURM_RESTART_COUNT:-0}; exec sleep 300"
"""A job that says how often it was restarted before, and stays."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"in {LIMIT_S:.0f} s it did not happen that {what}"
        time.sleep(0.05)


def submit(testbed: Testbed, script: str, *options: str) -> str:
    """Submit a batch script of one line; returns the job's id."""
    return testbed.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script)


def state(testbed: Testbed, job: str) -> str:
    """What squeue says of a job, also when it has ended."""
    return testbed.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def history(testbed: Testbed, job: str) -> list[str]:
    """What sacct says of each run of a job: state and exit code."""
    options = ("--noheader", "--parsable2", "--allocations", "--duplicates", "--format=state,exitcode")
    return testbed.run("sacct", *options, f"--jobs={job}").splitlines()


def lines(out: Path) -> list[str]:
    return out.read_text().splitlines() if out.exists() else []


def runs(out: Path) -> list[str]:
    """What a job with COUNT_RUNS has said; slurmstepd writes of its end into the same file."""
    return [line for line in lines(out) if line.startswith("run ")]


@pytest.fixture
def counted(testbed: Testbed, tmp_path: Path) -> tuple[str, Path]:
    """A job on n1 that runs, and the file with a line for each of its runs."""
    out = tmp_path / "out"
    job = submit(testbed, COUNT_RUNS, f"--output={out}", "--open-mode=append", "--nodelist=n1", "--exclusive")
    until(lambda: runs(out) == ["run 0"], "the job runs")
    return job, out


@pytest.fixture
def dir(tmp_path: Path) -> Iterator[Path]:
    """Where a testbed of the test's own may live; whatever becomes of the test, it ends."""
    yield tmp_path / "testbed"
    Testbed(tmp_path / "testbed").down()


def test_sacct_knows_how_each_job_ended(testbed: Testbed) -> None:
    ends = {
        submit(testbed, "true"): ["COMPLETED|0:0"],
        submit(testbed, "exit 3"): ["FAILED|3:0"],
        submit(testbed, "kill -9 $$"): ["FAILED|0:9"],
    }
    cancelled = submit(testbed, "exec sleep 300")
    until(lambda: state(testbed, cancelled) == "RUNNING", "the job runs")
    testbed.run("scancel", cancelled)
    ends[cancelled] = [f"CANCELLED by {os.getuid()}|0:0"]
    until(lambda: {job: history(testbed, job) for job in ends} == ends, "sacct knows all ends")


def test_a_step_over_all_nodes_has_a_task_on_each(testbed: Testbed) -> None:
    printed = testbed.run("srun", "--nodes=4", "sh", "-c", "echo $SLURMD_NODENAME")
    assert sorted(printed.split()) == ["n1", "n2", "n3", "n4"]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--time=2:01:00", "Requested time limit is invalid"),
        ("--partition=nowhere", "invalid partition specified"),
        ("--gres=gpu:3", "Requested node configuration is not available"),
    ],
)
def test_what_cannot_run_is_refused(testbed: Testbed, option: str, says: str) -> None:
    with pytest.raises(TestbedError, match=says):
        submit(testbed, "true", option)


def test_jobs_on_one_node_get_different_gpus(testbed: Testbed, tmp_path: Path) -> None:
    outs = [tmp_path / "0", tmp_path / "1"]
    for out in outs:
        submit(
            testbed,
            "echo $CUDA_VISIBLE_DEVICES; exec sleep 300",
            "--gres=gpu:1",
            "--nodelist=n1",
            f"--output={out}",
        )
    until(lambda: all(lines(out) for out in outs), "both jobs run at once")
    assert sorted(lines(outs[0]) + lines(outs[1])) == ["0", "1"]
    third = submit(testbed, "true", "--gres=gpu:1", "--nodelist=n1")
    assert state(testbed, third) == "PENDING"


def test_a_requeued_job_counts_its_restarts(testbed: Testbed, counted: tuple[str, Path]) -> None:
    job, out = counted
    testbed.run("scontrol", "requeue", job)
    until(lambda: runs(out) == ["run 0", "run 1"], "the job runs again")
    assert history(testbed, job) == ["REQUEUED|0:0", "RUNNING|0:0"]


def test_a_job_of_partition_high_preempts_one_of_low(testbed: Testbed, counted: tuple[str, Path]) -> None:
    job, out = counted
    urgent = submit(testbed, "true", "--partition=high", "--nodelist=n1", "--exclusive")
    until(lambda: state(testbed, urgent) == "COMPLETED", "the urgent job is done")
    assert history(testbed, job)[0] == "PREEMPTED|0:0"
    until(lambda: runs(out) == ["run 0", "run 1"], "the job runs again")


def test_a_job_over_its_time_ends_as_timeout(testbed: Testbed, counted: tuple[str, Path]) -> None:
    job, out = counted
    # Limits are whole minutes; a running job's end can be moved to any second.
    testbed.run("scontrol", "update", f"job={job}", "EndTime=now+1")
    until(lambda: state(testbed, job) == "TIMEOUT", "the job is ended")
    until(lambda: history(testbed, job) == ["TIMEOUT|0:0"], "sacct knows it")
    assert runs(out) == ["run 0"]


def test_a_job_of_a_dead_node_runs_again_on_another(testbed: Testbed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [
        submit(testbed, "exec sleep 300", "--exclusive", f"--nodelist={node}") for node in ("n2", "n3", "n4")
    ]
    job = submit(testbed, COUNT_RUNS, f"--output={out}", "--open-mode=append")
    until(lambda: runs(out) == ["run 0"], "the job runs")
    testbed.kill_node("n1")
    assert all(process.node != "n1" for process in testbed.processes())
    testbed.run("scancel", *others)
    until(lambda: history(testbed, job)[0] == "NODE_FAIL|0:0", "the node counts as lost")
    until(lambda: runs(out) == ["run 0", "run 1"], "the job runs again")
    testbed.start_node("n1")
    assert "n1" in testbed.pids


def test_a_task_that_slurm_has_lost_ends_with_reset(testbed: Testbed, counted: tuple[str, Path]) -> None:
    job, _ = counted
    tasks = [process.pid for process in testbed.processes() if process.node and process.name is None]
    step_daemon = next(
        pid for pid in tasks if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd")
    )
    os.kill(step_daemon, signal.SIGKILL)
    until(lambda: not _lives(step_daemon), "the step daemon is dead")
    assert state(testbed, job) == "RUNNING"
    testbed.reset()
    assert not [pid for pid in tasks if _lives(pid)]


def test_jobs_outlive_their_controller(testbed: Testbed, counted: tuple[str, Path]) -> None:
    job, out = counted
    testbed.restart_controller()  # saves its state: a killed one forgets a job of its last seconds
    testbed.kill_controller()
    with pytest.raises(TestbedError, match="squeue"):
        state(testbed, job)
    testbed.start_controller()
    assert state(testbed, job) == "RUNNING"
    testbed.run("scancel", job)
    until(lambda: history(testbed, job) == [f"CANCELLED by {os.getuid()}|0:0"], "sacct knows how it ended")
    assert runs(out) == ["run 0"]


def test_everything_is_private_and_on_loopback(testbed: Testbed) -> None:
    assert stat.S_IMODE(testbed.dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (testbed.dir / "etc").iterdir()} == {0o600}
    inodes = {
        os.readlink(descriptor)
        for pid in testbed.pids.values()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        if descriptor.is_symlink()
    }
    tables = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    addresses = [row[1] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    assert len(addresses) == 6  # slurmdbd, slurmctld and four nodes; MariaDB and munge have no port
    assert {address[6:8] for address in addresses} == {"7F"}, "127.x.y.z, its bytes from right to left"


def test_two_testbeds_side_by_side_and_the_end_of_one(testbed: Testbed, dir: Path) -> None:
    up = subprocess.run(
        [COMMANDS / "up", "--dir", dir, "--nodes", "1", "--send-user-signal"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert up.stdout == f"export SLURM_CONF={dir}/etc/slurm.conf\n"
    other = Testbed(dir)
    # One process of this job has left its session and forgotten its environment.
    submit(other, "env --ignore-environment setsid sleep 301 & exec sleep 302")
    until(
        lambda: sum(process.node == "n1" for process in other.processes()) >= 4, "slurmd, step and tasks run"
    )
    pids = [process.pid for process in other.processes()]
    assert not {process.pid for process in testbed.processes()} & set(pids)
    for _ in range(2):
        subprocess.run([COMMANDS / "down", "--dir", dir], check=True)
        assert other.processes() == []
    assert not [pid for pid in pids if _lives(pid)]
    assert testbed.run("sinfo", "--noheader", "--format=%T") == "idle"


def test_preemption_can_send_the_users_signal(dir: Path, tmp_path: Path) -> None:
    other = Testbed(dir, num_nodes=1, send_user_signal=True)
    other.up()
    out = tmp_path / "out"
    step = f"trap 'echo USR2 >> {out}' USR2; trap 'echo TERM >> {out}' TERM; echo run >> {out}; while true; do sleep 0.1; done"
    submit(other, f'exec srun sh -c "{step}"', "--signal=USR2@1", "--exclusive")
    until(lambda: lines(out) == ["run"], "the step runs")
    submit(other, "true", "--partition=high", "--exclusive")
    until(lambda: len(lines(out)) == 2, "the step is told")
    assert lines(out) == ["run", "USR2"]


def test_down_ends_what_a_killed_up_had_started(dir: Path) -> None:
    up = subprocess.Popen([COMMANDS / "up", "--dir", dir], stdout=subprocess.DEVNULL)
    other = Testbed(dir)
    until(lambda: "slurmdbd" in other.pids, "slurmdbd is started")
    up.send_signal(signal.SIGKILL)
    up.wait()
    assert "n4" not in other.pids
    other.down()
    assert other.processes() == []


def test_a_daemon_that_fails_is_told_with_its_words_and_leaves_nothing(dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "bin/slurmdbd"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho the dog ate it\nexit 3\n")
    broken.chmod(0o755)
    environment = {**os.environ, "PATH": f"{broken.parent}:{os.environ['PATH']}"}
    up = subprocess.run(
        [sys.executable, COMMANDS / "up", "--dir", dir], env=environment, capture_output=True, text=True
    )
    assert (up.returncode, up.stdout) == (1, "")
    assert f"slurmdbd ended with exit code 3; {dir}/log/slurmdbd.out ends:\n  the dog ate it\n" in up.stderr
    assert Testbed(dir).processes() == []


def test_up_refuses_a_running_testbed_and_somebody_elses_files(testbed: Testbed, tmp_path: Path) -> None:
    with pytest.raises(TestbedError, match="has a running testbed"):
        Testbed(testbed.dir).up()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(TestbedError, match=r"files of something else \(thesis.tex\)"):
        Testbed(tmp_path).up()
    assert default_dir() != testbed.dir


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
