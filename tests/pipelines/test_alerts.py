"""Alerts reach a real server, again if they must; they stop nothing and show no address."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.alerts import Alert, AlertError, Teller, Webhook, webhook
from pipelines.arrivals import Arrival, Register
from pipelines.artifact import StageRef
from pipelines.continual_config import AlertsConfig
from pipelines.decisions import Decision, DecisionLog
from pipelines.lease import Lease
from pipelines.store import Store
from seekr.errors import ConfigError, StoreError
from tests.pipelines.webhook_server import SECRET, WebhookServer, webhook_server

VARIABLE = "SEEKR_TEST_WEBHOOK"
ALERT = Alert(event="promoted", stream="small", text="so", details={"number": 1})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebhookServer]:
    with webhook_server() as running:
        monkeypatch.setenv(VARIABLE, running.url)
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def hook(server: WebhookServer, **changes: Any) -> Webhook:
    return replace(Webhook(url=server.url, timeout=5.0, attempts=3, pause=0.01), **changes)


def teller(store: Store, warnings: list[str] | None = None, **settings: Any) -> Teller:
    config = AlertsConfig(**{"url_env": VARIABLE, "attempts": 1} | settings)
    found = Teller(config, store, "small", pytest.fail if warnings is None else warnings.append)
    found.begin()
    return found


def quarantine(store: Store, name: str) -> None:
    register = Register(store, "small")
    entry = Arrival(
        verdict="quarantined", name=name, place=f"inbox/{name}", stamp="s", modified_at="t",
        reason="1 of 2 train rows cannot be used", bad_rows=({"file": "f", "line": 2, "reason": "r"},),
    )  # fmt: skip
    with Lease(store, "tick", settle=0.0) as lease:
        register.enter(entry, lease)


def decision(store: Store, name: str, *, held_back: bool) -> None:
    log = DecisionLog(store, "small")
    ref = StageRef(stage="train", task=name, fingerprint=name * 20)
    with Lease(store, log.folder, settle=0.0) as lease:
        seen = log.read()
        after = seen.champion if held_back else ref
        entry = Decision(
            kind="gate", model=ref, champion=after, previous=seen.champion, reason="it forgot"
        )
        log.add(entry, seen, lease)


def test_a_message_arrives_as_json_with_a_sentence_for_people(server: WebhookServer) -> None:
    hook(server).post(ALERT)
    (message,) = server.heard
    assert message == {
        "event": "promoted", "stream": "small", "text": "so", "at": ALERT.at, "details": {"number": 1},
    }  # fmt: skip


@pytest.mark.parametrize("codes", [[500], [503, 429]])
def test_it_is_tried_again_while_the_server_is_in_trouble(
    codes: list[int], server: WebhookServer
) -> None:
    server.answers = list(codes)
    hook(server).post(ALERT)
    assert server.attempts == len(codes) + 1 and server.events == ["promoted"]


@pytest.mark.parametrize(
    ("codes", "attempts", "problem"),
    [
        ([500] * 9, 3, r"it answered 500, 3 attempts"),
        ([404] * 9, 1, r"it answered 404, 1 attempt\)"),
        ([401] * 9, 1, r"it answered 401, 1 attempt\)"),
    ],
)
def test_it_is_given_up_when_that_does_not_help(
    codes: list[int], attempts: int, problem: str, server: WebhookServer
) -> None:
    server.answers = list(codes)
    with pytest.raises(AlertError, match=problem) as told:
        hook(server).post(ALERT)
    assert server.attempts == attempts and SECRET not in str(told.value)


def test_a_server_that_does_not_answer_in_time_or_at_all_costs_seconds(
    server: WebhookServer,
) -> None:
    server.delay = 1.0
    with pytest.raises(AlertError, match=r"timeout|Timeout"):
        hook(server, timeout=0.1, attempts=2).post(ALERT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
        with pytest.raises(AlertError, match=r"http://127\.0\.0\.1 did not take .*Refused") as told:
            hook(server, url=f"http://127.0.0.1:{free}/{SECRET}", attempts=2).post(ALERT)
    assert SECRET not in str(told.value)


def test_the_address_comes_from_the_environment_or_a_file(
    server: WebhookServer, tmp_path: Path
) -> None:
    assert webhook(AlertsConfig(url_env=VARIABLE)).url == server.url
    file = tmp_path / "secret"
    file.write_text(server.url + "\n")
    found = webhook(AlertsConfig(url_file=str(file)))
    assert found.url == server.url and SECRET not in repr(found)


@pytest.mark.parametrize(
    ("settings", "value", "fragment"),
    [
        ({"url_env": "SEEKR_TEST_UNSET"}, None, "SEEKR_TEST_UNSET is not set"),
        ({"url_env": VARIABLE}, f"ftp://host/{SECRET}", "holds no address that begins with"),
        ({"url_env": VARIABLE}, f"https:///{SECRET}", "holds no address that begins with"),
        ({"url_file": "/nowhere/secret"}, None, "cannot be read: FileNotFoundError"),
    ],
)
def test_an_address_that_is_not_there_is_told_before_anything_runs(
    settings: dict[str, str], value: str | None, fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=fragment) as refused:
        webhook(AlertsConfig.model_validate(settings))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        (
            {"url": f"https://host/{SECRET}"},
            "url is not a field, as a webhook's address is a secret",
        ),
        ({}, "neither is set"),
        ({"url_env": "A", "url_file": "b"}, "both are set"),
        (
            {"url_env": "A", "events": ["fire"]},
            "'failed', 'held_back', 'quarantined' or 'promoted'",
        ),
    ],
)
def test_an_alerts_section_without_one_place_of_the_address_is_refused(
    settings: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(ValidationError, match=fragment):
        AlertsConfig.model_validate(settings)


def test_what_happens_is_told_once_and_in_order(server: WebhookServer, store: Store) -> None:
    decision(store, "a", held_back=False)
    teller(store).tell_news()
    assert server.heard == [], "what was before the first alerts is no news"
    quarantine(store, "bad")
    decision(store, "b", held_back=True)
    decision(store, "c", held_back=False)
    for _ in range(2):
        teller(store).tell_news()
    assert server.events == ["quarantined", "held_back", "promoted"]
    bad, held, _ = server.heard
    assert bad["details"]["bad_rows"] == [{"file": "f", "line": 2, "reason": "r"}]
    assert "bad: quarantined" in bad["text"] and "f:2: r" in bad["text"]
    assert held["text"] == "seekr: small: the model after b was held back: it forgot"
    assert held["details"]["champion"] == f"train/a/{'a' * 20}"


def test_a_server_that_was_down_hears_of_it_at_the_next_tick(
    server: WebhookServer, store: Store
) -> None:
    told = teller(store)
    quarantine(store, "one")
    quarantine(store, "two")
    told.tell_news()
    server.answers = [200, 500]
    quarantine(store, "three")
    decision(store, "a", held_back=True)
    warnings: list[str] = []
    teller(store, warnings).tell_news()
    assert server.events == ["quarantined"] * 3 and "the next tick tells it again" in warnings[0]
    assert len(warnings) == 1 and SECRET not in warnings[0]
    teller(store).tell_news()
    assert server.events == [*["quarantined"] * 3, "held_back"]


def test_only_what_was_asked_for_is_told(server: WebhookServer, store: Store) -> None:
    told = teller(store, events=("promoted",))
    quarantine(store, "bad")
    decision(store, "a", held_back=False)
    told.tell_failure(StoreError("the disk is full"))
    told.tell_news()
    assert server.events == ["promoted"]


def test_a_failure_is_told_without_credentials(server: WebhookServer, store: Store) -> None:
    teller(store).tell_failure(StoreError("s3://key:hunter22@bucket/x cannot be read"))
    (message,) = server.heard
    assert message["event"] == "failed" and message["details"]["error"] == "StoreError"
    assert "hunter22" not in str(message)


def test_without_a_section_nothing_is_told_or_written(store: Store) -> None:
    told = Teller(None, store, "small", pytest.fail)
    told.begin()
    quarantine(store, "bad")
    told.tell_failure(StoreError("x"))
    told.tell_news()
    assert store.stat("streams/small/alerts.json") is None
