"""Alerts: a webhook hears what happened to a stream, and can never be what stops it.

What is to be told follows from the register of arrivals and from the decisions. A note beside them says how
much of both has been told, and is moved on after each message that got through. So a webhook that was down
hears of it at the next tick, one message may come twice after a crash, and none is forgotten. A tick that
fails is told on the spot or not at all.

The address is a secret: it comes from the environment or from a file and appears in no message of ours.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pipelines.arrivals import Register
from pipelines.continual_config import AlertsConfig, Event
from pipelines.decisions import DecisionLog
from pipelines.provenance import now_iso, redact
from pipelines.store import Store
from seekr.errors import ConfigError, SeekrError

Warn = Callable[[str], None]
PAUSE_SECONDS: Final = 1.0
_LONGEST: Final = 4000
# Answers after which another attempt may succeed; any other refusal is final.
_TRY_AGAIN: Final = frozenset({408, 425, 429, *range(500, 600)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One message. `text` is a sentence for people, `details` plain values for programs."""

    event: Event
    stream: str
    text: str
    details: Mapping[str, Any]
    at: str = field(default_factory=now_iso)

    def body(self) -> bytes:
        """The message as JSON; chat systems show `text`."""
        values = {"event": self.event, "stream": self.stream, "text": self.text, "at": self.at}
        return json.dumps(values | {"details": dict(self.details)}).encode()


class AlertError(SeekrError):
    """A webhook did not take a message; the message says where to and why, without the address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where alerts are posted.

    Attributes:
        url: the secret address.
        timeout: seconds for one attempt.
        attempts: how many there are.
        pause: seconds before the second one; doubled each time.
    """

    url: str = field(repr=False)
    timeout: float
    attempts: int
    pause: float = PAUSE_SECONDS

    @property
    def shown(self) -> str:
        """Scheme and host: all of the address that may be shown."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}"

    def post(self, alert: Alert) -> None:
        """Deliver one message.

        Raises:
            AlertError: it did not get through.
        """
        request = urllib.request.Request(
            self.url,
            data=alert.body(),
            headers={"Content-Type": "application/json", "User-Agent": "seekr"},
            method="POST",
        )
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                problem, final = f"it answered {error.code}", error.code not in _TRY_AGAIN
            except (OSError, ValueError) as error:  # no route, no name, no answer in time, no HTTP
                problem, final = type(getattr(error, "reason", error)).__name__, False
            if final or attempt == self.attempts:
                raise AlertError(
                    f"the webhook at {self.shown} did not take the alert {alert.event} ({problem}, "
                    f"{attempt} attempt{'' if attempt == 1 else 's'})"
                )
            time.sleep(self.pause * 2 ** (attempt - 1))


def webhook(config: AlertsConfig) -> Webhook:
    """Find the address.

    Raises:
        ConfigError: the variable or file is not there, or holds no http address.
    """
    if config.url_env is not None:
        where, found = (
            f"alerts.url_env: the variable {config.url_env}",
            os.environ.get(config.url_env),
        )
    else:
        path = Path(str(config.url_file))
        where = f"alerts.url_file: the file {path}"
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read: {type(error).__name__}; mount it") from None
    url = (found or "").strip()
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        problem = (
            "is not set" if not url else "holds no address that begins with https:// or http://"
        )
        raise ConfigError(f"{where} {problem}; put the webhook's address there, or remove alerts")
    return Webhook(url=url, timeout=config.timeout_seconds, attempts=config.attempts)


class Teller:
    """Tells a stream's webhook what it wants to hear; without one, nothing.

    Args:
        config: the alerts section.
        warn: told what did not get through.

    Raises:
        ConfigError: there is a section, and the address is not where it says.
    """

    def __init__(self, config: AlertsConfig | None, store: Store, stream: str, warn: Warn) -> None:
        self._store, self._stream, self._warn = store, stream, warn
        self._events = frozenset(config.events) if config is not None else frozenset[Event]()
        self._webhook = None if config is None else webhook(config)
        self._note = f"streams/{stream}/alerts.json"

    def begin(self) -> None:
        """Before the first alerts of a stream ever: what has happened until now is not told."""
        if self._webhook is not None and self._store.stat(self._note) is None:
            self._store.write_json(self._note, self._counts())

    def tell_failure(self, error: BaseException) -> None:
        """Tell that a tick has failed."""
        if "failed" not in self._events:
            return
        text = redact(self._store.location.redact(str(error))) or type(error).__name__
        details = {"error": type(error).__name__, "message": text[:_LONGEST]}
        sentence = f"seekr: a tick of {self._stream} failed: {text[:_LONGEST]}"
        self._post(Alert(event="failed", stream=self._stream, text=sentence, details=details))

    def tell_news(self) -> None:
        """Tell what has been entered and decided since it was last told."""
        if self._webhook is None:
            return
        try:
            for alert, counts in self._news(self._store.read_json(self._note)):
                if alert.event in self._events and not self._post(alert):
                    return  # in order, and again at the next tick
                self._store.write_json(self._note, counts)
        except SeekrError as error:
            self._warn(f"what happened could not be told, the next tick tells it: {error}")

    def _news(self, told: Mapping[str, int]) -> Iterator[tuple[Alert, dict[str, int]]]:
        """Yield what is new, with the note that says it was told."""
        seen = dict(told)
        for arrival in Register(self._store, self._stream).entries[told["arrivals"] :]:
            seen = {**seen, "arrivals": arrival.number}
            if arrival.verdict == "quarantined":
                details = {
                    "number": arrival.number,
                    "place": arrival.place,
                    "reason": arrival.reason,
                }
                details |= {"bad_rows": list(arrival.bad_rows)}
                yield self._alert("quarantined", str(arrival), details), seen
        for decision in DecisionLog(self._store, self._stream).read().entries[told["decisions"] :]:
            seen = {**seen, "decisions": decision.number}
            event: Event = "held_back" if decision.held_back else "promoted"
            details = {
                "number": decision.number,
                "kind": decision.kind,
                "model": decision.model.key,
                "champion": None if decision.champion is None else decision.champion.key,
                "reason": decision.reason,
                "user": decision.user,
            }
            text = (
                f"the model after {decision.model.task} was {decision.verdict}: {decision.reason}"
            )
            yield self._alert(event, text, details), seen

    def _alert(self, event: Event, text: str, details: Mapping[str, Any]) -> Alert:
        text = f"seekr: {self._stream}: {text}"[:_LONGEST]
        return Alert(event=event, stream=self._stream, text=text, details=details)

    def _post(self, alert: Alert) -> bool:
        assert self._webhook is not None
        try:
            self._webhook.post(alert)
            return True
        except AlertError as error:
            again = "" if alert.event == "failed" else "; the next tick tells it again"
            self._warn(f"{error}{again}")
            return False

    def _counts(self) -> dict[str, int]:
        arrivals = Register(self._store, self._stream).entries
        decisions = DecisionLog(self._store, self._stream).read().entries
        return {"arrivals": len(arrivals), "decisions": len(decisions)}
