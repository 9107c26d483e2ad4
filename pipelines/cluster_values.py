"""The words of Kubernetes that a stream's `cluster` section holds: names, quantities, schedules, hosts.

Each type is text that is checked when the YAML is read, by the rule that the API server or the operator
would apply hours later. `quantity` and `cron_fields` also give what the text means.
"""

from __future__ import annotations

import ipaddress
import re
import zoneinfo
from decimal import Decimal
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_SCALE = {"": Decimal(1), "m": Decimal("0.001")}
_SCALE |= {unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", 1)}
_SCALE |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)}
# registry/repository:tag or registry/repository@sha256:digest; the registry may have a port.
_IMAGE = re.compile(
    r"(?:[a-zA-Z0-9.-]+(?::\d+)?/)?[a-z0-9._-]+(?:/[a-z0-9._-]+)*"
    r"(?::([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})|@sha256:[a-f0-9]{64})"
)
_REGISTRY = re.compile(r"[a-zA-Z0-9.-]+(?::\d+)?(?:/[a-z0-9._-]+)*")
_FOLDER = re.compile(r"(/[A-Za-z0-9._-]+)+")
# What `secrets` are often called: such a variable's value belongs into a Secret.
_SECRETIVE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY", re.I)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)
_MONTH_LENGTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def quantity(text: str) -> Decimal:
    """Return a Kubernetes quantity as a number: `500m` is 0.5, `2Gi` is 2147483648.

    Raises:
        ValueError: it is none, or 0.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(
            "a Kubernetes quantity is needed: a number with m, k, M, G, T, Ki, Mi, Gi or Ti, such as 16Gi"
        )
    value = Decimal(found[1]) * _SCALE[found[2] or ""]
    if value == 0:
        raise ValueError("a quantity above 0 is needed, such as 16Gi")
    return value


def cron_fields(text: str) -> tuple[frozenset[int], ...]:
    """Return the minutes, hours, days of the month, months and days of the week of a cron expression.

    The grammar is the one that the CronJob controller and KubeRay share (robfig/cron's standard parser),
    without its `@` words: five fields of lists, ranges, steps and names; Sunday is 0 and not 7.

    Raises:
        ValueError: naming the field that is wrong, or a day that never comes.
    """
    if "TZ=" in text:
        raise ValueError("the zone of a schedule belongs into cluster.schedule.time_zone")
    words = text.split()
    if len(words) != len(_CRON_FIELDS):
        raise ValueError(
            f"{len(words)} fields instead of 5: minute, hour, day of month, month, day of week, such as "
            "'0 3 * * 1' for Mondays at 3:00"
        )
    found = tuple(
        _cron_field(word, *field) for word, field in zip(words, _CRON_FIELDS, strict=True)
    )
    days, months = found[2], found[3]
    any_day = words[4][0] in "*?"
    if any_day and min(days) > max(_MONTH_LENGTHS[month - 1] for month in months):
        raise ValueError(f"day {min(days)} never comes in month {words[3]}")
    return found


def _cron_field(word: str, name: str, low: int, high: int, names: dict[str, int]) -> frozenset[int]:
    values: set[int] = set()
    for part in word.split(","):
        span, has_step, step = part.partition("/")
        first, is_range, last = span.partition("-")
        if span in ("*", "?"):
            begin, end = low, high
        else:
            begin = _cron_number(first, name, low, high, names)
            end = _cron_number(last, name, low, high, names) if is_range else begin
            end = high if has_step and not is_range else end
        if begin > end:
            raise ValueError(f"{name} {part!r}: the range ends before it begins")
        if has_step and not (step.isdecimal() and int(step) > 0):
            raise ValueError(f"{name} {part!r}: a step is a number from 1")
        values.update(range(begin, end + 1, int(step) if has_step else 1))
    return frozenset(values)


def _cron_number(text: str, name: str, low: int, high: int, names: dict[str, int]) -> int:
    value = names.get(text.lower(), int(text) if text.isdecimal() and text.isascii() else None)
    if value is None or not low <= value <= high:
        words = f" or {', '.join(names)}" if names else ""
        raise ValueError(f"{name} {text!r}: a number from {low} to {high}{words} is needed")
    return value


def secretive(name: str) -> bool:
    """Whether an environment variable's name says that its value is a secret."""
    return bool(_SECRETIVE.search(name)) and not name.endswith(("_PATH", "_FILE"))


def _quantity(text: str) -> str:
    quantity(text)
    return text


def _cron(text: str) -> str:
    cron_fields(text)
    return " ".join(text.split())


def _zone(text: str) -> str:
    known = zoneinfo.available_timezones()
    if text in ("", "Local") or (known and text not in known):
        raise ValueError("a name of the time zone database is needed, such as Europe/Berlin or UTC")
    return text


def _label(text: str) -> str:
    if len(text) > 63 or not _LABEL.fullmatch(text):
        raise ValueError(
            "a DNS label is needed: at most 63 lower-case letters, digits and '-', the first a letter, the "
            "last no '-'"
        )
    return text


def _resource_name(text: str) -> str:
    if len(text) > 253 or not _SUBDOMAIN.fullmatch(text):
        raise ValueError(
            "a name of a Kubernetes object is needed: lower-case letters, digits, '-' and '.', the first "
            "and last a letter or digit"
        )
    return text


def _label_value(text: str) -> str:
    if len(text) > 63 or (text and not _WORD.fullmatch(text)):
        raise ValueError(
            "a label's value is needed: at most 63 letters, digits, '-', '_' and '.', the first and last a "
            "letter or digit"
        )
    return text


def _qualified_name(text: str) -> str:
    prefix, found, name = text.rpartition("/")
    if found:
        _resource_name(prefix)
    if len(name) > 63 or not _WORD.fullmatch(name):
        raise ValueError(
            "a qualified name is needed, such as nvidia.com/gpu: at most 63 letters, digits, '-', '_' and "
            "'.', and before a '/' a domain"
        )
    return text


def _variable(text: str) -> str:
    if not _ENVIRONMENT.fullmatch(text):
        raise ValueError("a name of an environment variable is needed: letters, digits and '_'")
    return text


def _secret_key(text: str) -> str:
    if len(text) > 253 or not re.fullmatch(r"[-._a-zA-Z0-9]+", text):
        raise ValueError("a key of a Secret is needed: letters, digits, '-', '_' and '.'")
    return text


def _image(text: str) -> str:
    found = _IMAGE.fullmatch(text)
    if found is None or found[1] == "latest":
        raise ValueError(
            "an image with a fixed tag or digest is needed, such as registry.example.com/seekr:1.0; "
            "`latest` may change between two pods of one run"
        )
    return text


def _registry(text: str) -> str:
    if not _REGISTRY.fullmatch(text):
        raise ValueError("a registry without scheme is needed, such as registry.example.com/mirror")
    return text


def _folder(text: str) -> str:
    if not _FOLDER.fullmatch(text) or {".", ".."} & set(text.split("/")):
        raise ValueError("an absolute folder of the pods is needed, such as /mnt/seekr")
    return text


def _host(text: str) -> str:
    name, _, port = text.partition(":")
    if not _SUBDOMAIN.fullmatch(name) or (port and not port.isdecimal()):
        raise ValueError(
            "a host's name is needed, such as mlflow.example.com, with a port if need be"
        )
    return text


def _cidr(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"a range of addresses is needed, such as 10.0.0.0/8: {error}") from None
    return text


def _web_address(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an http:// or https:// address is needed")
    if parts.username or parts.password:
        raise ValueError("an address without credentials is needed; put them into secret_env")
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
Cron = Annotated[str, AfterValidator(_cron)]
TimeZone = Annotated[str, AfterValidator(_zone)]
DnsLabel = Annotated[str, AfterValidator(_label)]
ResourceName = Annotated[str, AfterValidator(_resource_name)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
QualifiedName = Annotated[str, AfterValidator(_qualified_name)]
Variable = Annotated[str, AfterValidator(_variable)]
KeyOfSecret = Annotated[str, AfterValidator(_secret_key)]
Image = Annotated[str, AfterValidator(_image)]
Registry = Annotated[str, AfterValidator(_registry)]
PodFolder = Annotated[str, AfterValidator(_folder)]
Host = Annotated[str, AfterValidator(_host)]
Cidr = Annotated[str, AfterValidator(_cidr)]
WebAddress = Annotated[str, AfterValidator(_web_address)]
