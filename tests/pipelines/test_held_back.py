"""How `seekr run` and `seekr tick` end when the gate holds the newest model back: with 3, or with a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest

from pipelines import cli
from pipelines.continual_config import HELD_BACK_LINE
from tests.pipelines.inboxes import Arriving, arriving
from tests.pipelines.running import run_to_end

pytestmark = pytest.mark.ray
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Arriving:
    """Learnt already, and judged by no bound; every test judges the model by another one."""
    found = arriving(tmp_path_factory.mktemp("stream"), method={"name": "seqft"})
    run_to_end(found.path)
    return found


@pytest.fixture
def call(
    stream: Arriving, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Return a function that runs `seekr` on the stream; it returns exit code, stdout and stderr."""

    def call(verb: str, bound: float, *words: str) -> tuple[int, str, str]:
        command = ["seekr", verb, str(stream.path), "--set", f"gate.min_new_score={bound}"]
        monkeypatch.setattr(sys, "argv", [*command, *words])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("verb", "bound"), [("run", 0.91), ("tick", 0.92)])
def test_a_model_that_is_held_back_ends_with_3(verb: str, bound: float, call: Call) -> None:
    code, out, err = call(verb, bound)
    assert code == 3
    assert HELD_BACK_LINE not in out + err
    assert call(verb, bound)[0] == 0, "it was judged by this bound"


@pytest.mark.parametrize(("verb", "bound"), [("run", 0.93), ("tick", 0.94)])
def test_where_that_is_ok_it_ends_with_0_and_says_so_in_its_last_line(
    verb: str, bound: float, call: Call
) -> None:
    code, out, _ = call(verb, bound, "--held-back-ok")
    assert code == 0
    assert out.splitlines()[-1] == HELD_BACK_LINE
    assert out.count(HELD_BACK_LINE) == 1
    assert HELD_BACK_LINE not in "".join(call(verb, bound, "--held-back-ok")[1:])


@pytest.mark.parametrize(("verb", "bound"), [("run", 0.95), ("tick", 0.96)])
def test_the_line_leaves_json_alone(verb: str, bound: float, call: Call) -> None:
    code, out, err = call(verb, bound, "--held-back-ok", "--json")
    assert code == 0
    assert json.loads(out)["decision"]["checks"][0]["holds"] is False
    assert err.splitlines()[-1] == HELD_BACK_LINE


@pytest.mark.parametrize("verb", ["run", "tick"])
def test_a_model_that_is_promoted_has_no_such_line(verb: str, call: Call) -> None:
    code, out, err = call(verb, 0.0, "--held-back-ok")
    assert (code, HELD_BACK_LINE in out + err) == (0, False)
