"""What SLURM's words prove about a job, and what they do not prove."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from sweeper import clock, processes, slurm
from sweeper.observer import Observer, proof_of_death
from sweeper.records import Death, ProcessId, Suspect
from sweeper.slurm import ASK_EVERY_S, Job, Jobs, parse_sacct, parse_squeue, why_stopped, worker_name
from sweeper.states import Outcome
from sweeper.worker import Worker

# As the testbed's SLURM 22.05.8 printed it: an array 1 of three, whose member 1_1 (job 3) was requeued.
SQUEUE_22_05 = """\
3                    PENDING                        1          
1                    RUNNING                        0          
2                    RUNNING                        0          
"""
SACCT_22_05 = "2|RUNNING\n3|REQUEUED\n1|RUNNING\n3|PENDING\n"
# As 24.11 has it: a job that requeued itself in its grace runs once more after it had completed.
SQUEUE_24_11 = """\
812                  COMPLETED                      2          
813                  CANCELLED                      0          
814                  OUT_OF_MEMORY                  0          
"""
SACCT_24_11 = "812|PREEMPTED\n812|REQUEUED\n812|COMPLETED\n813|CANCELLED by 1000\n812.batch|COMPLETED\n"

JOB_22_05 = (
    "JobId=2 ArrayJobId=1 ArrayTaskId=0 ArrayTaskThrottle=2 JobName=sweeper-simple UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901759 Nice=0 Account=root QOS=normal JobState={state} Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:09 TimeLimit=01:00:00 TimeMin=N/A SubmitTime=2026-11-25T09:42:52 EligibleTime=2026-11-25T09:42:53 "
    "AccrueTime=Unknown StartTime={start} EndTime={end} Deadline=N/A PreemptEligibleTime={start} PreemptTime={preempt} SuspendTime=None "
    "SecsPreSuspend=0 Partition=low AllocNode:Sid=localhost:4380 ReqNodeList=(null) NodeList=n1 Command=(null) WorkDir=/a place "
    "Comment=sweeper abc  StdErr=/dev/null Power= \n"
)


class Cluster:
    """Stands for SLURM's commands: what each prints, None for one that fails; counts who was asked what."""

    def __init__(self, squeue: str | None = "", sacct: str | None = "", scontrol: str | None = "") -> None:
        self.answers = {"squeue": squeue, "sacct": sacct, "scontrol": scontrol}
        self.asked: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> str | None:
        self.asked.append(command)
        return self.answers[command[0]]

    def programs(self) -> list[str]:
        return [command[0] for command in self.asked]


@pytest.fixture(autouse=True)
def _in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "99")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The observer's clock, moved by hand."""
    now = {"s": 1000.0}
    monkeypatch.setattr(clock, "awake_s", lambda: now["s"])
    return now


def owner(job: str, restarts: int = 0) -> ProcessId:
    return replace(processes.identify(), slurm_job_id=job, slurm_restarts=restarts)


def squeue(*lines: tuple[str, str, int]) -> str:
    return "".join(f"{job:20} {state:30} {restarts:<10} \n" for job, state, restarts in lines)


def death(cluster: Cluster, job: str = "7", restarts: int = 0) -> Death | None:
    return Jobs(cluster).death(owner(job, restarts))


# --- reading -----------------------------------------------------------------------------------


def test_squeue_of_22_05_and_of_24_11_is_read() -> None:
    assert parse_squeue(SQUEUE_22_05) == {
        "1": Job("RUNNING", 0),
        "2": Job("RUNNING", 0),
        "3": Job("PENDING", 1),
    }
    assert parse_squeue(SQUEUE_24_11) == {
        "812": Job("COMPLETED", 2), "813": Job("CANCELLED", 0), "814": Job("OUT_OF_MEMORY", 0)
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "slurm_load_jobs error: Unable to contact\n", "7 RUNNING\n", "7 RUNNING N/A\n", "7 A B 0\n"],
)
def test_lines_of_another_form_say_nothing(text: str) -> None:
    assert parse_squeue(text) == {}
    assert parse_sacct(text, "7") == []


def test_sacct_tells_of_each_run_of_a_job_and_only_of_that_job() -> None:
    assert parse_sacct(SACCT_22_05, "3") == ["REQUEUED", "PENDING"]
    assert parse_sacct(SACCT_24_11, "812") == ["PREEMPTED", "REQUEUED", "COMPLETED"]
    assert parse_sacct(SACCT_24_11, "813") == ["CANCELLED"]


def test_the_number_of_an_array_is_not_that_of_its_members() -> None:
    assert parse_sacct(SACCT_22_05, "1") == ["RUNNING"]


# --- who is over -------------------------------------------------------------------------------

PROVES = [
    ("COMPLETED", Outcome.LOST),
    ("FAILED", Outcome.LOST),
    ("CANCELLED", Outcome.PREEMPTED),
    ("PREEMPTED", Outcome.PREEMPTED),
    ("TIMEOUT", Outcome.TIMEOUT),
    ("DEADLINE", Outcome.TIMEOUT),
    ("OUT_OF_MEMORY", Outcome.OOM),
]
PROVES_NOTHING = [
    "RUNNING",
    "PENDING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "REVOKED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "A_STATE_OF_SLURM_99",
]


@pytest.mark.parametrize(("state", "outcome"), PROVES)
def test_a_job_that_is_over_is_proof_with_its_cause(state: str, outcome: Outcome) -> None:
    found = death(Cluster(squeue(("7", state, 0))))
    assert found == Death(f"its SLURM job 7 is {state}", outcome)


@pytest.mark.parametrize("state", PROVES_NOTHING)
def test_a_job_that_may_have_processes_left_proves_nothing(state: str) -> None:
    assert death(Cluster(squeue(("7", state, 0)))) is None


@pytest.mark.parametrize("answer", ["", squeue(("8", "COMPLETED", 0)), None])
def test_a_job_that_is_not_listed_and_a_squeue_that_fails_prove_nothing(answer: str | None) -> None:
    assert death(Cluster(answer)) is None


def test_an_owner_outside_of_slurm_is_not_asked_about() -> None:
    cluster = Cluster(squeue(("7", "COMPLETED", 0)))
    assert death(cluster, job="") is None
    assert cluster.asked == []


def test_outside_of_slurm_it_is_not_asked_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    cluster = Cluster(squeue(("7", "COMPLETED", 0)))
    assert death(cluster) is None
    assert cluster.asked == []


# --- requeues ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["REQUEUED", "PREEMPTED", "CANCELLED"])
def test_a_job_that_was_requeued_since_is_over_as_sacct_says_it_ended(state: str) -> None:
    cluster = Cluster(squeue(("7", "RUNNING", 1)), f"7|{state}\n7|RUNNING\n")
    assert death(cluster) == Death(f"its SLURM job 7 is {state}", Outcome.PREEMPTED)


@pytest.mark.parametrize("state", ["REQUEUED", "PREEMPTED"])
def test_a_job_that_is_being_requeued_has_processes_left_though_sacct_calls_it_over(state: str) -> None:
    cluster = Cluster(squeue(("7", "COMPLETING", 1)), f"7|{state}\n")  # 22.05, for as long as KillWait
    assert death(cluster) is None
    gone = Jobs(cluster).death(owner("7"), is_gone=True)
    assert gone == Death(f"its SLURM job 7 is {state}", Outcome.PREEMPTED)


@pytest.mark.parametrize("state", ["NODE_FAIL", "BOOT_FAIL", "RUNNING"])
def test_a_requeue_after_a_lost_node_proves_nothing(state: str) -> None:
    assert death(Cluster(squeue(("7", "RUNNING", 1)), f"7|{state}\n7|RUNNING\n")) is None


@pytest.mark.parametrize("sacct", [None, "", "8|REQUEUED\n", "Slurm accounting storage is disabled\n"])
def test_a_requeue_of_which_sacct_does_not_know_proves_nothing(sacct: str | None) -> None:
    assert death(Cluster(squeue(("7", "PENDING", 1)), sacct)) is None


def test_an_older_job_of_the_same_number_proves_nothing() -> None:
    """SLURM's numbers begin anew one day; sacct then tells of runs that were never this job's."""
    assert death(Cluster(squeue(("7", "RUNNING", 1)), "7|CANCELLED\n7|REQUEUED\n7|RUNNING\n")) is None


def test_each_run_of_a_job_is_told_apart_by_its_restarts() -> None:
    cluster = Cluster(squeue(("7", "RUNNING", 3)), "7|REQUEUED\n7|NODE_FAIL\n7|TIMEOUT\n7|RUNNING\n")
    jobs = Jobs(cluster)
    outcomes = [
        found and found.outcome for found in (jobs.death(owner("7", restarts)) for restarts in range(5))
    ]
    assert outcomes == [Outcome.PREEMPTED, None, Outcome.TIMEOUT, None, None]
    assert cluster.programs() == ["squeue", "sacct"]


def test_a_run_that_squeue_does_not_know_of_yet_is_not_over() -> None:
    assert death(Cluster(squeue(("7", "CANCELLED", 0))), restarts=1) is None


def test_the_last_member_of_an_array_is_not_over_with_another_member() -> None:
    cluster = Cluster(
        squeue(("2", "COMPLETED", 0), ("1", "RUNNING", 1)), "2|COMPLETED\n1|REQUEUED\n1|RUNNING\n"
    )
    assert death(cluster, job="1") == Death("its SLURM job 1 is REQUEUED", Outcome.PREEMPTED)
    assert death(cluster, job="1", restarts=1) is None


def test_a_completed_job_that_runs_once_more_is_asked_about_by_its_earlier_run() -> None:
    assert death(Cluster(SQUEUE_24_11, SACCT_24_11), job="812", restarts=1) == Death(
        "its SLURM job 812 is REQUEUED", Outcome.PREEMPTED
    )


# --- how often it is asked ---------------------------------------------------------------------


def test_one_query_answers_for_all_owners_until_it_is_old(times: dict[str, float]) -> None:
    cluster = Cluster(squeue(*((str(job), "COMPLETED", 0) for job in range(1, 1000))))
    jobs = Jobs(cluster)
    for _ in range(3):
        assert all(jobs.death(owner(str(job))) for job in range(1, 1000))
        times["s"] += ASK_EVERY_S / 3 - 0.01
    assert cluster.programs() == ["squeue"]
    times["s"] += 0.1
    jobs.death(owner("1"))
    assert cluster.programs() == ["squeue", "squeue"]


def test_a_squeue_that_fails_is_not_asked_more_often(times: dict[str, float]) -> None:
    cluster = Cluster(None)
    jobs = Jobs(cluster)
    for _ in range(50):
        jobs.death(owner("7"))
    times["s"] += ASK_EVERY_S - 0.1
    jobs.death(owner("7"))
    assert cluster.programs() == ["squeue"]


def test_an_answer_that_is_followed_by_a_failure_counts_no_more(times: dict[str, float]) -> None:
    cluster = Cluster(squeue(("7", "COMPLETED", 0)))
    jobs = Jobs(cluster)
    assert jobs.death(owner("7"))
    times["s"] += ASK_EVERY_S
    cluster.answers["squeue"] = None
    assert jobs.death(owner("7")) is None


def test_what_sacct_did_not_know_yet_is_asked_again_with_the_next_query(times: dict[str, float]) -> None:
    cluster = Cluster(squeue(("7", "PENDING", 1)), "")
    jobs = Jobs(cluster)
    assert jobs.death(owner("7")) is None
    cluster.answers["sacct"] = "7|REQUEUED\n"
    assert jobs.death(owner("7")) is None
    times["s"] += ASK_EVERY_S
    assert jobs.death(owner("7"))
    assert cluster.programs() == ["squeue", "sacct"] * 2


def test_of_a_process_that_is_known_to_be_gone_the_cause_is_asked_afresh(times: dict[str, float]) -> None:
    cluster = Cluster(squeue(("7", "RUNNING", 0)))
    jobs = Jobs(cluster)
    assert jobs.death(owner("7")) is None
    cluster.answers["squeue"] = squeue(("7", "CANCELLED", 0))
    times["s"] += ASK_EVERY_S / 10
    assert jobs.death(owner("7")) is None
    assert jobs.death(owner("7"), is_gone=True) == Death("its SLURM job 7 is CANCELLED", Outcome.PREEMPTED)
    for _ in range(20):
        jobs.death(owner("7"), is_gone=True)
    assert cluster.programs() == ["squeue"] * 2


# --- proof and observer ------------------------------------------------------------------------

GONE = 4_190_000  # above the kernel's largest pid


def seen(process: ProcessId, *, lost_count: int = 0) -> Suspect:
    return Suspect(
        run_id="simple.r.00000", lease_epoch=1, heartbeat=1, lease_until=0.0, lost_count=lost_count, owner=process, processes=()
    )  # fmt: skip


def test_slurm_says_why_a_process_is_gone_when_it_knows() -> None:
    gone = replace(owner("7"), pid=GONE)
    knows, knows_not = Cluster(squeue(("7", "PREEMPTED", 0))), Cluster(squeue(("7", "RUNNING", 0)))
    assert proof_of_death(Jobs(knows))(gone) == Death("its SLURM job 7 is PREEMPTED", Outcome.PREEMPTED)
    for cluster in (knows_not, Cluster(None)):
        assert proof_of_death(Jobs(cluster))(gone) == Death(f"its process {GONE} is gone", Outcome.LOST)


def test_a_process_of_a_lost_node_is_over_only_when_it_is_seen_to_be_gone() -> None:
    cluster = Cluster(squeue(("7", "RUNNING", 1)), "7|NODE_FAIL\n7|RUNNING\n")
    assert proof_of_death(Jobs(cluster))(owner("7")) is None
    gone = proof_of_death(Jobs(cluster))(replace(owner("7"), pid=GONE))
    assert gone == Death(f"its process {GONE} is gone", Outcome.LOST)


@pytest.mark.parametrize(
    ("state", "is_free"),
    [("PREEMPTED", True), ("CANCELLED", True), ("TIMEOUT", True), ("COMPLETED", False), ("FAILED", False)],
)
def test_a_job_that_slurm_ended_costs_no_back_off(times: dict[str, float], state: str, is_free: bool) -> None:
    observer = Observer(ttl_s=60.0, proof=proof_of_death(Jobs(Cluster(squeue(("7", state, 0))))))
    assert bool(observer.over([seen(owner("7"), lost_count=9)])) is is_free
    times["s"] += 31.0
    assert observer.over([seen(owner("7"), lost_count=9)])


def test_an_owner_of_whom_slurm_says_nothing_is_over_when_its_heartbeat_stands_still(
    times: dict[str, float],
) -> None:
    observer = Observer(ttl_s=60.0, proof=proof_of_death(Jobs(Cluster(None))))
    assert observer.over([seen(owner("7"))]) == []
    times["s"] += 60.0
    assert observer.over([seen(owner("7"))])[0][1] == Death("its heartbeat stood still for 60 s")


# --- why this job stops ------------------------------------------------------------------------


def job(*, state: str = "RUNNING", end_in_s: float = 3000, start_in_s: float = -60, preempt_in_s: float | None = None) -> str:  # fmt: skip
    def at(seconds: float) -> str:
        return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")

    preempt = "None" if preempt_in_s is None else at(preempt_in_s)
    return JOB_22_05.format(state=state, start=at(start_in_s), end=at(end_in_s), preempt=preempt)


def stopped(answer: str | None, *, warning_s: float = 120.0) -> tuple[Outcome, str]:
    environment = {"SLURM_JOB_ID": "2", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"}
    return why_stopped(warning_s=warning_s, command=Cluster(scontrol=answer), environment=environment)


@pytest.mark.parametrize("preempt_in_s", [-2, 4])
def test_a_job_that_is_preempted_now_says_so(preempt_in_s: float) -> None:
    assert stopped(job(preempt_in_s=preempt_in_s)) == (Outcome.PREEMPTED, "SLURM job 1_0 is preempted")


def test_a_preemption_of_before_a_requeue_is_not_why_it_stops_now() -> None:
    late = job(preempt_in_s=-600, end_in_s=100)
    assert stopped(late) == (Outcome.TIMEOUT, "the time limit of SLURM job 1_0 is near")


@pytest.mark.parametrize(
    ("end_in_s", "is_late"), [(-30, True), (0, True), (120, True), (175, True), (185, False), (3000, False)]
)
def test_the_time_limit_is_why_when_it_is_as_near_as_slurm_warns(end_in_s: float, is_late: bool) -> None:
    outcome, reason = stopped(job(end_in_s=end_in_s))
    assert outcome is (Outcome.TIMEOUT if is_late else Outcome.PREEMPTED)
    assert reason == ("the time limit of SLURM job 1_0 is near" if is_late else "SLURM ends job 1_0")


def test_a_job_that_slurm_ends_at_its_limit_without_a_warning_is_late() -> None:
    at_its_end = job(state="COMPLETING", end_in_s=0).replace("Reason=None", "Reason=TimeLimit")
    assert stopped(at_its_end) == (Outcome.TIMEOUT, "the time limit of SLURM job 1_0 is reached")


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
@pytest.mark.parametrize("end_in_s", [0, 3000])
def test_a_job_that_is_cancelled_or_requeued_is_not_late(state: str, end_in_s: float) -> None:
    assert stopped(job(state=state, end_in_s=end_in_s)) == (Outcome.PREEMPTED, "SLURM ends job 1_0")


@pytest.mark.parametrize("answer", [None, "", "slurm_load_jobs error: Invalid job id specified\n", "PreemptTime= EndTime=x\n"])  # fmt: skip
def test_without_an_answer_it_is_a_preemption(answer: str | None) -> None:
    assert stopped(answer) == (Outcome.PREEMPTED, "SLURM ends job 1_0")


def test_a_job_without_a_time_limit_is_not_late() -> None:
    assert stopped(job().replace("EndTime=", "EndTime=Unknown Was="))[0] is Outcome.PREEMPTED


def test_one_member_of_an_array_is_asked_about_by_its_index() -> None:
    cluster = Cluster(scontrol=job())
    environment = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "2"}
    why_stopped(warning_s=0.0, command=cluster, environment=environment)
    assert cluster.asked == [["scontrol", "show", "job", "--oneliner", "1_2"]]


def test_a_worker_has_one_name_through_all_requeues() -> None:
    member = {"SLURM_JOB_ID": "2", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"}
    assert worker_name(member) == worker_name({**member, "SLURM_RESTART_COUNT": "3"}) == "slurm:1_0"
    assert worker_name({"SLURM_JOB_ID": "2"}) == "slurm:2"


# --- asking ------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `squeue` on the PATH that is a shell script, as sites wrap theirs."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "squeue"
    path.touch(mode=0o700)
    return path


@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo 7 RUNNING 0", "7 RUNNING 0\n"), ("echo 7 COMPLETED 0; exit 1", None), ("exit 0", "")],
)
def test_a_command_counts_only_when_it_succeeds(program: Path, script: str, answer: str | None) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    assert slurm.run(["squeue"]) == answer


def test_a_command_that_is_not_there_or_may_not_run_is_no_answer(program: Path) -> None:
    assert slurm.run(["no-such-command-of-slurm"]) is None
    program.write_bytes(b"\x7fELF no program")
    assert slurm.run(["squeue"]) is None


def test_bytes_that_are_no_text_are_read_all_the_same(program: Path) -> None:
    program.write_text("#!/bin/sh\nprintf '7 RUNNING \\377\\n'\n")
    assert slurm.run(["squeue"]) == "7 RUNNING \N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize("script", ["exec sleep 60", "sleep 60", "trap '' TERM; sleep 60"])
def test_a_command_that_hangs_is_no_answer_and_is_not_waited_for(
    program: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(slurm, "ANSWER_WAIT_S", 0.2)
    program.write_text(f"#!/bin/sh\n{script}\n")
    began = time.monotonic()
    assert slurm.run(["squeue"]) is None
    assert time.monotonic() - began < 10.0


# --- the grace ---------------------------------------------------------------------------------

PARTITION = "PartitionName=low AllowGroups=ALL GraceTime=5 PreemptMode=REQUEUE State=UP\n"
CONFIG = "KillOnBadExit           = 0\nKillWait                = 3 sec\nSLURM_VERSION           = 22.05.8\n"


@pytest.mark.parametrize(
    ("partition", "config", "expected"),
    [(PARTITION, CONFIG, 8.0), (None, CONFIG, None), (PARTITION, None, None)],
)
def test_the_grace_is_that_of_the_partition_and_the_wait_before_the_kill(
    partition: str | None, config: str | None, expected: float | None
) -> None:
    def answer(command: Sequence[str]) -> str | None:
        return partition if "partition" in command else config

    assert slurm.grace_s(answer, environment={"SLURM_JOB_PARTITION": "low"}) == expected


def test_a_save_that_takes_longer_than_the_grace_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "grace_s", lambda: 8.0)
    worker = Worker.__new__(Worker)
    worker._grace_s = None
    monkeypatch.setattr(slurm, "grace_s", lambda: pytest.fail("no save is known, and nobody is asked"))
    worker._weigh_save(0.0)
    monkeypatch.setattr(slurm, "grace_s", lambda: 8.0)
    for seconds in (7.9, 12.0, 13.0):
        worker._weigh_save(seconds)
    assert capfd.readouterr().err.count("a save took 12 s, and SLURM kills a preempted job after 8 s") == 1


def test_the_same_number_on_another_cluster_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(squeue(("7", "CANCELLED", 0)))
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    known = replace(owner("7"), slurm_cluster="here")
    assert Jobs(cluster).death(known) is not None
    assert Jobs(cluster).death(replace(known, slurm_cluster="there")) is None
    assert Jobs(cluster).death(replace(known, slurm_cluster="")) is None, "it does not say where it was"
