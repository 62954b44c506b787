"""A training that is a program of its own: any language, nothing to import, a line protocol.

`trainer=command` names `train` as its target. docs/command.md is the protocol as a program sees it.
"""

from sweeper.command.training import train

__all__ = ["train"]
