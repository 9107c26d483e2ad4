"""From a YAML file and `--set` overrides to a validated config with absolute paths.

Paths written in the file are relative to the file, paths given by `--set` to the current folder.
All validation errors are told at once, each with its field, what was found and the nearest name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config import StreamConfig
from seekr.errors import ConfigError
from seekr.methods import METHODS

PATH_FIELDS = (
    *("model.path", "data_root", "general.folder"),
    *("token_weights.network", "token_weights.model", "alerts.url_file"),
)
# Where addresses with credentials, and secrets themselves, are written by mistake.
_HIDDEN = (
    *("alerts", "cluster.env", "cluster.secret_env", "cluster.mlflow"),
    *("cluster.storage.object_store", "cluster.redis"),
)
# What pydantic words for programmers.
_MESSAGES = {
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-' are allowed, the first a letter "
    "or digit",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_short": "at least 1 is needed",
    "tuple_type": "must be a list",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_parsing": "must be a number",
}
# Fields with sources of rows: files, folders and patterns below data_root, or URIs.
SOURCE_FIELD = re.compile(
    r"tasks_from|tasks\.\d+\.(train|test)|probes\.\d+\.data|replay\.review|"
    r"token_weights\.meta\.(pairs|exclude\.\d+)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a YAML file says, as errors speak of it.

    Attributes:
        fields: those that it cannot do without.
        example: an override.
        schema: the command that prints its schema.
    """

    name: str
    fields: str
    example: str
    schema: str


STREAM = Kind(
    name="stream",
    fields="name, model, method and tasks",
    example="train.epochs=2",
    schema="seekr schema",
)


def load_config(
    path: Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> StreamConfig:
    """Read and validate a stream.

    Args:
        path: The YAML file.
        overrides: `field.name=value` with a YAML value; list items by index (`tasks.0.epochs=3`).
        settings: More of them as values, laid over these.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    values = read_mapping(path)
    _resolve(values, path.parent.absolute())
    for override in overrides:
        apply_override(values, override)
    for dotted, value in (settings or {}).items():
        put(values, dotted, value)
    config = _validate(values, path)
    root = config.data_root or path.parent.absolute()
    return _placed(config, root)


def _placed(config: StreamConfig, root: Path) -> StreamConfig:
    """Return the config with every source of rows under the root that relative paths start at."""

    def placed(section: Any, *parts: str) -> Any:
        found = {part: getattr(section, part) for part in parts}
        return section.model_copy(
            update={part: _under(root, source) for part, source in found.items() if source}
        )

    changes: dict[str, Any] = {
        "data_root": root,
        "tasks_from": config.tasks_from and _under(root, config.tasks_from),
        "replay": placed(config.replay, "review"),
        "tasks": tuple(placed(task, "train", "test") for task in config.tasks),
        "probes": tuple(placed(item, "data") for item in config.probes),
    }
    weights = config.token_weights
    if weights is not None:
        exclude = tuple(_under(root, source) for source in weights.meta.exclude)
        meta = placed(weights.meta, "pairs").model_copy(update={"exclude": exclude})
        changes["token_weights"] = weights.model_copy(update={"meta": meta})
    return config.model_copy(update=changes)


def _under(root: Path, source: str) -> str:
    return source if "://" in source else str(root / Path(source).expanduser())


class _Loader(yaml.SafeLoader):
    """YAML without repeated keys, of which the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, kind: Kind = STREAM) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: there is no such file, or it is not YAML, has a key twice or holds no mapping.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{kind.name} {path} {found}; give the path of a {kind.name}'s YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"{kind.name} {path} is not valid YAML{_place(error)}; correct it"
        ) from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {_short(values)}"
        raise ConfigError(
            f"{kind.name} {path} {found}; a mapping with {kind.fields} is needed: see `{kind.schema}`"
        )
    return values


def _place(error: Exception) -> str:
    mark, problem = (getattr(error, name, None) for name in ("problem_mark", "problem"))
    if mark is None:
        return f": {error}"
    return f" at line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _resolve(values: dict[str, Any], folder: Path) -> None:
    for dotted in PATH_FIELDS:
        section, _, leaf = dotted.rpartition(".")
        holder = values.get(section) if section else values
        if isinstance(holder, dict) and isinstance(holder.get(leaf), str):
            holder[leaf] = str(folder / Path(holder[leaf]).expanduser())


def apply_override(values: dict[str, Any], override: str, kind: Kind = STREAM) -> None:
    """Lay `field.name=value` with a YAML value over a file's values, as `put` does.

    Raises:
        ConfigError: it is not of that form, or there is no such place.
    """
    dotted, found, text = override.partition("=")
    if not found or not dotted:
        raise ConfigError(
            f"--set {override!r} is not understood; write --set field.name=value, such as "
            f"--set {kind.example}"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {override!r}: the value is not valid YAML{_place(error)}; put text with "
            "special characters in quotes"
        ) from error
    put(values, dotted, value, override, kind)


def put(
    values: dict[str, Any],
    dotted: str,
    value: Any,
    override: str | None = None,
    kind: Kind = STREAM,
) -> None:
    """Lay a value over a file's values; sections on the way to it are made, list items must be there.

    A path is taken from the current folder.

    Args:
        override: how the user wrote it, if not like this.

    Raises:
        ConfigError: there is no such list item, or what is above it is no section.
    """
    override = override or f"{dotted}={_short(value)}"
    is_path = dotted in PATH_FIELDS or SOURCE_FIELD.fullmatch(dotted)
    if is_path and isinstance(value, str) and value and "://" not in value:
        value = str(Path(value).expanduser().absolute())
    holder: Any = values
    *parents, leaf = dotted.split(".")
    for parent in parents:
        holder = _child(holder, parent, override, kind)
    _child(holder, leaf, override, kind)
    holder[int(leaf) if isinstance(holder, list) else leaf] = value


def _child(holder: Any, key: str, override: str, kind: Kind) -> Any:
    if isinstance(holder, list):
        if not key.isdigit() or int(key) >= len(holder):
            allowed = f"0..{len(holder) - 1}" if holder else "nothing, the list is empty"
            raise ConfigError(
                f"--set {override!r}: {key!r} is not an item of a list of {len(holder)}; allowed: "
                f"{allowed}"
            )
        return holder[int(key)]
    if not isinstance(holder, dict):
        raise ConfigError(
            f"--set {override!r}: there is nothing below {_short(holder)}, so no {key!r} either; "
            f"check the name with `{kind.schema}`"
        )
    if holder.get(key) is None:
        holder[key] = {}
    return holder[key]


def _validate(values: dict[str, Any], path: Path) -> StreamConfig:
    try:
        return StreamConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item, values) for item in error.errors() if not _follows(item)]
        raise ConfigError("\n".join([f"stream {path} cannot be run:", *lines])) from error


def _follows(item: Any) -> bool:
    """Whether an error only repeats others: a list with bad items is `too short` as well."""
    return item["type"] == "too_short" and bool(item["input"])


def _explain(item: Any, values: dict[str, Any]) -> str:
    where = [part for part in item["loc"] if not (part in METHODS and "method" in item["loc"])]
    field = ".".join(str(part) for part in where)
    kind, found = item["type"], item.get("input")
    if kind == "extra_forbidden":
        return f"  {field}: unknown field; {_advice(where, values)}"
    if kind == "missing":
        return f"  {field}: missing; add it (see `seekr schema`)"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"  {field}.name: found {_short(found)}; {_nearest(found, list(METHODS))}"
    if kind == "model_attributes_type":
        name = found if found in METHODS else "seekr"
        return f"  {field}: a section such as {{name: {name}}} is needed; found {_short(found)}"
    if kind == "model_type":
        names = ", ".join(sorted(_fields_at(where, values)))
        return f"  {field}: a section with {names} is needed{_found(where, found)}"
    message = _MESSAGES.get(kind) or item["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    if kind == "string_type" and isinstance(found, bool | int | float):
        message += ", and YAML reads this as something else: put it in quotes"
    if kind == "value_error" and not where:
        return f"  {message}"  # it names the fields
    if kind == "value_error" and isinstance(found, list):
        return f"  {field}: {message}"  # the message names the items
    return f"  {field}: {message}{_found(where, found)}"


def _found(where: list[Any], value: Any) -> str:
    """Say what was found, but where it may be a secret that somebody wrote into the YAML."""
    hidden = any(".".join(map(str, where)).startswith(field) for field in _HIDDEN)
    return "" if hidden else f"; found {_short(value)}"


def _advice(where: list[Any], values: dict[str, Any]) -> str:
    """Say what to do about an unknown field: the nearest name, or whose field it is."""
    name, allowed = str(where[-1]), sorted(_fields_at(where[:-1], values))
    owners = [key for key, method in METHODS.items() if name in method.model_fields]
    if where[0] == "method" and owners:
        return (
            f"it belongs to method {', '.join(owners)}: remove it. Allowed here: "
            f"{', '.join(allowed)}"
        )
    return _nearest(name, allowed)


def _nearest(found: Any, allowed: list[str]) -> str:
    name = found.get("name") if isinstance(found, dict) else found
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Allowed here: {', '.join(allowed)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name", value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(where: list[Any], values: dict[str, Any]) -> set[str]:
    """Return the field names of the section that a location points at."""
    model: Any = StreamConfig
    for part in where:
        if part == "method":
            method = values.get("method")
            name = method.get("name") if isinstance(method, dict) else None
            return set(METHODS[name].model_fields) if name in METHODS else {"name"}
        if part in model.model_fields:  # not an item, a key, or which of two kinds a value is
            model = _section_of(model.model_fields[part].annotation) or model
    return set(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside `Section | None`, `tuple[Section, ...]` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_of(part) for part in get_args(annotation))
    return next((section for section in found if section is not None), None)
