"""Four trials side by side over a distillation weight on three tasks: nothing twice, and what that saves.

Counted in stages: seconds would be those of four trials that share the cores, against those of what they
share, which one of them computes while the others wait.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from pipelines.artifact import StageRecord
from tests.pipelines.running import end_shared_cluster
from tests.tune.searching import WEIGHT, computed, make_search, opened
from tune.plan import Plan
from tune.running import run_search
from tune.sharing import Sharing

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
TRIALS, AT_ONCE = 8, 4
# Of the stages that the trials would compute alone.
GOAL = 0.6


def busy_at_once(plan: Plan) -> int:
    """Return how many trials computed a stage at the same moment, at most, by the stages' records."""
    moments: list[tuple[datetime, int, str]] = []
    for entry in plan.ledger.entries.values():
        for key in (key for result in entry.results for key in result.ran):
            record = StageRecord.load(plan.ledger.store, key)
            moments.append((datetime.fromisoformat(record.started_at), 1, entry.key))
            moments.append((datetime.fromisoformat(record.finished_at), -1, entry.key))
    most, stages = 0, Counter[str]()
    for _, change, entry in sorted(moments):
        stages[entry] += change
        most = max(most, sum(number > 0 for number in stages.values()))
    return most


def test_four_trials_at_once_compute_no_stage_twice_and_60_percent_at_most_of_those_asked_for(
    tmp_path: Path,
) -> None:
    path = make_search(
        tmp_path,
        space={WEIGHT: {"log_uniform": [0.1, 1000]}},
        trials=TRIALS,
        scheduler={"by": "asha", "reduction": 2, "first": 2},
        concurrent=AT_ONCE,
        changes={"ray.num_cpus": 40, "train.epochs": 8, "data.metric": "edit_similarity"},
    )
    end_shared_cluster()
    run_search(opened(path), tell=print)
    plan = opened(path).plan()
    trials = plan.ledger.of("trial")
    assert len(trials) == TRIALS and all(t.state in ("finished", "stopped") for t in trials)
    keys, store = computed(plan), plan.ledger.store
    assert len(keys) == len(set(keys))
    assert all(StageRecord.load(store, key).attempts == 1 for key in keys)
    folders = (tmp_path / "store").glob("*/*/*/record.json")
    assert set(keys) == {str(file.parent.relative_to(tmp_path / "store")) for file in folders}
    assert busy_at_once(plan) >= AT_ONCE - 1
    found = Sharing.of_ledger(plan.ledger)
    assert found.again == 0 and found.saved is not None
    print(f"{found.stages} stages for {found.asked}, {1 - found.saved:.0%} of the seconds")
    assert found.computed == found.stages <= GOAL * found.asked
