"""A sweep on a real SLURM survives every way in which its jobs end."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_sweep import ClusterSweep, kill, owner_of, trainer_of, until
from testbed import Testbed

pytestmark = pytest.mark.slow

NUM_TRIALS = 12
TRAINING = ("trainer.epochs=10", f"sweep.n_trials={NUM_TRIALS}")


@pytest.mark.timeout(600)
def test_everything_that_can_happen_in_one_sweep(testbed: Testbed, tmp_path: Path) -> None:
    """Three preemptions, a requeue, a time limit, a killed trainer, worker, node, and a controller that restarts."""
    quiet = ClusterSweep(None, tmp_path / "quiet")
    quiet.launch(*TRAINING, "launcher.n_workers=2", launcher="local")
    expected = quiet.weights()
    assert len(expected) == NUM_TRIALS

    sweep = ClusterSweep(testbed, tmp_path / "stormy", more={"PACE_S": "0.4"})
    said = sweep.launch(
        *TRAINING, "launcher.n_workers=4", "launcher.partition=low", "launcher.signal_delay_s=20",
        "+launcher.additional_parameters.exclusive=true",
    ).stdout  # fmt: skip
    assert said.startswith("submitted 4 workers: ")

    def four_train() -> dict[str, dict[str, object]] | None:
        training = sweep.training()
        return training if len(training) == 4 else None

    def tell() -> str:
        return f"{sweep.outcomes()}\n{testbed.run('squeue')}\n{sweep.logs()[-6000:]}"

    until(four_train, "four workers train", tell=tell)
    testbed.restart_controller()

    nodes = ",".join(sorted(sweep.node(worker) for worker in list(sweep.training(step=0))[:3]))
    testbed.run(
        "sbatch", "--partition=high", "--exclusive", "--nodes=3", f"--nodelist={nodes}", "--output=/dev/null", "--wrap", "sleep 2"
    )  # fmt: skip
    until(lambda: sweep.outcomes()["preempted"] == 3, "three are preempted", tell=tell)

    training = until(four_train, "four workers train again", tell=tell)
    requeued, late, first, second = training
    testbed.run("scontrol", "requeue", sweep.job(requeued))
    testbed.run("scontrol", "update", f"job={sweep.job(late)}", "EndTime=now+40")
    kill(trainer_of(training[first]))
    kill(owner_of(training[second]))
    until(lambda: sweep.outcomes()["preempted"] == 4, "a requeued job's run is released", tell=tell)
    until(lambda: sweep.outcomes()["lost"] == 2, "a killed trainer and a killed worker are lost", tell=tell)
    until(lambda: sweep.outcomes()["timeout"] == 1, "a time limit is seen", tell=tell)

    victim = next(iter(until(four_train, "four workers train once more", tell=tell)))
    node = sweep.node(victim)
    testbed.kill_node(node)
    until(lambda: sweep.outcomes()["lost"] == 3, "a node is lost", tell=tell)
    testbed.start_node(node)

    until(sweep.is_complete, "all trials are done", tell=tell)
    until(lambda: not sweep.jobs("RUNNING", "PENDING", "COMPLETING"), "the workers end", tell=tell)
    assert sweep.violations() == []
    assert [row["trial"] for row in sweep.runs()] == list(range(NUM_TRIALS))
    assert sweep.weights() == expected
    outcomes = dict(sweep.outcomes())
    # The fourth, if SLURM's KILL for the step that died with the node comes late, to the step of its requeue.
    assert outcomes.pop("lost") in (3, 4)
    assert outcomes == {"completed": NUM_TRIALS, "preempted": 4, "timeout": 1}
    reasons = {row["reason"] for row in sweep.attempts() if row["outcome"] == "preempted"}
    assert len([reason for reason in reasons if reason.endswith("is preempted")]) == 3
    # The second, if the requeue came before the training's first step and was over before it.
    requeues = ("SLURM ends job", "its SLURM job")
    assert len([reason for reason in reasons if reason.startswith(requeues)]) == 1
    assert not list(sweep.data_dir.rglob("*.incomplete"))
