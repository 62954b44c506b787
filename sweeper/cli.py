"""The commands. Each verb imports what it needs inside itself, so that `list` answers at once.

argparse, not click: bare Python and SQLite are half of the tenth of a second that `list` has
(docs/decisions), and only the parser of the verb that was typed is built.
"""

from __future__ import annotations

import argparse
import os
import sys

from sweeper import __version__
from sweeper.errors import EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_USAGE, SweeperError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import NoReturn

EXIT_SIGPIPE = 141
"""What a shell reports of a program whose reader went away (128 + SIGPIPE)."""

Options = argparse.Namespace


class Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, without importing shutil to find out how wide that is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns())


def _columns() -> int:
    from sweeper.report.tables import terminal_width

    return min(terminal_width() or 100, 120) - 2


class Parser(argparse.ArgumentParser):
    """One of ours: no abbreviated options, which would change their meaning as options are added."""

    def __init__(self, prog: str, *, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            prog, description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False
        )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one paragraph on stderr."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    try:
        _print_anything()
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        return _code_of(stop)
    except Exception as error:  # noqa: BLE001 - the last border: people get a paragraph
        if debug:
            import traceback

            traceback.print_exc()
        print(_paragraph(error), file=sys.stderr)
        return error.exit_code if isinstance(error, SweeperError) else EXIT_NOT_WELL


def _print_anything() -> None:
    """Names may hold characters that the terminal's encoding lacks: escape them, never fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(f"sweeper: {stop.code}", file=sys.stderr)
    return EXIT_NOT_WELL


def _paragraph(error: Exception) -> str:
    from sweeper.report.tables import escape

    if isinstance(error, SweeperError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}. The same command with --debug shows where this happened."
    else:
        text = (
            f"unexpected {type(error).__name__}: {error}. This is a mistake in sweeper; "
            "the same command with --debug shows where it happened."
        )
    return f"sweeper: {escape(' '.join(text.split()))}"


# --- finding the verb ----------------------------------------------------------------------


def _dispatch(arguments: list[str]) -> int:
    top = _top_parser()
    before = top.parse_args(arguments)
    if before.verb is None:
        top.print_help(sys.stderr)
        return EXIT_USAGE
    if before.verb == "launch":
        return _launch(before)
    if before.verb not in _VERBS:
        _unknown(before.verb)
    _, add_arguments, run = _VERBS[before.verb]
    parser = Parser(prog=f"sweeper {before.verb}", description=run.__doc__)
    add_arguments(parser)
    _add_globals(parser)
    options = parser.parse_intermixed_args(before.rest, before)  # an option may stand before a name
    _complete(options)
    return run(options)


def verbs() -> list[str]:
    """Every verb there is."""
    return ["launch", *_VERBS]


def _top_parser() -> Parser:
    help_of = {"launch": _LAUNCH_HELP, **{verb: help_text for verb, (help_text, _, _) in _VERBS.items()}}
    parser = Parser(
        prog="sweeper",
        description="Hyperparameter sweeps that survive anything.",
        epilog="commands:\n" + "\n".join(f"  {verb:<9} {text}" for verb, text in help_of.items()),
    )
    _add_globals(parser)
    parser.add_argument("--version", action="version", version=f"sweeper {__version__}")
    parser.add_argument("verb", nargs="?", metavar="COMMAND", help="one of those below")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="...", help="what it takes; try COMMAND --help"
    )
    return parser


def _add_globals(parser: Parser) -> None:
    # SUPPRESS: an option that was given before the verb must survive one that was not given after it.
    missing = argparse.SUPPRESS
    parser.add_argument(
        "--storage",
        metavar="URL",
        default=missing,
        help="database [SWEEPER_STORAGE, else DATA_DIR/sweeper.db]",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        default=missing,
        help="run directories [SWEEPER_DATA_DIR, DATA_DIR, ./outputs]",
    )
    parser.add_argument("--debug", action="store_true", default=missing, help="show tracebacks")


def _complete(options: Options) -> None:
    """Fill in what the command line left to the environment and to defaults."""
    options.is_data_dir_given = "data_dir" in options
    options.given_storage = getattr(options, "storage", None) or os.environ.get("SWEEPER_STORAGE") or None
    if not options.is_data_dir_given:
        environment = os.environ.get("SWEEPER_DATA_DIR") or os.environ.get("DATA_DIR")
        options.data_dir = environment or "outputs"
    options.storage = options.given_storage or _default_storage(options.data_dir)


def _default_storage(data_dir: str) -> str:
    from sweeper.reading import default_storage

    return default_storage(data_dir)


def _unknown(verb: str) -> NoReturn:
    from difflib import get_close_matches

    known = verbs()
    near = get_close_matches(verb, known, n=2)
    raise UsageError(
        f"there is no command {verb!r}",
        do=f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(known)}.",
    )


def _data_dir(options: Options) -> Path:
    from pathlib import Path

    return Path(options.data_dir)


# --- verbs ---------------------------------------------------------------------------------

_LAUNCH_HELP = "start a sweep, or go on with it: launch +sweep=simple [Hydra overrides]"


def _launch(before: Options) -> int:
    from sweeper.launch.ahead import template_for
    from sweeper.rundir import override

    rest = [argument for argument in before.rest if argument != "--debug"]
    template = template_for(rest)  # it imports torch while this process imports the rest
    from sweeper.launch.command import main as launch

    keys = {"storage": "storage.url", "data_dir": "data_dir"}
    given = [override(key, getattr(before, name)) for name, key in keys.items() if name in before]
    return launch([*given, *rest], template=template)


def _worker(options: Options) -> int:
    """Claim and train runs of a sweep until none is left; what launchers start."""
    from sweeper.worker import main as work

    return work(
        options.sweep,
        storage=options.storage,
        data_dir=_data_dir(options),
        name=options.name,
        launcher_fd=options.launcher_fd,
        server_fd=options.server_fd,
    )


def _list(options: Options) -> int:
    """List runs."""
    from sweeper.report.listing import main as list_runs

    return list_runs(
        options.sweep,
        storage=options.storage,
        data_dir=options.data_dir,
        incomplete=options.incomplete,
        state=options.state,
        as_json=options.json,
    )


def _status(options: Options) -> int:
    """Show how far everything, a sweep, a run, or a directory is."""
    from sweeper.report.status import main as status

    return status(
        options.name,
        storage=options.given_storage,
        data_dir=_data_dir(options),
        watch=options.watch,
        as_json=options.json,
    )


def _show(options: Options) -> int:
    """Show one run: trial, overrides, attempts, last lines of the log, checkpoints."""
    from sweeper.report.show import main as show

    return show(options.run, storage=options.storage, data_dir=_data_dir(options), as_json=options.json)


def _best(options: Options) -> int:
    """Show the best completed trial: parameters, value, weights, and how to train it again."""
    from sweeper.report.show import best

    return best(options.sweep, storage=options.storage, data_dir=_data_dir(options), as_json=options.json)


def _logs(options: Options) -> int:
    """Print what every attempt of a run printed, in order and unchanged."""
    from sweeper.report.logs import main as logs

    return logs(options.run, storage=options.storage, data_dir=_data_dir(options), follow=options.follow)


def _verify(options: Options) -> int:
    """Check every byte of checkpoints; exit 1 when one is invalid. Needs no database."""
    from sweeper.report.verify import latest
    from sweeper.report.verify import main as verify

    if options.latest is not None:
        if options.names or options.json:
            raise UsageError("--latest takes one directory and nothing else")
        return latest(options.latest)
    return verify(options.names, data_dir=_data_dir(options), as_json=options.json)


def _sync(options: Options) -> int:
    """Send W&B what it lacks of runs that nobody trains now, from their metrics logs."""
    from sweeper.sync import main as sync

    return sync(options.name, storage=options.storage, data_dir=_data_dir(options))


def _resume(options: Options) -> int:
    """Start workers for what is unfinished, with the saved launcher configuration."""
    from sweeper.launch.ahead import template_for

    template = template_for([])
    from sweeper.launch.command import resume

    return resume(options.name, storage=options.storage, data_dir=_data_dir(options), template=template)


def _retry(options: Options) -> int:
    """Draw a new trial with the parameters of a failed run, which then no longer counts."""
    from sweeper.manage import retry

    return retry(options.run, storage=options.storage, data_dir=_data_dir(options))


def _cancel(options: Options) -> int:
    """Cancel a run, or a sweep with all its unfinished runs."""
    from sweeper.manage import cancel

    return cancel(options.name, storage=options.storage, data_dir=_data_dir(options))


def _rebuild(options: Options) -> int:
    """Make the database anew from run directories: a data directory, or one sweep's."""
    from pathlib import Path

    from sweeper.rebuild import main as rebuild
    from sweeper.report.places import place_of, relative

    directory = Path(options.directory)
    data_dir = _data_dir(options) if options.is_data_dir_given else relative(place_of(directory).data_dir)
    storage = options.given_storage or _default_storage(str(data_dir))
    return rebuild(directory, storage=storage, data_dir=data_dir)


def _db(options: Options) -> int:
    """Bring the database's tables to this version, or look after a PostgreSQL server of your own."""
    if options.action == "upgrade":
        from sweeper.manage import upgrade

        return upgrade(storage=options.storage, data_dir=_data_dir(options))
    from pathlib import Path

    from sweeper import embedded

    server = embedded.Server(Path(options.dir) if options.dir else _data_dir(options) / "postgres")
    if options.action == "up":
        return embedded.up(server, host=options.host, port=options.port)
    if options.action == "down":
        return embedded.down(server)
    if options.action == "status":
        return embedded.status(server)
    if not options.file:
        raise UsageError("db backup needs a FILE to write to")
    return embedded.backup(server, Path(options.file))


def _vast(options: Options) -> int:
    """Look after what launcher=vast has rented; nothing else is touched."""
    from sweeper.launch.vast.verbs import main as vast

    return vast(
        options.action,
        options.name,
        data_dir=_data_dir(options),
        num_lines=options.lines,
        as_json=options.json,
    )


# --- their arguments -----------------------------------------------------------------------


def _add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the stable contract for programs")


def _worker_arguments(parser: Parser) -> None:
    parser.add_argument("sweep", metavar="SWEEP")
    parser.add_argument(
        "--name", help="what this worker is called; a worker of the same name goes on with its runs"
    )
    parser.add_argument("--launcher-fd", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument("--server-fd", type=int, metavar="FD", help=argparse.SUPPRESS)


def _list_arguments(parser: Parser) -> None:
    from sweeper.states import State

    parser.add_argument("sweep", metavar="SWEEP", nargs="?", help="only runs of this sweep")
    parser.add_argument("--incomplete", action="store_true", help="only running and interrupted ones")
    parser.add_argument(
        "--state", metavar="S", choices=[state.value for state in State], help="only those in state S"
    )
    _add_json(parser)


def _status_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="SWEEP|RUN|DIR", nargs="?")
    parser.add_argument("--watch", action="store_true", help="until it is complete")
    _add_json(parser)


def _run_json_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    _add_json(parser)


def _best_arguments(parser: Parser) -> None:
    parser.add_argument("sweep", metavar="SWEEP")
    _add_json(parser)


def _logs_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is final")


def _verify_arguments(parser: Parser) -> None:
    parser.add_argument("names", metavar="RUN|DIR", nargs="*", help="runs or directories; default: all runs")
    parser.add_argument(
        "--latest", metavar="DIR", help="print the newest valid checkpoint of a run directory"
    )
    _add_json(parser)


def _name_argument(parser: Parser) -> None:
    parser.add_argument("name", metavar="SWEEP|RUN")


def _sync_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="SWEEP|RUN", nargs="?", help="default: all runs")


def _run_argument(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")


def _directory_argument(parser: Parser) -> None:
    parser.add_argument("directory", metavar="DIR")


def _db_arguments(parser: Parser) -> None:
    actions = ["upgrade", "up", "status", "down", "backup"]
    parser.add_argument("action", metavar="|".join(actions), choices=actions)
    parser.add_argument("file", metavar="FILE", nargs="?", help="where `backup` puts its dump")
    parser.add_argument("--dir", metavar="DIR", help="the server's directory [DATA_DIR/postgres]")
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help="what it listens on [as before; at first 127.0.0.1: this machine only]",
    )
    parser.add_argument("--port", type=int, metavar="N", help="[as before; at first a free one]")


def _vast_arguments(parser: Parser) -> None:
    actions = ["list", "logs", "stop", "destroy"]
    parser.add_argument("action", metavar="|".join(actions), choices=actions)
    parser.add_argument("name", metavar="SWEEP|ID", nargs="?", help="a sweep, or the number of an instance")
    parser.add_argument("--lines", type=int, metavar="N", default=200, help="of the log [200]")
    _add_json(parser)


_VERBS: dict[str, tuple[str, Callable[[Parser], None], Callable[[Options], int]]] = {
    "worker": ("one worker loop of a sweep", _worker_arguments, _worker),
    "list": ("the runs, or only the unfinished ones", _list_arguments, _list),
    "status": ("how far everything, a sweep, a run or a directory is", _status_arguments, _status),
    "show": ("one run: trial, attempts, log, checkpoints", _run_json_arguments, _show),
    "best": ("the best trial and its weights", _best_arguments, _best),
    "logs": ("what a run printed", _logs_arguments, _logs),
    "verify": ("check every byte of checkpoints", _verify_arguments, _verify),
    "resume": ("start workers for what is unfinished", _name_argument, _resume),
    "sync": ("send W&B what it lacks of runs nobody trains now", _sync_arguments, _sync),
    "retry": ("give a failed trial another run", _run_argument, _retry),
    "cancel": ("cancel a sweep or a run", _name_argument, _cancel),
    "rebuild": ("make a lost database anew from run directories", _directory_argument, _rebuild),
    "vast": ("list, logs, stop, destroy: what is rented on VastAI", _vast_arguments, _vast),
    "db": (
        "upgrade the tables; up, status, down, backup: a PostgreSQL server of your own",
        _db_arguments,
        _db,
    ),
}
