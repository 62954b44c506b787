"""One training over the nodes of a job: the same bits as on one machine, also when a node's rank is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_sweep import ClusterSweep, until
from testbed import Testbed

pytestmark = pytest.mark.slow

TRAINING = (
    "trainer._target_=ranks_trainer.train", "trainer.epochs=4", "sweep.n_trials=1", "launcher.n_workers=1",
    "checkpoint.every_n_steps=4", "+trainer.kind=ddp", "+trainer.at=9",
)  # fmt: skip
UNDISTURBED = ("+trainer.attempts=0", "+trainer.rank=0", "+trainer.act=none")


def digest_of(sweep: ClusterSweep) -> str:
    (weights,) = sweep.weights().values()
    return weights


@pytest.mark.timeout(400)
def test_ranks_on_two_nodes(testbed: Testbed, tmp_path: Path) -> None:
    """Two nodes with two ranks each end with the bytes of four ranks on one machine."""
    alone = ClusterSweep(None, tmp_path / "alone")
    alone.launch(*TRAINING, *UNDISTURBED, "launcher.ranks_per_worker=4", launcher="local")

    sweep = ClusterSweep(testbed, tmp_path / "two_nodes")
    options = (
        "launcher.nodes=2",
        "launcher.tasks_per_node=2",
        "+launcher.additional_parameters.exclusive=true",
    )
    sweep.launch(*TRAINING, "+trainer.attempts=1", "+trainer.rank=3", "+trainer.act=kill", *options)
    until(sweep.is_complete, "the trial is done", tell=sweep.logs)

    first, *later = sweep.attempts()
    assert (first["outcome"], first["reason"]) == ("lost", "the trainer was ended by SIGKILL")
    assert [row["outcome"] for row in later] == ["completed"]
    assert later[0]["start_step"] == 8
    assert digest_of(sweep) == digest_of(alone)
    until(lambda: not sweep.jobs("RUNNING", "PENDING", "COMPLETING"), "the job ends", tell=sweep.logs)


@pytest.mark.timeout(400)
def test_a_preemption_stops_all_nodes_at_one_step(testbed: Testbed, tmp_path: Path) -> None:
    """All ranks leave at the step where the first was told to, with a checkpoint; the same bits in the end."""
    alone = ClusterSweep(None, tmp_path / "alone")
    paced = (*TRAINING, "trainer.epochs=8", "checkpoint.every_n_steps=10", *UNDISTURBED)
    alone.launch(*paced, "launcher.ranks_per_worker=2", launcher="local")

    sweep = ClusterSweep(testbed, tmp_path / "preempted", more={"PACE_S": "0.3"})
    sweep.launch(
        *paced, "launcher.nodes=2", "launcher.partition=low", "+launcher.additional_parameters.exclusive=true"
    )
    (worker,) = until(lambda: sweep.training(step=10), "two nodes train", tell=sweep.logs)
    hosts = testbed.run("scontrol", "show", "hostnames", sweep.node(worker)).split()
    testbed.run(
        "sbatch", "--partition=high", "--exclusive", f"--nodelist={hosts[-1]}", "--output=/dev/null", "--wrap", "sleep 2"
    )  # fmt: skip
    until(sweep.is_complete, "the trial is done", tell=sweep.logs)

    first, second = sweep.attempts()
    assert (first["outcome"], second["outcome"]) == ("preempted", "completed"), sweep.logs()
    assert first["reason"].endswith("is preempted")
    assert second["start_step"] % 10 != 0, "the checkpoint of the preemption, not one of the cadence"
    assert digest_of(sweep) == digest_of(alone)
    until(lambda: not sweep.jobs("RUNNING", "PENDING", "COMPLETING"), "the job ends", tell=sweep.logs)
    assert not list(sweep.data_dir.glob("sweep/*/slurm/nodes_*_1")), "the last job's orders are gone"
