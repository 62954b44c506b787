"""The exception tree. Each error says what happened, to which id, why, and what to do.

SweeperError (1)
├── UsageError (2)            the command line is wrong
├── NotFound (1)              the sweep or run named does not exist
├── NotWell (1)               the thing asked about is not well
├── ConfigError (78)          configuration, storage or machine must be changed first
│   └── StorageError (78)     the database cannot be used
│       └── StorageBusy (75)  it is locked; later it will do
│           ├── StorageLost (75)  the connection to its server is
│           └── StorageSilent (69)  it has not answered this worker once
├── Fenced (76)               the lease is lost: somebody else owns the run
├── Released (75)             work was handed back; run the same command again
└── CheckpointError (1)       a checkpoint cannot be written or used
    └── CheckpointRefused (1) this one is not valid; the next candidate is tried
        └── Misfit (1)        its bytes are sound, but it is of another training than this one
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_NOT_WELL = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE
EXIT_RELEASED = 75  # EX_TEMPFAIL of sysexits.h: run me again
EXIT_FENCED = 76
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
EXIT_INTERRUPTED = 130


class SweeperError(Exception):
    """An error for people: one paragraph with what happened and what to do.

    Args:
        what: What happened, naming the sweep, run or file.
        why: The cause, when it is known.
        do: What the user can do about it.
    """

    exit_code = EXIT_NOT_WELL

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = what, why, do
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.do:
            text = text.rstrip(".") + f". {self.do}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.why, self.do)


def _rebuild(kind: type[SweeperError], what: str, why: str, do: str) -> SweeperError:
    return kind(what, why=why, do=do)


class UsageError(SweeperError):
    """The command line is wrong."""

    exit_code = EXIT_USAGE


class NotFound(SweeperError):
    """The sweep, run or directory that was named does not exist."""


class NotWell(SweeperError):
    """The thing asked about is not well, e.g. an invalid checkpoint or a failed trial."""


class ConfigError(SweeperError):
    """Configuration, storage or machine must be changed before anything can run."""

    exit_code = EXIT_CONFIG


class StorageError(ConfigError):
    """The database cannot be used: locked, foreign, newer than the code, not writable."""


class StorageBusy(StorageError):
    """The database is locked by somebody else; the same command may do later."""

    exit_code = EXIT_RELEASED


class StorageLost(StorageBusy):
    """The server does not answer, or ended what was begun; nothing of it happened."""


class StorageSilent(StorageBusy):
    """The database has not answered once since this worker began: it has no run that it could release."""

    exit_code = EXIT_UNAVAILABLE


class Fenced(SweeperError):
    """The lease is lost: another owner has the run, so nothing more may be written."""

    exit_code = EXIT_FENCED


class Released(SweeperError):
    """The work was handed back in order; the same command goes on with it."""

    exit_code = EXIT_RELEASED


class CheckpointError(SweeperError):
    """A checkpoint cannot be written or used."""


class CheckpointRefused(CheckpointError):
    """One checkpoint is not valid; the next older candidate is tried."""


class Misfit(CheckpointRefused):
    """A sound checkpoint of another training: its code, its data or the machine has changed since."""
