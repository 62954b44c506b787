"""Stands for sbatch, squeue, sacct, scontrol, srun and scancel: prints what it was told to, keeps what it was given.

It lies on the PATH under each of these names. Beside it are `answers.json`, command → [exit code, stdout, stderr],
and `calls.jsonl`. Of the answers that fit, the one with the longest command counts.
"""

import json
import sys
from pathlib import Path

program = Path(sys.argv[0])
command = " ".join([program.name, *sys.argv[1:]])
given = "" if sys.stdin.isatty() else sys.stdin.read()
files = [Path(argument).read_text() for argument in sys.argv[1:] if Path(argument).is_file()]
with open(program.parent / "calls.jsonl", "a") as calls:
    call = {"program": program.name, "argv": sys.argv[1:], "stdin": given, "files": files}
    calls.write(json.dumps(call) + "\n")
answers = json.loads((program.parent / "answers.json").read_text())
fitting = [start for start in answers if command.startswith(start)]
code, out, err = answers[max(fitting, key=len)]
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
