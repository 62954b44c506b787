"""What a training script imports: exact, verified, preemption-safe resume in a few lines.

from sweeper.torch import resumable

def train(cfg, run):
    model, optimizer, loader = build(cfg)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    for batch in loop.batches(epochs=cfg.epochs):
        loss = step(model, optimizer, batch)
        loop.report(loss=loss)
    return evaluate(model)

Without a sweep, `with open_run("out/mine") as run:` takes the place of what the function was given.
"""

from sweeper.checkpoints import find_latest
from sweeper.torch.loop import Loop, resumable
from sweeper.torch.standalone import open_run
from sweeper.trainer.run import Preempted, Run, TrialPruned

__all__ = ["Loop", "Preempted", "Run", "TrialPruned", "find_latest", "open_run", "resumable"]
