"""One record of a source becomes one row, good or bad.

Whatever the layout, a row is an input, one or more reference answers and perhaps a task definition;
or, where a column of documents is asked for, a text that is learnt whole.
A row that cannot be used is a value too (`BadRow`: where, why, how it begins), because one broken
line among a million is for a policy to judge (`inspection.require_good`), not for a reader. Columns
are settled once per file: one that is asked for and not there is a `DataError`, since no row of the
file could be good. Text is never changed, not even stripped.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from seekr.errors import DataError

EXCERPT_CHARS = 200
# The header of a Natural-Instructions file is handed to its instances under its own name.
HEADER_DEFINITION = "Definition"
_USUAL_COLUMNS = {
    "input": ("input", "prompt"),
    "output": ("output", "answer"),
    "definition": ("definition", HEADER_DEFINITION),
}
_JSON_TYPES: dict[type, str] = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold what. None stands for the usual names.

    These are input or prompt, output or answer, and definition. A task has a definition only where
    such a column, or the header of a Natural-Instructions file, exists. With `text` rows are documents
    and have none of these; `focus` then names what in them matters.
    """

    input: str | None = None
    output: str | None = None
    definition: str | None = None
    text: str | None = None
    focus: str | None = None

    @property
    def of_questions(self) -> Columns:
        """The same for rows that are asked, beside a source of documents."""
        return replace(self, text=None, focus=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundColumns:
    """The columns that a file turned out to have: input and output, or text."""

    input: str | None = None
    output: str | None = None
    definition: str | None = None
    text: str | None = None
    focus: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        found = (self.input, self.output, self.definition, self.text, self.focus)
        return list(dict.fromkeys(name for name in found if name is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRow:
    """One usable row.

    Attributes:
        file: the file's name as people are shown it.
        line: counted from 1: the line of a JSON Lines file, the row of any other layout.
        input: what the model is asked; not blank, but empty for a document.
        references: the accepted answers, at least one, none blank; the first is trained on. For a
            document, its text.
        definition: the task's description, or None.
        focus: parts of a document that matter most, as they are spelt in it.
    """

    file: str
    line: int
    input: str
    references: tuple[str, ...]
    definition: str | None
    focus: tuple[str, ...] = ()

    @property
    def row_id(self) -> str:
        """32 hex digits of the content's sha256; the same wherever the row is found."""
        content: list[Any] = [self.input, self.references, self.definition]
        if self.focus:
            content.append(self.focus)
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One row that cannot be used: where, why, and how it begins (at most 200 characters)."""

    file: str
    line: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class _RowProblem(ValueError):
    """Why a row is bad; never leaves this module."""


def find_columns(file: str, columns: Columns, found: list[str]) -> FoundColumns:
    """Settle a file's columns.

    Args:
        file: the name to put into an error.
        columns: what is asked for.
        found: the columns of the file, in its order.

    Raises:
        DataError: a column that is asked for is not there, or the usual names are absent or leave a
            choice.
    """
    if columns.text is not None:
        focus = columns.focus
        return FoundColumns(
            text=_find_column(file, "text", columns.text, found),
            focus=None if focus is None else _find_column(file, "focus", focus, found),
        )
    has_definition = not set(found).isdisjoint(_USUAL_COLUMNS["definition"])
    return FoundColumns(
        input=_find_column(file, "input", columns.input, found),
        output=_find_column(file, "output", columns.output, found),
        definition=(
            _find_column(file, "definition", columns.definition, found)
            if columns.definition is not None or has_definition
            else None
        ),
    )


def make_row(
    file: str, line: int, value: object, columns: FoundColumns | None
) -> SourceRow | BadRow:
    """One record as a row. `columns` is None while no object of the file has been seen."""
    try:
        if not isinstance(value, dict) or columns is None:
            raise _RowProblem(f"not an object but {type_name(value)}")
        if columns.text is not None:
            text, focus = _document(value, columns.text, columns.focus)
            return SourceRow(
                file=file, line=line, input="", references=(text,), definition=None, focus=focus
            )
        assert columns.input is not None and columns.output is not None
        return SourceRow(
            file=file,
            line=line,
            input=_input(value, columns.input),
            references=_references(value, columns.output),
            definition=_definition(value, columns.definition),
        )
    except _RowProblem as problem:
        return bad_row(file, line, str(problem), _as_json(value))


def bad_row(file: str, line: int, reason: str, text: str) -> BadRow:
    """A bad row whose text is cut to an excerpt that any UTF-8 writer accepts."""
    if len(text) > EXCERPT_CHARS:
        text = text[: EXCERPT_CHARS - 3] + "..."
    return BadRow(file=file, line=line, reason=reason, text=text.encode(errors="replace").decode())


def type_name(value: object) -> str:
    """A value's type in JSON's words."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


def _find_column(file: str, role: str, name: str | None, found: list[str]) -> str:
    """The column of a role: the one asked for, else the one usual name that is there."""
    listed = ", ".join(found) or "none"
    if name is not None:
        if name in found:
            return name
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"set columns.{role} to one of them"
        raise DataError(
            f"{file} has no column {name!r} (columns.{role}); columns found: {listed}; {remedy}"
        )
    usual = [candidate for candidate in _USUAL_COLUMNS[role] if candidate in found]
    if len(usual) != 1:
        problem = f"both {' and '.join(usual)}" if usual else f"no {role} column"
        raise DataError(
            f"{file} has {problem} (looked for {' or '.join(_USUAL_COLUMNS[role])}); columns "
            f"found: {listed}; set columns.{role} to the one that is meant"
        )
    return usual[0]


def _input(row: dict[str, Any], column: str) -> str:
    text = _text(_value(row, column), column, "a string")
    if not text.strip():
        raise _RowProblem(f"empty input (column {column!r})")
    return text


def _references(row: dict[str, Any], column: str) -> tuple[str, ...]:
    value = _value(row, column)
    items = value if isinstance(value, list) else [value]
    references = tuple(_text(item, column, "a string or a list of strings") for item in items)
    if not references:
        raise _RowProblem(f"no references (column {column!r} is an empty list)")
    if not all(text.strip() for text in references):
        raise _RowProblem(f"empty answer (column {column!r})")
    return references


def _document(row: dict[str, Any], column: str, focus: str | None) -> tuple[str, tuple[str, ...]]:
    """A text, and the parts of it that matter, each of which has to be in it."""
    text = _text(_value(row, column), column, "a string")
    if not text.strip():
        raise _RowProblem(f"empty document (column {column!r})")
    if focus is None:
        return text, ()
    parts = _references(row, focus)
    absent = next((n for n, part in enumerate(parts, 1) if part not in text), None)
    if absent is not None:  # told by its number: reasons are kept where rows must not be
        raise _RowProblem(f"part {absent} of column {focus!r} is not in the document")
    return text, parts


def _definition(row: dict[str, Any], column: str | None) -> str | None:
    """A string; those of a list are joined by line breaks. Null and blank are no definition."""
    value = None if column is None else _value(row, column)
    if column is None or value is None:
        return None
    items = value if isinstance(value, list) else [value]
    text = "\n".join(_text(item, column, "a string or a list of strings") for item in items)
    return text if text.strip() else None


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise _RowProblem(f"missing column {column!r}")
    return row[column]


def _text(value: object, column: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise _RowProblem(f"wrong type: column {column!r} holds {type_name(value)}, not {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        half = f"\\u{ord(value[error.start]):04x}"
        raise _RowProblem(f"not UTF-8: column {column!r} holds a lone {half}") from error
    return value


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=repr)
    except RecursionError:
        return f"({type_name(value)}, nested too deeply to show)"
