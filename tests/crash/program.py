"""A training that knows nothing of sweeper but its protocol: plain Python, a file format of its own."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

DIRECTORY = Path(os.environ["SWEEPER_CHECKPOINT_DIR"])
is_asked_to_stop = False


def say(**words):
    print("SWEEPER " + json.dumps(words), flush=True)


def stop(signum, frame):
    global is_asked_to_stop
    is_asked_to_stop = True


def save(step, weight, generator):
    """Two files, one of them in a subdirectory; replaced in place, which the answer makes safe."""
    (DIRECTORY / "deep").mkdir(exist_ok=True)
    (DIRECTORY / "model.pth").write_text(json.dumps({"step": step, "weight": weight}))
    (DIRECTORY / "deep" / "rng state.json").write_text(json.dumps(generator.getstate()))
    say(checkpoint=step)
    return sys.stdin.readline().strip()


def restore(generator):
    saved = json.loads((DIRECTORY / "model.pth").read_text())
    version, words, gauss = json.loads((DIRECTORY / "deep" / "rng state.json").read_text())
    generator.setstate((version, tuple(words), gauss))
    assert saved["step"] == int(os.environ["SWEEPER_RESUME_STEP"])
    return saved["weight"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--act", default="")
    parser.add_argument("--at", type=int, default=5)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    generator = random.Random(int(os.environ["SWEEPER_SEED"]))
    begin, weight = int(os.environ["SWEEPER_RESUME_STEP"]), 1.0
    if begin:
        weight = restore(generator)
    else:
        assert not any(DIRECTORY.iterdir())
    print("beginning at", begin)
    for step in range(begin + 1, options.steps + 1):
        weight -= options.lr * (weight - generator.gauss(0, 1))
        print("it goes on", end="\n" if step % 2 else "")
        print(flush=True)
        say(step=step, train_loss=weight * weight)
        if step % options.every == 0:
            assert save(step, weight, generator) == "ok"
        if step >= options.at and os.environ["SWEEPER_ATTEMPT"].endswith(":1"):
            misbehave(options.act)
        if is_asked_to_stop and options.act != "deaf":
            save(step, weight, generator)
            return
    say(step=options.steps, loss=weight * weight)


def misbehave(act):
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "abort":
        os.abort()
    elif act == "exit":
        print("no such data set", file=sys.stderr)
        sys.exit(3)
    elif act == "leave":
        subprocess.Popen(["sleep", "3600"])
        os.kill(os.getpid(), signal.SIGKILL)
    elif act in ("slow", "deaf") and not (Path(os.environ["SWEEPER_RUN_DIR"]).parents[3] / "go").exists():
        time.sleep(0.1)


main()
