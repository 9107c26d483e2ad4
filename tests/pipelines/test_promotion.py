"""Who is the champion: a fold over decisions; by hand and back; and MLflow, which only shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipelines import tracking
from pipelines.artifact import StageRef
from pipelines.decisions import Check, Decision, DecisionLog, Decisions, Score, resolve
from pipelines.gate import decide
from pipelines.lease import Lease
from pipelines.lineage import gather, walk
from pipelines.report import render_report
from pipelines.results import StreamView
from pipelines.store import Store
from seekr.errors import ConfigError, LeaseLost
from tests.pipelines.committed import commit_stream
from tests.pipelines.test_gate import TASKS, config_of


def model(name: str) -> StageRef:
    return StageRef(stage="train", task=name, fingerprint=f"{name}{'0' * 19}")


def follow(steps: Sequence[tuple[str, str]]) -> Decisions:
    """Decisions as they are made one after the other; a rollback goes to the champion before."""
    found = Decisions()
    for kind, name in steps:
        ref, champion = model(name), found.champion
        if kind == "rollback":
            if len(found.champions) < 2:
                continue
            ref = resolve(found.champions, None)
        elif kind == "promote" and ref == champion:
            continue
        after = champion if kind == "held" else ref
        entry = Decision(
            number=len(found.entries) + 1,
            kind="gate" if kind in ("gate", "held") else kind,  # type: ignore[arg-type]
            model=ref,
            champion=after,
            previous=champion,
            reason="so",
        )
        found = Decisions((*found.entries, entry))
    return found


STEPS = st.lists(
    st.tuples(st.sampled_from(["gate", "held", "promote", "rollback"]), st.sampled_from("abcd"))
)


@given(STEPS)
def test_the_champion_is_the_top_of_the_pile_and_a_rollback_goes_one_down(
    steps: list[tuple[str, str]],
) -> None:
    decisions = follow(steps)
    pile = decisions.champions
    assert (pile[-1] if pile else None) == decisions.champion
    assert len(set(pile)) == len(pile)
    before = follow(steps).champions
    after = follow([*steps, ("rollback", "a")]).champions
    assert after == (before[:-1] if len(before) > 1 else before)
    if decisions.champion is not None:
        assert decisions.since is not None and decisions.since.champion == decisions.champion


@given(STEPS, st.sampled_from("abcd"))
def test_what_was_held_back_changes_nothing(steps: list[tuple[str, str]], name: str) -> None:
    decisions = follow([*steps, ("held", name)])
    if decisions.entries[-1].model != decisions.champion:
        assert decisions.entries[-1].held_back
    assert decisions.champions == follow(steps).champions


def test_a_rollback_twice_goes_back_twice() -> None:
    decisions = follow([("gate", "a"), ("gate", "b"), ("gate", "c"), *[("rollback", "")] * 2])
    assert decisions.champion == model("a")
    with pytest.raises(ConfigError, match="no former champion to go back to"):
        resolve(decisions.champions, None)


def test_a_rollback_may_name_any_former_champion_and_nothing_else() -> None:
    pile = tuple(map(model, "abc"))
    assert resolve(pile, "a") == model("a") and resolve(pile, "b000000") == model("b")
    with pytest.raises(ConfigError, match=r"'c' is no former champion; there are b b0+, a a0+"):
        resolve(pile, "c")


def test_the_gate_does_not_undo_a_rollback() -> None:
    decisions = follow([("gate", "a"), ("gate", "b"), ("rollback", "")])
    assert decisions.has_judged(model("b"), {"other": "bounds"})
    assert decisions.has_judged(model("a"), {"other": "bounds"}), "it is the champion"
    assert not decisions.has_judged(model("c"), {"other": "bounds"})


def test_a_decision_is_read_as_it_was_written(tmp_path: Path) -> None:
    log = DecisionLog(Store.open(tmp_path), "small")
    check = Check(bound="max_forgetting", of="a", figure=0.1, limit=0.2, holds=True, why="so")
    decision = Decision(
        kind="gate", model=model("b"), champion=model("b"), previous=model("a"), reason="so",
        checks=(check,), scores={"a": Score(score=0.5, measure="m")}, gate={"max_forgetting": 0.2},
    )  # fmt: skip
    with Lease(log.store, log.folder) as lease:
        added = log.add(decision, log.read(), lease)
    assert added == replace(decision, number=1)
    assert log.read().entries == (added,)


def test_of_two_decisions_made_on_the_same_knowledge_one_counts(tmp_path: Path) -> None:
    log = DecisionLog(Store.open(tmp_path), "small")
    decision = Decision(
        kind="promote", model=model("a"), champion=model("a"), previous=None, reason="so"
    )
    seen = log.read()
    with Lease(log.store, log.folder) as lease:
        log.add(decision, seen, lease)
        with pytest.raises(LeaseLost):
            log.add(replace(decision, champion=model("b")), seen, lease)
    assert log.read().champion == model("a")


def with_decisions(view: StreamView, store: Store) -> StreamView:
    return replace(view, decisions=DecisionLog(store, view.name).read())


def aliases(uri: str, name: str) -> dict[str, str]:
    """The stream's aliases, with the tasks of the models they point at."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_registered_model(name).aliases
    return {
        alias: client.get_model_version(name, str(number)).tags["seekr.task"]
        for alias, number in found.items()
    }


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "mlflow").mkdir()
    return f"sqlite:///{tmp_path}/mlflow/mlflow.db"


def test_a_rebuilt_mlflow_has_the_aliases_that_the_decisions_say(uri: str, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    view = commit_stream(tmp_path / "store", TASKS, method="seqft", forget=0.2)
    config = config_of(view, max_forgetting=0.1)
    ends = [n for n, r in enumerate(view.stages, 1) if r.stage == "evaluate"]
    decide(store, config, replace(view, tasks=TASKS[:1], stages=view.stages[: ends[0]]))
    decided = decide(store, config, view)
    assert decided is not None and decided.held_back
    tracking.rebuild(uri, with_decisions(view, store), store)
    assert aliases(uri, view.name) == {"champion": "sort", "newest": "copy"}
    client = MlflowClient(tracking_uri=uri)
    notes = {
        version.tags["seekr.task"]: version.tags.get("seekr.decision", "")
        for version in client.search_model_versions(f"name = '{view.name}'")
    }
    assert notes["copy"].startswith("held back: 2 of") and notes["reverse"] == ""
    assert notes["sort"].startswith("promoted: ")
    client.delete_registered_model_alias(view.name, "champion")
    client.set_registered_model_alias(view.name, "newest", "1")
    tracking.rebuild(uri, with_decisions(view, store), store)
    assert aliases(uri, view.name) == {"champion": "sort", "newest": "copy"}


def test_a_champion_of_other_settings_is_shown_in_mlflow_too(uri: str, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    before = commit_stream(tmp_path / "store", TASKS[:2], method="seqft", steps=10)
    decide(store, config_of(before, min_new_score=0.1), before)
    after = commit_stream(tmp_path / "store", TASKS[:2], method="seqft", steps=30)
    assert not {r.fingerprint for r in before.of("train")} & {
        r.fingerprint for r in after.of("train")
    }
    view = with_decisions(after, store)
    tracking.rebuild(uri, view, store)
    client = MlflowClient(tracking_uri=uri)
    champion = client.get_model_version_by_alias(view.name, "champion")
    assert view.decisions.champion is not None
    assert champion.tags["seekr.fingerprint"] == view.decisions.champion.fingerprint
    found = walk(gather(store, view.decisions.champion), view.decisions.champion.fingerprint)
    assert not any(origin.is_missing for origin in found.origins.values())
    assert len(found.origins) == 4, "two models and their data"


def test_the_report_shows_champion_bounds_and_decisions(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    view = commit_stream(tmp_path / "store", TASKS, method="seqft", forget=0.2)
    assert "<h2>Promotion</h2>" not in render_report(view)
    decide(store, config_of(view, max_forgetting=0.1, min_new_score=0.2), view)
    page = render_report(with_decisions(view, store))
    assert "<h2>Promotion</h2>" in page and "champion: none yet" in page
    assert ">held back<" in page and ">max_forgetting<" in page and ">fails<" in page
    assert json.dumps("0.4000").strip('"') in page
