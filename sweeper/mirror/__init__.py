"""Run directories copied into an object store after each commit, and found again by another machine."""

from sweeper.mirror.settings import MirrorSettings

__all__ = ["MirrorSettings"]
