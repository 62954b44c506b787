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
