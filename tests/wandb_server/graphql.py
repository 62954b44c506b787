"""As much of GraphQL as the W&B client speaks: read a document, and answer exactly what it asks for.

Source: the GraphQL specification (October 2021), sections 2 (language) and 6 (execution). A
resolved object is a mapping from field names to values, or to functions of the field's arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"""(?P<skip>[\s,]+|\#[^\n]*)
    |(?P<spread>\.\.\.)
    |(?P<punctuation>[!$():=@\[\]{|}])
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
    |(?P<text>"(?:\\.|[^"\\])*")""",
    re.VERBOSE,
)


class GraphqlError(Exception):
    """The document cannot be answered; what the client is told."""


@dataclass(slots=True)
class Selection:
    """One field, or the fragment whose fields stand here."""

    name: str
    alias: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    include: Any = True
    fragment: str | None = None
    selections: list[Selection] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Variable:
    """`$name`, until the request's variables are known."""

    name: str


@dataclass(slots=True)
class Document:
    """One operation and its fragments."""

    kind: str = "query"
    name: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    selections: list[Selection] = field(default_factory=list)
    fragments: dict[str, list[Selection]] = field(default_factory=dict)


def parse(text: str) -> Document:
    """Read a document with one operation. Raises GraphqlError."""
    return _Parser(text).document()


def execute(document: Document, variables: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` of the answer. Raises GraphqlError for a field that `root` does not know."""
    return _Execution(document, {**document.defaults, **variables}).select(root, document.selections)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = []
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if not found:
                raise GraphqlError(f"Syntax Error: unexpected {text[position : position + 20]!r}")
            position = found.end()
            if found.lastgroup != "skip":
                self._tokens.append((found.lastgroup, found[0]))
        self._at = 0

    def document(self) -> Document:
        document = Document()
        while self._at < len(self._tokens):
            if self._peek() == "{":
                document.selections = self._selections()
            elif (word := self._next()) == "fragment":
                name = self._next()
                self._take("on")
                self._next()
                document.fragments[name] = self._selections()
            elif word in ("query", "mutation"):
                document.kind = word
                document.name = self._next() if self._peek() not in ("(", "{") else ""
                document.defaults = self._variables() if self._peek() == "(" else {}
                document.selections = self._selections()
            else:
                raise GraphqlError(f"Syntax Error: unexpected {word!r}")
        return document

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    def _take(self, expected: str) -> None:
        if (token := self._next()) != expected:
            raise GraphqlError(f"Syntax Error: expected {expected!r}, found {token!r}")

    def _is_next(self, token: str) -> bool:
        if self._peek() != token:
            return False
        self._at += 1
        return True

    def _variables(self) -> dict[str, Any]:
        defaults = {}
        self._take("(")
        while not self._is_next(")"):
            self._take("$")
            name = self._next()
            self._take(":")
            while self._peek() not in ("=", "$", ")"):
                self._next()  # the type
            defaults[name] = self._value() if self._is_next("=") else None
        return defaults

    def _selections(self) -> list[Selection]:
        self._take("{")
        selections = []
        while not self._is_next("}"):
            selections.append(self._fragment() if self._is_next("...") else self._field())
        return selections

    def _fragment(self) -> Selection:
        if self._peek() in ("on", "{", "@"):
            if self._is_next("on"):
                self._next()
            include = self._directives()
            return Selection("", include=include, fragment="", selections=self._selections())
        name = self._next()
        return Selection("", include=self._directives(), fragment=name)

    def _field(self) -> Selection:
        alias = name = self._next()
        if self._is_next(":"):
            name = self._next()
        arguments = self._arguments()
        include = self._directives()
        selections = self._selections() if self._peek() == "{" else []
        return Selection(name, alias, arguments, include, None, selections)

    def _arguments(self) -> dict[str, Any]:
        arguments = {}
        if self._is_next("("):
            while not self._is_next(")"):
                name = self._next()
                self._take(":")
                arguments[name] = self._value()
        return arguments

    def _directives(self) -> Any:
        include: Any = True
        while self._is_next("@"):
            if (name := self._next()) != "include":
                raise GraphqlError(f'Unknown directive "@{name}"')
            include = self._arguments()["if"]
        return include

    def _value(self) -> Any:
        if self._is_next("$"):
            return Variable(self._next())
        if self._is_next("["):
            values = []
            while not self._is_next("]"):
                values.append(self._value())
            return values
        if self._peek() == "{":
            self._at += 1
            fields = {}
            while not self._is_next("}"):
                name = self._next()
                self._take(":")
                fields[name] = self._value()
            return fields
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == "text":
            return text[1:-1]
        if kind == "number":
            return float(text) if any(c in text for c in ".eE") else int(text)
        return {"true": True, "false": False, "null": None}.get(text, text)


class _Execution:
    def __init__(self, document: Document, variables: Mapping[str, Any]) -> None:
        self._fragments = document.fragments
        self._variables = variables

    def select(self, node: Mapping[str, Any], selections: list[Selection]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for selection in selections:
            if not self._fill(selection.include):
                continue
            if selection.fragment is not None:
                inner = self._fragments[selection.fragment] if selection.fragment else selection.selections
                result.update(self.select(node, inner))
                continue
            if selection.name not in node:
                kind = node.get("__typename", "?")
                raise GraphqlError(f'Cannot query field "{selection.name}" on type "{kind}".')
            value = node[selection.name]
            if isinstance(value, Callable):  # type: ignore[arg-type]
                value = value(**self._fill(selection.arguments))
            result[selection.alias] = self._complete(value, selection)
        return result

    def _complete(self, value: Any, selection: Selection) -> Any:
        if value is None or not selection.selections:
            return value
        if isinstance(value, list):
            return [self._complete(item, selection) for item in value]
        return self.select(value, selection.selections)

    def _fill(self, value: Any) -> Any:
        if isinstance(value, Variable):
            return self._variables.get(value.name)
        if isinstance(value, dict):
            return {name: self._fill(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._fill(inner) for inner in value]
        return value
