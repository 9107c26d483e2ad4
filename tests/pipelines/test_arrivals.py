"""From the inbox into the register: who becomes a task, in which order, and who does not, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import receive
from pipelines.arrivals import Register
from pipelines.decisions import Decision, DecisionLog
from pipelines.lease import Lease
from pipelines.stream import open_stream
from pipelines.tick import withdraw_task
from seekr.errors import ConfigError, DataError, LeaseLost, StoreError
from tests.pipelines.committed import Committer
from tests.pipelines.inboxes import Arriving, arriving, arriving_in
from tests.pipelines.streams import RULES, task_rows, write_task

VALIDATION = {"data": {"validation_rows": 5}, "evaluate": {"split": "validation"}}


@pytest.fixture(params=["disk", "s3"])
def stream(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Arriving]:
    with arriving_in(request.param, tmp_path) as found:
        yield found


@pytest.fixture
def local(tmp_path: Path) -> Arriving:
    return arriving(tmp_path)


def tasks(stream: Arriving) -> list[str]:
    return [task.name for task in open_stream(stream.path).config.tasks]


def test_what_arrives_becomes_tasks_behind_those_of_the_yaml(stream: Arriving) -> None:
    before = {str(s): s.fingerprint for s in open_stream(stream.path).stages}
    stream.inbox.put_task("second", "reverse")
    assert [entry.name for entry in stream.look().entered] == ["second"]
    stream.inbox.put_task("third", "first")
    stream.inbox.put_task("fourth", "sort", whole=False)
    (waiting,) = stream.look().waiting
    assert "fourth waits for _SUCCESS" in waiting
    assert stream.look().entered == ()
    assert tasks(stream) == ["upper", "second", "third"]
    entry = stream.register.entries[0]
    assert (entry.number, entry.rows, entry.behind) == (1, 40, ("upper",))
    after = {str(s): s.fingerprint for s in open_stream(stream.path).stages}
    assert before.items() <= after.items(), "what was there runs again"


def test_an_arrival_is_the_same_to_the_stages_as_a_task_of_the_yaml(tmp_path: Path) -> None:
    stream = arriving(tmp_path / "a")
    stream.inbox.put_task("reverse", "reverse")
    stream.look()
    other = arriving(tmp_path / "b", tasks=2, tasks_from=None)
    write_task(tmp_path / "b" / "data" / "reverse", "reverse")
    assert open_stream(stream.path).stages == open_stream(other.path).stages


def test_arrivals_keep_their_place_and_their_rows_when_the_inbox_is_emptied(
    stream: Arriving,
) -> None:
    stream.inbox.put_task("second", "reverse")
    stream.look()
    before = open_stream(stream.path).stages
    stream.inbox.remove("second")
    stream.inbox.put_task("anew", "first")
    stream.look()
    assert tasks(stream) == ["upper", "second", "anew"]
    assert open_stream(stream.path).stages[: len(before) - 1] == before[: len(before) - 1]


def test_a_file_that_was_changed_later_stays_what_it_was(local: Arriving) -> None:
    local.inbox.put_task("second", "reverse", at=1)
    local.look()
    before = open_stream(local.path).stages
    local.inbox.put_rows("second/train.jsonl", task_rows("sort", 40), at=2)
    (entry,) = local.look().entered
    assert entry.verdict == "quarantined"
    assert entry.reason.startswith("the stream has a task second with other rows, which stays as")
    assert open_stream(local.path).stages == before
    assert local.look().entered == (), "it is judged once"


def test_a_duplicate_is_noted_and_passed_over(stream: Arriving) -> None:
    stream.inbox.put_task("second", "reverse")
    stream.look()
    stream.inbox.put_task("again", "reverse")
    stream.inbox.put_task("yaml-again", "upper")
    first, second = stream.look().entered
    assert (first.verdict, second.verdict) == ("duplicate", "duplicate")
    assert "those of the task second that arrived as number 1" in first.reason
    assert "those of the task upper of the YAML" in second.reason
    assert tasks(stream) == ["upper", "second"]


def test_two_that_arrive_at_once_with_the_same_rows_are_one_task(local: Arriving) -> None:
    local.inbox.put_task("one", "reverse", at=3)
    local.inbox.put_task("two", "reverse", at=3)
    local.look()
    assert local.verdicts() == [("one", "accepted"), ("two", "duplicate")]


def test_bad_rows_are_told_with_file_line_and_reason_and_corrected_ones_are_taken(
    stream: Arriving,
) -> None:
    stream.inbox.put_task("bad", "reverse", whole=False)
    rows = [json.dumps(row) for row in task_rows("reverse", 40)]
    stream.inbox.put("bad/train.jsonl", "\n".join([*rows[:2], '{"input": 3}', *rows[2:]]))
    stream.inbox.put("bad/_SUCCESS", "")
    stream.inbox.put_task("good", "first")
    bad, good = stream.look().entered
    assert (bad.verdict, good.verdict) == ("quarantined", "accepted"), "the stream goes on"
    assert bad.reason.startswith("1 of 41 train rows cannot be used (2.44%; data.max_bad_share is")
    (row,) = bad.bad_rows
    assert row["file"].endswith("bad/train.jsonl") and row["line"] == 3
    assert row["reason"] == "missing column 'output'" or "wrong type" in row["reason"]
    stream.inbox.put_task("bad", "reverse")
    assert [entry.verdict for entry in stream.look().entered] == ["accepted"]
    assert tasks(stream) == ["upper", "good", "bad"]


CASES = {
    "has spaces.jsonl": ("rows", "pattern"),
    "base.jsonl": ("rows", "'base' is reserved"),
    "champion.jsonl": ("rows", "'champion' is reserved"),
    "a--b.jsonl": ("rows", "has '--'"),
    "table.csv": ("a,b\n1,2\n", "'.csv'"),
    "empty.jsonl": ("", "no usable train row"),
    "list.json": ('[{"input": "a", "output": ', "malformed JSON"),
    "broken.parquet": ("PAR1 and no more", "cannot be read as Parquet"),
    "odd.jsonl": ('{"question": "a", "reply": "b"}\n', "no input column"),
    "short.jsonl": ('{"input": "a", "output": "b"}\n', "validation_rows is 5 and there are 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_a_task_is_set_aside_with_the_reason(name: str, tmp_path: Path) -> None:
    stream = arriving(tmp_path, **VALIDATION)
    content, fragment = CASES[name]
    text = "".join(json.dumps(row) + "\n" for row in task_rows("reverse", 20))
    stream.inbox.put(name, text if content == "rows" else content, at=1)
    stream.inbox.put(name.replace("jsonl", "txt") if content == "rows" else "good.jsonl", "", at=0)
    (stream.path.parent / "inbox" / "good.jsonl").write_text(text)
    stream.look()
    entries = {entry.place.rpartition("/")[2]: entry for entry in stream.register.entries}
    assert entries[name].verdict == "quarantined" and fragment in entries[name].reason
    assert entries["good.jsonl"].verdict == "accepted"


FOLDERS = {
    "no rows": ({"notes.jsonl": "{}"}, "there is no train.jsonl"),
    "no test": ({"train.jsonl": "rows"}, "has no test; one is needed"),
    "options that are no mapping": ({"task.yaml": "- 1"}, "task.yaml is list"),
    "options that are no YAML": ({"task.yaml": "a: ]"}, "task.yaml is not valid YAML"),
    "an unknown option": ({"task.yaml": "epoch: 2"}, "epoch: Extra inputs"),
    "a wrong option": ({"task.yaml": "epochs: 0"}, "epochs: Input should be greater"),
    "a place of its own": ({"task.yaml": "train: /etc/passwd"}, "sets train, which follow"),
    "a template without input": ({"task.yaml": "template: Answer"}, "template"),
    "a bad test": (
        {"test.jsonl": '{"input": "a", "output": "b"}\n{"input": "c"}\n'},
        "1 of 2 test rows",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_a_task_is_set_aside_with_the_reason(
    case: str, local: Arriving
) -> None:
    files, fragment = FOLDERS[case]
    if "rows" not in files.values() and "notes.jsonl" not in files:
        local.inbox.put_task("news", "reverse", whole=False)
    for name, content in files.items():
        if content == "rows":
            local.inbox.put_rows(f"news/{name}", task_rows("reverse", 20))
        else:
            local.inbox.put(f"news/{name}", content)
    local.inbox.put("news/_SUCCESS", "")
    local.look()
    assert local.only().verdict == "quarantined" and fragment in local.only().reason
    assert tasks(local) == ["upper"]
    assert not local.store.list(f"{local.register.folder}/data"), "nothing of it is kept"


def test_options_come_along_and_are_frozen(local: Arriving) -> None:
    local.inbox.put_task("news", "reverse", whole=False)
    local.inbox.put("news/task.yaml", "epochs: 2\nmetric: exact_match\n")
    local.inbox.put("news/_SUCCESS", "", at=5)
    local.look()
    local.inbox.put("news/task.yaml", "epochs: 9\n")
    local.look()
    task = open_stream(local.path).config.tasks[1]
    assert (task.epochs, task.metric) == (2, "exact_match")
    assert local.verdicts() == [("news", "accepted"), ("news", "duplicate")]


def test_a_folder_of_many_files_is_one_task_in_their_order(local: Arriving) -> None:
    rows = task_rows("reverse", 50)
    for part in range(4):
        local.inbox.put_rows(f"news/train/part-{part}.jsonl", rows[part * 10 : part * 10 + 10])
    local.inbox.put_rows("news/test/part-0.jsonl", rows[40:])
    local.inbox.put("news/_SUCCESS", "")
    local.look()
    stream = open_stream(local.path)
    assert stream.facts.tasks["news"].num_train == 40
    copied = [f.path.rpartition("/")[2] for f in local.store.list(local.register.folder + "/data")]
    assert copied == ["part-0.jsonl", *[f"part-{n}.jsonl" for n in range(4)]]


def test_a_single_file_is_a_task_where_rows_are_held_out_for_the_test(tmp_path: Path) -> None:
    stream = arriving(tmp_path, **VALIDATION)
    stream.inbox.put_rows("news.jsonl", task_rows("reverse", 20))
    stream.look()
    opened = open_stream(stream.path)
    assert stream.only().verdict == "accepted"
    assert "evaluate/news" in map(str, opened.stages)
    assert opened.facts.tasks["news"].num_train == 15


def test_a_stream_may_begin_with_what_arrives(tmp_path: Path) -> None:
    stream = arriving(tmp_path, tasks=0)
    with pytest.raises(ConfigError, match=r"has no task yet.*seekr tick"):
        open_stream(stream.path)
    stream.inbox.put_task("first", "first")
    stream.look()
    assert tasks(stream) == ["first"]


def test_a_task_added_to_the_yaml_behind_arrivals_is_refused(tmp_path: Path) -> None:
    stream = arriving(tmp_path)
    stream.inbox.put_task("news", "first")
    stream.look()
    longer = arriving(tmp_path, tasks=2)
    with pytest.raises(
        ConfigError,
        match="the YAML has the tasks upper, reverse, and 1 tasks have arrived behind upper",
    ):
        open_stream(longer.path)
    with pytest.raises(ConfigError, match="arrivals keep their place"):
        longer.look()


def test_a_task_that_is_withdrawn_is_none_any_more_and_may_be_delivered_again(
    local: Arriving,
) -> None:
    local.inbox.put_task("one", "reverse")
    local.inbox.put_task("two", "first")
    local.look()
    entry = withdraw_task(local.path, (), "one", "the labels were shifted", pytest.fail)
    assert (entry.number, entry.withdraws, entry.verdict) == (3, 1, "withdrawn")
    assert tasks(local) == ["upper", "two"]
    assert local.look().entered == (), "what lies in the inbox is known"
    local.inbox.put_task("one", "reverse")
    assert [entry.verdict for entry in local.look().entered] == ["accepted"]
    assert tasks(local) == ["upper", "two", "one"]
    for name, reason, fragment in (
        ("three", "so", "no task 'three' has arrived; there are two, one"),
        ("upper", "so", "Tasks of the YAML are changed there"),
        ("two", " ", "--reason is empty"),
    ):
        with pytest.raises(ConfigError, match=fragment):
            withdraw_task(local.path, (), name, reason, pytest.fail)


def test_who_withdraws_a_task_is_told_that_the_champion_has_learnt_it(local: Arriving) -> None:
    local.inbox.put_task("one", "reverse")
    local.inbox.put_task("two", "first")
    local.look()
    out = Committer(local.store)
    first = out.commit("train", "one")
    second = out.commit("train", "two", inputs={"model": first})
    log = DecisionLog(local.store, "small")
    with Lease(local.store, log.folder) as lease:
        decision = Decision(
            kind="promote", model=second.record.ref, champion=second.record.ref, previous=None,
            reason="reviewed",
        )  # fmt: skip
        log.add(decision, log.read(), lease)
    told: list[str] = []
    withdraw_task(local.path, (), "one", "the labels were shifted", told.append)
    (warning,) = told
    assert "the model after two, has learnt one and stays the champion" in warning


def test_a_copy_that_was_changed_in_the_store_is_noticed(local: Arriving) -> None:
    local.inbox.put_task("news", "reverse")
    local.look()
    entry = local.only()
    copy = Path(local.store.full_path(f"{entry.folder}/{entry.train}"))
    copy.write_text("\n".join(copy.read_text().splitlines()[:-1]))
    with pytest.raises(StoreError, match="the rows of the task news are not those that arrived on"):
        open_stream(local.path)


def test_what_is_wrong_with_the_stream_is_no_arrivals_fault(local: Arriving) -> None:
    local.inbox.put_task("news", "reverse")
    (local.path.parent / "data" / "upper" / "train.jsonl").unlink()
    with pytest.raises(Exception, match="upper"):
        local.look()
    assert local.register.entries == ()


def test_a_file_that_cannot_be_read_today_is_judged_tomorrow(
    local: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.inbox.put_task("news", "reverse")
    real = receive.inspect

    def unreachable(source: str, *rest: object, **options: object) -> object:
        try:
            raise OSError(110, "the connection timed out")
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error}") from error

    monkeypatch.setattr(receive, "inspect", unreachable)
    with pytest.raises(Exception, match="timed out"):
        local.look()
    assert local.register.entries == ()
    monkeypatch.setattr(receive, "inspect", real)
    assert [entry.verdict for entry in local.look().entered] == ["accepted"]


def test_a_file_that_is_still_written_to_while_it_is_read_waits(
    local: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.inbox.put_task("news", "reverse", at=1)
    real = receive.inspect

    def written_meanwhile(source: str, *rest: object, **options: object) -> object:
        report = real(source, *rest, **options)  # type: ignore[arg-type]
        local.inbox.put_rows("news/train.jsonl", task_rows("sort", 30))
        return report

    monkeypatch.setattr(receive, "inspect", written_meanwhile)
    taken = local.look()
    assert taken.entered == () and "changed while it was read" in taken.waiting[0]
    monkeypatch.setattr(receive, "inspect", real)
    (entry,) = local.look().entered
    assert (entry.verdict, entry.rows) == ("accepted", 30)


def test_of_two_ticks_that_both_hold_the_lease_one_enters(local: Arriving) -> None:
    """The first slept so long that the second took over; it wakes with what it had seen."""
    local.inbox.put_task("news", "reverse")
    sleeper = Register(local.store, "small")
    assert [entry.name for entry in local.look().entered] == ["news"]
    with (
        Lease(local.store, "streams/small/other", settle=0.0) as lease,
        pytest.raises(LeaseLost, match="another run has added entry 1 meanwhile"),
    ):
        receive.take_in(local.config, sleeper, lease)
    assert local.verdicts() == [("news", "accepted")]


NAMES = ("alpha", "beta", "gamma")
Drop = tuple[str, str, int]


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from([*RULES, "bad"]), st.integers(0, 9)),
            max_size=2,
        ),
        max_size=3,
    )
)
@settings(max_examples=12)
def test_whatever_arrives_when_the_register_only_grows_and_learns_no_rows_twice(
    tmp_path_factory: pytest.TempPathFactory, ticks: Sequence[Sequence[Drop]]
) -> None:
    stream = arriving(tmp_path_factory.mktemp("stream"), **VALIDATION)
    learnt = {"upper"}
    expected: list[tuple[str, str]] = []
    for number, drops in enumerate(ticks):
        now: dict[str, tuple[int, str]] = {}
        for name, rule, at in drops:
            rows = [{"input": 1}] if rule == "bad" else task_rows(rule, 40)
            stream.inbox.put_rows(f"{name}.jsonl", rows, at=100 * number + at)
            now[name] = (at, rule)
        for name, (_, rule) in sorted(now.items(), key=lambda item: (item[1][0], item[0])):
            taken = {task for task, verdict in expected if verdict == "accepted"}
            if rule == "bad":
                verdict = "quarantined"
            elif rule in learnt:
                verdict = "duplicate"
            else:
                verdict = "quarantined" if name in taken else "accepted"
            learnt |= {rule} if verdict == "accepted" else set()
            expected.append((name, verdict))
        before = stream.register.entries
        stream.look()
        assert stream.register.entries[: len(before)] == before
        assert stream.verdicts() == expected
        assert stream.look().entered == ()
    shutil.rmtree(stream.path.parent / "inbox")
    accepted = [name for name, verdict in expected if verdict == "accepted"]
    assert tasks(stream) == ["upper", *accepted]
