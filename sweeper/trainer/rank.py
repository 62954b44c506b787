"""One rank of a training: what torchrun starts. See `sweeper.trainer.ranks`."""

import sys

from sweeper.trainer.ranks import be_rank

if __name__ == "__main__":
    sys.exit(be_rank())
