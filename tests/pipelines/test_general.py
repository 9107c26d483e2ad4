"""Which tasks of the harness are known: asked of the harness once per version, then of this host's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import general
from pipelines.general import check_tasks, harness_version
from seekr.errors import ConfigError


def test_the_harnesss_tasks_are_read_once_and_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEKR_CACHE_DIR", str(tmp_path / "cache"))
    kept = tmp_path / "cache" / f"lm-eval-{harness_version()}.json"
    general._own_tasks.cache_clear()
    try:
        check_tasks(["piqa", "boolq"], None)
        names = json.loads(kept.read_text(encoding="utf-8"))
        assert {"piqa", "boolq"} <= set(names) and names == sorted(names)
        with pytest.raises(ConfigError, match="has piqua, which lm-eval"):
            check_tasks(["piqua"], None)
        # Another process finds the file; half a file is as none.
        for content, known in (('["piqua"]', "piqua"), ('["piq', "piqa")):
            kept.write_text(content, encoding="utf-8")
            general._own_tasks.cache_clear()
            check_tasks([known], None)
        assert json.loads(kept.read_text(encoding="utf-8")) == names
    finally:
        general._own_tasks.cache_clear()


def test_tasks_of_a_folder_are_known_beside_the_harnesss_own(tmp_path: Path) -> None:
    task = {"task": "our_own", "output_type": "generate_until", "dataset_path": "json"}
    (tmp_path / "our_own.yaml").write_text(json.dumps(task), encoding="utf-8")
    check_tasks(["our_own", "piqa"], tmp_path)
    with pytest.raises(ConfigError, match="our_own"):
        check_tasks(["our_own"], None)
