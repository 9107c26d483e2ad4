"""A stream's YAML as plain values, for those who write another one: nothing is checked or made absolute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.load import PATH_FIELDS, SOURCE_FIELD, apply_override, read_mapping


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a stream's YAML with overrides in it as plain values; its own relative paths stay so.

    Raises:
        ConfigError: it cannot be read, or an override is not understood; fields are not checked.
    """
    values = read_mapping(path)
    for override in overrides:
        apply_override(values, override)
    return values


def local_paths(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what a stream's plain values name on the disk, by dotted field: model, folders, rows."""
    return {
        field: text
        for field, text in texts(values)
        if "://" not in text and (field in PATH_FIELDS or SOURCE_FIELD.fullmatch(field))
    }


def texts(value: Any, *parts: str) -> Iterator[tuple[str, str]]:
    """Yield every text below a value, with its dotted field."""
    if isinstance(value, str):
        yield ".".join(parts), value
    items = value.items() if isinstance(value, Mapping) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from texts(item, *parts, str(key))
