"""How long the tiny training takes in a warm process: REPEATS times, traced.

Usage: floor_training.py REPEATS
"""

from __future__ import annotations

import sys

from bench import workload

if __name__ == "__main__":
    for _ in range(int(sys.argv[1])):
        workload.tiny()
