"""The documentation says what is so: links, commands, keys, states and the JSON contract."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from filled import Filled, commit_checkpoint
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import json_to_distribution

from sweeper import cli, errors, rundir
from sweeper.launch.command import FLAGS
from sweeper.launch.settings import read
from sweeper.search import distribution_of
from sweeper.states import OPTUNA_STATE, TRANSITIONS, Outcome, State

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))


def pages() -> list[Path]:
    """Every page of ours; hidden directories (environments, caches) are not."""
    found: list[Path] = []
    for directory, names, files in os.walk(ROOT):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(directory, name) for name in files if name.endswith(".md")]
    return sorted(found)


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return _FENCED.sub("", text_of(path))


def blocks(path: Path, language: str) -> list[str]:
    return [text for found, text in _FENCED.findall(text_of(path)) if found == language]


def section(path: Path, heading: str) -> str:
    """What stands between a `## heading` and the next."""
    _, _, rest = text_of(path).partition(f"\n## {heading}\n")
    assert rest, f"{path.name} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text: rows of cells, without head and rule."""
    found = re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in t.splitlines()[2:]] for t in found
    ]


def code(cell: str) -> str:
    """The one word in backticks that a cell consists of."""
    match = re.fullmatch(r"`([^`]*)`", cell)
    assert match, f"{cell!r} is not one word in backticks"
    return match[1]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links, files, commands ----------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        if anchor:
            assert anchor in {slug(heading) for heading in headings(target)}, f"{link}: no such heading"


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_files_named_in_the_readme_exist() -> None:
    readme = ROOT / "README.md"
    layout = next(block for block in blocks(readme, "") if "conf/ " in block)
    names = {*re.findall(r"\b([a-z]+/)\s", layout), *re.findall(r"-c (\S+\.txt)", text_of(readme))}
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).exists()] == []
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
    assert set(re.findall(r"make ([a-z]+)\b", "\n".join(blocks(readme, "console")))) <= set(targets)


def commands() -> list[tuple[str, str]]:
    """(page, what follows `sweeper`) of each command that a reader may type."""
    return sorted(
        {
            (named(page), re.split(r" +[#&|;]", line)[0])
            for page in pages()
            for block in blocks(page, "console")
            for line in re.findall(r"^\$ (?:python -m )?sweeper (.*)$", block, flags=re.MULTILINE)
        }
    )


@pytest.fixture(scope="module")
def hydra() -> Iterator[None]:
    with initialize_config_module("sweeper_conf", version_base="1.3"):
        yield


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that pages let their reader write: blocks of YAML that name their path, word for word."""
    for block in (*blocks(ROOT / "README.md", "yaml"), *blocks(DOCS / "command.md", "yaml")):
        (name,) = re.findall(r"^# (\S+\.yaml)\b", block, flags=re.MULTILINE)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    (program,) = (block for block in blocks(ROOT / "README.md", "python") if "def train(cfg, run)" in block)
    (tmp_path / "my_training.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_can_be_typed(page: str, command: str, hydra: None, mine: Path) -> None:
    before = cli._top_parser().parse_args(shlex.split(command))
    if before.verb == "launch":
        launched(before.rest, mine)
    else:
        parse(before.verb, before.rest)


def parse(verb: str, rest: list[str]) -> None:
    _, add_arguments, _ = cli._VERBS[verb]
    parser = cli.Parser(prog=verb, description=None)
    add_arguments(parser)
    cli._add_globals(parser)
    parser.parse_args(rest)


def launched(rest: list[str], mine: Path) -> None:
    """Compose and check what Hydra and we would get."""
    arguments = get_args_parser().parse_args([word for word in rest if word not in FLAGS])
    search = [f"hydra.searchpath=[file://{mine / arguments.config_dir}]"] if arguments.config_dir else []
    read(compose("config", overrides=[*arguments.overrides, *search]))


@pytest.mark.parametrize("page", pages(), ids=named)
def test_verbs_in_the_text_are_real(page: Path) -> None:
    # What a later issue will bring is announced with its number.
    for verb, rest in re.findall(r"`(?:python -m )?sweeper ([a-z]+)( [^`]*)?`(?! \(issue)", prose(page)):
        assert verb == "launch" or verb in cli._VERBS
        if verb != "launch" and "--" in rest:
            parse(verb, ["NAME", *re.findall(r"--\S+", rest)])


# --- configuration -------------------------------------------------------------------------

CONFIGURATION = DOCS / "configuration.md"


@pytest.fixture
def composed(hydra: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Key → default, of every option of every group that we ship."""
    for name in set(re.findall(r"oc\.env:(\w+)", all_of_conf())):
        monkeypatch.delenv(name, raising=False)
    found: dict[str, str] = {}
    others = [(group, option) for group, option in options() if option != default_options().get(group)]
    for overrides in ([], *([f"{group}={option}"] for group, option in others if group != "sweep")):
        cfg = compose("config", overrides=overrides)
        for key, value in flat("", OmegaConf.to_container(cfg)):
            found.setdefault(key, as_shown(cfg, key, value))
    return found


def all_of_conf() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "conf").rglob("*.yaml")))


def default_options() -> dict[str, str]:
    """Group → the option in the defaults list."""
    entries = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text())["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def options() -> list[tuple[str, str]]:
    return [(path.parent.name, path.stem) for path in sorted((ROOT / "conf").glob("*/*.yaml"))]


def flat(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, node


def as_shown(cfg: DictConfig, key: str, value: Any) -> str:
    value = OmegaConf.select(cfg, key) if "oc.env" in str(value) else value
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def test_every_key_is_documented_with_its_default(composed: dict[str, str]) -> None:
    (rows,) = tables(section(CONFIGURATION, "Keys"))
    documented = {code(key): code(default) for key, default, _ in rows}
    assert len(documented) == len(rows)
    assert documented == composed


def test_every_group_is_documented() -> None:
    defaults = default_options()
    there: dict[str, list[str]] = {}
    for group, option in options():
        there.setdefault(group, []).append(option)
    for group, names in there.items():
        names.sort(key=lambda name: (name != defaults.get(group), name))
    (rows,) = tables(section(CONFIGURATION, "Groups"))
    documented = {code(group): re.findall(r"`([a-z_]+)`", cell) for group, cell in rows}
    assert documented == there


def test_every_variable_of_the_configuration_is_documented() -> None:
    environment = section(CONFIGURATION, "Environment")
    names = set(re.findall(r"oc\.env:(\w+)", all_of_conf()))
    assert len(names) >= 6
    assert [name for name in sorted(names) if f"`{name}`" not in environment] == []


def test_search_spaces_mean_what_is_documented() -> None:
    (rows,) = tables(section(CONFIGURATION, "Search space"))
    assert len(rows) > 5
    assert {code(text): described(code(text)) for text, _ in rows} == {
        code(text): meaning for text, meaning in rows
    }


def described(text: str) -> str:
    made: Any = json_to_distribution(distribution_of("trainer.x", text))
    if hasattr(made, "choices"):
        return f"one of {', '.join(map(str, made.choices))}"
    kind = "int" if isinstance(made.low, int) else "float"
    usual = (None, 1) if kind == "int" else (None,)
    step = "" if made.step in usual else f", step {made.step}"
    return f"{kind} {made.low} to {made.high}{step}{', log' if made.log else ''}"


def test_exit_codes_are_documented() -> None:
    (rows,) = tables(section(CONFIGURATION, "Exit codes"))
    ours = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(number) for number, _ in rows} == ours | {cli.EXIT_SIGPIPE}


# --- states --------------------------------------------------------------------------------

STATES = DOCS / "states.md"


def test_the_diagram_is_the_table_of_transitions() -> None:
    (diagram,) = blocks(STATES, "mermaid")
    arrows = re.findall(r"^\s*(\S+) --> (\S+): (\S+)$", diagram, flags=re.MULTILINE)
    assert len(arrows) == diagram.count("-->")
    assert set(arrows) == {
        ("[*]", "running", "birth"),
        *((a, b, event) for (a, event), b in TRANSITIONS.items()),
    }


def test_the_tables_are_those_of_the_code() -> None:
    states, moves, outcomes, budgets, _ = tables(text_of(STATES))
    assert {(code(a), code(event)): code(b) for a, event, b, _ in moves} == TRANSITIONS
    assert {code(row[0]): row[3] for row in states} == OPTUNA_STATE
    assert {code(row[0]): (row[1], row[2]) for row in states} == {
        str(state): ("no", "yes") if state.is_final else ("yes", "no") for state in State
    }
    assert [code(row[0]) for row in outcomes] == [str(outcome) for outcome in Outcome]
    limits = yaml.safe_load((ROOT / "conf" / "retry" / "default.yaml").read_text())
    assert {code(row[1]): int(row[2]) for row in budgets} == {f"retry.{key}": n for key, n in limits.items()}


# --- a training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "file", "class_name"),
    [("What it gets", "sweeper/trainer/run.py", "Run"), ("The loop", "sweeper/torch/loop.py", "Loop")],
)
def test_what_a_training_gets_exists(heading: str, file: str, class_name: str) -> None:
    """Read, not imported: torch takes two seconds."""
    tree = ast.parse((ROOT / file).read_text())
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    there = {node.name for node in made.body if isinstance(node, ast.FunctionDef)}
    there |= {
        node.attr
        for node in ast.walk(made)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    (rows,) = tables(section(DOCS / "training.md", heading))
    names = [name for row in rows for name in re.findall(r"`(\w+)[^`]*`", row[0])]
    assert len(names) > 5
    assert set(names) <= there


# --- the JSON contract ---------------------------------------------------------------------

JSON = DOCS / "json.md"
Documented = dict[str, str]


def documented(*headings: str) -> Documented:
    """Key → type, of the tables in some sections."""
    rows = [row for heading in headings for table in tables(section(JSON, heading)) for row in table]
    assert len({row[0] for row in rows}) == len(rows)
    return {code(key): kind for key, kind, _ in rows}


def keys_of(value: dict[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key below `value` as json.md writes it; runs and parameters are words of their own."""
    for key, item in value.items():
        yield prefix + key, item
        if key in ("params", "best", "open_runs"):
            continue
        if isinstance(item, dict):
            yield from keys_of(item, prefix=f"{prefix}{key}.")
        elif isinstance(item, list):
            for entry in item:
                if isinstance(entry, dict):
                    yield from keys_of(entry, prefix=f"{prefix}{key}[].")


def check(value: dict[str, Any], contract: Documented) -> None:
    found = list(keys_of(value))
    assert {key for key, _ in found} == set(contract)
    assert [(key, item) for key, item in found if not is_a(item, contract[key])] == []


def is_a(value: Any, kind: str) -> bool:
    if " or " in kind:
        return any(is_a(value, one) for one in kind.split(" or "))
    if kind.startswith("array of "):
        return isinstance(value, list) and all(is_a(one, kind[9:-1]) for one in value)
    if kind == "run":
        return isinstance(value, dict) and set(value) == set(documented("A run"))
    types: dict[str, Any] = {
        "string": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "null": type(None),
    }  # fmt: skip
    return isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "boolean")


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data directory in which every key has something to show."""
    filled = Filled(tmp_path / "outputs")
    filled.sweep(n_trials=4)
    first = filled.run(
        0, value=0.5, outcome="completed", attempts=2, global_step=9, total_steps=9, checkpoint_step=9
    )
    filled.attempt(
        first, 1, ended_at=1.7e9, start_step=0, end_step=6, checkpoint_step=5, outcome="lost", reason="x"
    )
    filled.attempt(first, 2, start_step=5)
    run_dir = filled.directory(first)
    rundir.attempt_log(run_dir, 1).write_text("hello\n")
    commit_checkpoint(run_dir, step=5)
    (commit_checkpoint(run_dir, step=9) / "model.pth").write_bytes(b"damaged")
    filled.run(1, state="running", retry_of=first)
    filled.run(2, state="interrupted", replaces=first)
    return str(filled.data_dir)


@pytest.fixture
def answer(data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("SWEEPER_STORAGE", "SWEEPER_DATA_DIR", "DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Any:
        cli.main(["--data-dir", data, *words, "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def test_list_is_documented(answer: Any) -> None:
    rows = answer("list")
    assert len(rows) == 3
    for row in rows:
        check(row, documented("A run"))


def test_status_is_documented(answer: Any, data: str) -> None:
    costs = {
        k: kind for k, kind in documented("status").items() if k.split(".")[0] in ("steps", "resumption")
    }
    check(answer("status", "simple.r.00001"), documented("A run") | costs)
    (one,) = answer("status")
    assert one["best"]
    assert len(one["open_runs"]) == 2
    for sweep in (one, answer("status", "simple"), answer("status", f"{data}/sweep/simple")):
        check(sweep, documented("status"))
    Path(data, "sweeper.db").unlink()
    (from_disk,) = answer("status", data)
    check(from_disk, documented("status"))


def test_show_is_documented(answer: Any) -> None:
    shown = answer("show", "simple.r.00000")
    assert all(shown[key] for key in ("overrides", "history", "log", "checkpoints"))
    check(shown, documented("A run", "show"))
    bare = answer("show", "simple.r.00001")
    assert bare["problems"]
    lists = [key for key in documented("A run", "show") if "[]." in key]
    check(bare, {key: kind for key, kind in documented("A run", "show").items() if key not in lists})


def test_best_is_documented(answer: Any) -> None:
    best = answer("best", "simple")
    assert best["weights"]
    assert best["problems"]
    check(best, documented("A run", "best"))


def test_verify_is_documented(answer: Any, data: str) -> None:
    Filled(Path(data, "other")).directory("simple.r.00007")
    verdicts = answer("verify")
    assert [verdict["valid"] for verdict in verdicts] == [False, True]
    Path(data, "sweep/simple/runs/simple.r.00000/run.json").write_text("{}")
    assert answer("verify")[0]["step"] is None
    for verdict in [*verdicts, *answer("verify")]:
        check(verdict, documented("verify"))


# --- decisions -----------------------------------------------------------------------------


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("page", DECISIONS, ids=named)
def test_decisions_are_half_a_page(page: Path) -> None:
    text = text_of(page)
    assert text.startswith(f"# {int(page.name[:4])}. ")
    assert [text.count(f"\n**{word}.** ") for word in ("Context", "Decision", "Consequence")] == [1, 1, 1]
    assert len(text.split()) < 500


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=~]", entry)[0] for entry in project["dependencies"]}
    first, *_ = tables(text_of(DOCS / "decisions" / "0002-dependencies.md"))
    assert {row[0].split()[0] for row in first} == names
    assert all(row[1] for row in first)
