"""The benchmark for a bare GPU host runs where this repository's other needs are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What such a host lacks. None in sys.modules makes an import fail.
ABSENT = (
    *("ray", "mlflow", "pyarrow", "typer", "datasets", "rich", "trl", "deepspeed"),
    *("matplotlib", "rouge_score", "jinja2", "pipelines", "tune", "cluster"),
)
CODE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "


def test_the_7b_benchmark_runs_without_ray_and_all_that_comes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = CODE + "from benchmarks.train_7b import main; main()"
    command = [sys.executable, "-c", code, "--shape", "tiny", "--steps", "2", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    found = [(case["mode"], case["tokens"]) for case in cases]
    assert found == [("lora", 64), ("lora", 128), ("full", 64), ("full", 128)]
    assert len(done.stdout.splitlines()) == len(cases)
    for case in cases:
        assert [len(case[kind]["seconds"]) for kind in ("plain", "replay")] == [2, 2]
        assert case["overhead"]["ratio"] > 0
