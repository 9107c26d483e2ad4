"""From a YAML file and `--set` overrides to a validated config with absolute paths.

Paths written in the file are relative to the file, paths given by `--set` to the current folder.
All validation errors are told at once, each with its field, what was found and the nearest name.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config import StreamConfig
from seekr.errors import ConfigError
from seekr.methods import METHODS

_PATH_FIELDS = ("model.path", "data_root")


def load_config(path: Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """Read and validate a stream.

    Args:
        path: The YAML file.
        overrides: `field.name=value` with a YAML value; list items by index (`tasks.0.epochs=3`).

    Raises:
        ConfigError: naming every field that is wrong.
    """
    values = _read(path)
    _resolve(values, path.parent.absolute())
    for override in overrides:
        _apply(values, override)
    config = _validate(values, path)
    root = config.data_root or path.parent.absolute()
    tasks = tuple(
        task.model_copy(update={"train": _under(root, task.train), "test": _under(root, task.test)})
        for task in config.tasks
    )
    return config.model_copy(update={"tasks": tasks, "data_root": root})


def _under(root: Path, source: str) -> str:
    return source if "://" in source else str(root / source)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"stream {path} does not exist; give the path of a stream's YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"stream {path} is not valid YAML: {error}; correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"stream {path} holds {type(values).__name__}; a mapping with name, model, method and "
            "tasks is needed: see `seekr schema`"
        )
    return values


def _resolve(values: dict[str, Any], folder: Path) -> None:
    for dotted in _PATH_FIELDS:
        section, _, leaf = dotted.rpartition(".")
        holder = values.get(section) if section else values
        if isinstance(holder, dict) and isinstance(holder.get(leaf), str):
            holder[leaf] = str(folder / Path(holder[leaf]).expanduser())


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, found, text = override.partition("=")
    if not found or not dotted:
        raise ConfigError(f"--set {override!r} is not understood; write --set field.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    if dotted in _PATH_FIELDS and isinstance(value, str):
        value = str(Path(value).expanduser().absolute())
    holder: Any = values
    *parents, leaf = dotted.split(".")
    for parent in parents:
        holder = _child(holder, parent, override)
    if isinstance(holder, list):
        _child(holder, leaf, override)
        holder[int(leaf)] = value
    else:
        holder[leaf] = value


def _child(holder: Any, key: str, override: str) -> Any:
    if isinstance(holder, list):
        if not key.isdigit() or int(key) >= len(holder):
            raise ConfigError(
                f"--set {override!r}: {key!r} is not an item of a list of {len(holder)}; use "
                f"0..{len(holder) - 1}"
            )
        return holder[int(key)]
    if not isinstance(holder, dict):
        raise ConfigError(f"--set {override!r}: there is nothing below {key!r}; check the name")
    if holder.get(key) is None:
        holder[key] = {}
    return holder[key]


def _validate(values: dict[str, Any], path: Path) -> StreamConfig:
    try:
        return StreamConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item, values) for item in error.errors()]
        raise ConfigError("\n".join([f"stream {path} cannot be run:", *lines])) from error


def _explain(item: Any, values: dict[str, Any]) -> str:
    where = [part for part in item["loc"] if not (part in METHODS and "method" in item["loc"])]
    field = ".".join(str(part) for part in where)
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(where[:-1], values))
        near = difflib.get_close_matches(str(where[-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return f"  {field}: unknown field; {hint} Allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"  {field}: missing; add it (see `seekr schema`)"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"  {field}.name: found {_short(found)}; allowed: {', '.join(METHODS)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"  {field}: {message[0].lower() + message[1:]}; found {_short(found)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name", value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(where: list[Any], values: dict[str, Any]) -> set[str]:
    """Return the field names of the section that a location points at."""
    model: Any = StreamConfig
    for part in where:
        if isinstance(part, int):
            continue
        if part == "method":
            name = values.get("method", {}).get("name")
            return set(METHODS[name].model_fields) if name in METHODS else {"name"}
        model = _section_of(model.model_fields[part].annotation)
    return set(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel]:
    """Return the section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next(_section_of(a) for a in get_args(annotation) if a not in (type(None), ...))
    return annotation
