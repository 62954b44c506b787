"""Rows on their way out: the metrics log, and the tracker process that carries them further.

The trainer writes `metrics.MetricsLog`; the worker holds a `Tracker`; the process behind it
(`sweeper.tracking.server`) follows the log into W&B and TensorBoard. Importing this package
loads the standard library only.
"""

from sweeper.tracking.messages import TensorboardSettings, TrackingSettings, WandbSettings
from sweeper.tracking.metrics import Follower, MetricsLog, last_step, read_rows
from sweeper.tracking.tracker import Tracker

__all__ = [
    "Follower",
    "MetricsLog",
    "TensorboardSettings",
    "Tracker",
    "TrackingSettings",
    "WandbSettings",
    "last_step",
    "read_rows",
]
