"""Numbers and settings written for people: the one place that fixes units, digits and signs.

Used by the report and the command line, so that both write the same run in the same words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup, escape

from pipelines.provenance import redact

METRIC_NAMES = {"rouge_l": "ROUGE-L", "sari": "SARI"}
MINUS = "\N{MINUS SIGN}"
_YAML_KEY = re.compile(r"^(\s*(?:- )*)([\w.\-]+)(:)(?=\s|$)")


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent with one decimal, without the sign."""
    return "n/a" if share is None else f"{100 * share:.1f}"


def points(change: float | None) -> str:
    """A difference of shares in percentage points, always signed."""
    if change is None:
        return "n/a"
    rounded = round(100 * change, 1)
    return f"{rounded:+.1f}".replace("-", MINUS) if rounded else "0.0"


def duration(seconds: float) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes in binary units with three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def metric_name(name: str) -> str:
    """A metric as papers write it."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def breakable(text: str) -> Markup:
    """Escaped text that a browser may break after the joints of a name."""
    parts = re.split(r"(?<=[_/.\-])(?=[^_/.\-])", text)
    return Markup("<wbr>").join(escape(part) for part in parts)


def config_yaml(config: Mapping[str, Any]) -> Markup:
    """The configuration as escaped YAML with quiet colours; credentials are removed."""
    text = redact(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=96))
    return Markup("\n").join(_yaml_line(line) for line in text.splitlines())


def _plain(value: Any) -> Any:
    """Only what YAML knows; paths, enums and the like become their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _yaml_line(line: str) -> Markup:
    match = _YAML_KEY.match(line)
    if match is None:
        return escape(line)
    mark = Markup('{}<span class="k">{}</span><span class="d">{}</span>{}')
    return mark.format(match[1], match[2], match[3], line[match.end() :])
