"""Time as a parameter: the clocks that leases use, behind names that tests can replace."""

from __future__ import annotations

import time


def wall_s() -> float:
    """Seconds since the Unix epoch, UTC. For people and records; never proof that a lease is over."""
    return time.time()


def boot_s() -> float:
    """Seconds since boot, *counting suspend*: the clock an owner fences itself by.

    Source: clock_gettime(2), CLOCK_BOOTTIME. The same in every process of one machine.
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def awake_s() -> float:
    """Seconds this machine was awake: the clock an *observer* measures a still heartbeat by.

    HAZARD: it must not count suspend. On a machine that slept, owner and observer both stood
    still, and the owner deserves its full time after waking.
    """
    return time.monotonic()
