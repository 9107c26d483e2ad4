"""Meta: Train-Attention learns to weigh documents, once for all tasks of a stream (TAALM).

One actor with two models: the stream's base model, which every pair starts from anew and which stays as
it is, and the network that is trained. It saves where it stands every few updates, so a run that is killed
goes on there and ends with the same bits. Afterwards the network is frozen: what it says of a document is
the `weights` stage.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.config import PoolConfig, StreamConfig
from pipelines.forgotten import NOTHING, ForgottenRows
from pipelines.hosts import model_pool
from pipelines.monitor import Reporter
from pipelines.pool import ModelSource, prepare_device, ray_tables, rows_in_blocks
from pipelines.readers import BadRow, read_source
from pipelines.rows import SourceRow
from pipelines.stage import StageOutcome
from pipelines.store import Store
from pipelines.survey_documents import pair_columns
from pipelines.token_weights_config import MetaConfig
from pipelines.workspace import CHECKPOINTS, Workspace
from seekr.errors import ConfigError, DataError
from seekr.fact_probes import make_probe
from seekr.models import load_tokenizer
from seekr.prompts import TokenizedRow, encode_document, pad_id_of
from seekr.sampling import draw
from seekr.taalm.adapters import add_adapters
from seekr.taalm.episodes import MetaItem
from seekr.taalm.hypergradient import InnerLoop
from seekr.taalm.inner import AdamW
from seekr.taalm.meta import MetaSettings, MetaStep, MetaTraining
from seekr.taalm.network import TrainAttention
from seekr.taalm.validation import Validation, ValidationSettings, validate
from seekr.training.settings import Lora

NETWORK, HISTORY = "network", "history.json"
_STEPS = "steps.json"


def meta(workspace: Workspace, config: StreamConfig, label: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes network/ and history.json.

    Raises:
        DataError: the pairs cannot be used, or the training diverges.
    """
    weights = config.token_weights
    assert weights is not None
    items, odd = read_pairs(config, weights.meta, ForgottenRows.load(workspace.store))
    held_out = set(draw([item.item_id for item in items], weights.meta.held_out, config.seed))
    arguments = {
        "model": ModelSource.of(workspace, config, "model"),
        "config": config,
        "learnt": [item for item in items if item.item_id not in held_out],
        "watched": [item for item in items if item.item_id in held_out],
        "store": workspace.store,
        "key": workspace.key,
        "report": report,
    }
    own = weights.meta
    pool = PoolConfig(actors=1, batch_size=1, cpus=own.cpus, gpus=own.gpus)
    with model_pool("meta", _MetaTrainer, arguments, workspace.key, pool, config) as through:
        (found,) = ray_tables(through(rows_in_blocks(pa.table({"go": [True]}), pool)))
    history = json.loads(found["history"][0].as_py())
    if "diverged" in history:
        raise DataError(f"token_weights.meta: {history['diverged']}")
    workspace.write_json(HISTORY, history)
    workspace.store.remove(workspace.path(CHECKPOINTS))
    stats = {"pairs": len(items), **odd, "steps": len(history["steps"]), **history["held_out"]}
    return StageOutcome(rows=len(items), stats=stats, seeds={"meta": config.seed})


def read_pairs(
    config: StreamConfig, settings: MetaConfig, forgotten: ForgottenRows = NOTHING
) -> tuple[list[MetaItem], dict[str, int]]:
    """Return the pairs that may be learnt from, and how many were left out and why.

    A pair of which the document or the sentence was forgotten is left out without being counted.

    Raises:
        DataError: too few are left, or more than data.max_bad_share cannot be used.
    """
    columns = pair_columns(settings.columns)
    assert settings.pairs is not None
    known: set[str] = set()
    for source in settings.exclude:
        for row in read_source(source, columns):
            if isinstance(row, SourceRow):
                known |= {row.input, row.definition or ""}
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    items: dict[str, MetaItem] = {}
    bad: list[str] = []
    excluded = total = 0
    for row in read_source(settings.pairs, columns):
        total += 1
        try:
            if isinstance(row, BadRow):
                raise DataError(str(row))
            if row.input in known or row.definition in known:
                excluded += 1
                continue
            item = _item(row, tokenizer, settings.max_length)
            if not any(forgotten.holds(row.row_id) for row in (item.document, item.task)):
                items[item.item_id] = item
        except DataError as error:
            bad.append(str(error))
    if len(bad) > config.data.max_bad_share * total or len(items) <= settings.held_out:
        reason = f"; the first bad one: {bad[0]}" if bad else ""
        raise DataError(
            f"token_weights.meta.pairs: of {total} pairs {excluded} are excluded and {len(bad)} cannot "
            f"be used; {len(items)} distinct ones are left, and more than held_out = "
            f"{settings.held_out} are needed, with at most {config.data.max_bad_share:.2%} bad{reason}"
        )
    return [items[i] for i in sorted(items)], {"excluded": excluded, "quarantined": len(bad)}


def _item(row: SourceRow, tokenizer: Any, max_length: int) -> MetaItem:
    """Return a document, and the sentence that it teaches, with the place of its answer."""
    if row.definition is None:
        raise DataError(f"{row.file}:{row.line}: the document is empty")
    document = encode_document(row.definition, tokenizer, max_length=max_length)
    probe = make_probe(tokenizer, row.input, row.references[0])
    task = TokenizedRow(
        row_id=probe.row_id,
        input=row.input,
        references=row.references,
        input_ids=probe.input_ids,
        prompt_length=1,
    )
    object_mask_T = np.zeros(len(probe.input_ids), dtype=np.bool_)
    object_mask_T[probe.positions] = True
    return MetaItem(document=document, task=task, object_mask_T=object_mask_T)


def _lora(section: Any) -> Lora | None:
    return None if section is None else Lora(**section.model_dump())


def meta_settings(settings: MetaConfig, seed: int) -> MetaSettings:
    """Return what a meta-training computes, from the stream's section."""
    inner = InnerLoop(
        optimizer=AdamW(learning_rate=settings.inner_learning_rate, damping=settings.inner_damping),
        dummy_steps=settings.dummy_steps,
        backend=settings.hypergradient,
    )
    return MetaSettings(
        inner=inner,
        optimizer=AdamW(learning_rate=settings.learning_rate),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        episode_size=settings.episode_size,
        seed=seed,
    )


class _MetaTrainer:
    """An actor with the model that learns and the network that weighs."""

    def __init__(
        self,
        *,
        model: ModelSource,
        config: StreamConfig,
        learnt: list[MetaItem],
        watched: list[MetaItem],
        store: Store,
        key: str,
        report: Reporter,
        pool: PoolConfig,
    ) -> None:
        weights = config.token_weights
        assert weights is not None
        settings, seed = weights.meta, config.seed
        device = prepare_device(pool)
        theta: Any = model.load("sdpa", torch.float32)
        if settings.inner_lora is not None:
            add_adapters(theta, Lora(**settings.inner_lora.model_dump()), f"{seed}/theta")
        self._theta = theta.to(device)
        phi = TrainAttention.start(
            weights.model or model.base, lora=_lora(settings.lora), seed=seed
        )
        self._phi = phi.to(device)
        self._tokenizer = load_tokenizer(model.base, trust_remote_code=model.trust_remote_code)
        self._pad_id = pad_id_of(self._tokenizer)
        self._training = MetaTraining(
            self._theta, self._phi, learnt, meta_settings(settings, seed), self._pad_id
        )
        self._settings, self._watched = settings, watched
        self._store, self._key, self._report = store, key, report.named("meta")
        self._steps: list[dict[str, float]] = []

    def __call__(self, table: pa.Table) -> pa.Table:
        """Train to the end from where an earlier attempt stopped; the table's content is nothing.

        A training that diverges ends there and leaves no network.
        """
        self._resume()
        training = self._training
        while training.steps_done < training.num_steps:
            try:
                self._note(training.step())
            except DataError as error:  # said by the stage: Ray would wrap it
                return pa.table({"history": [json.dumps({"diverged": str(error)})]})
            done = training.steps_done
            if done % self._settings.checkpoint_every == 0 and done < training.num_steps:
                self._save()
        with tempfile.TemporaryDirectory(prefix="seekr-network-") as path:
            self._phi.save(path)
            self._tokenizer.save_pretrained(path)
            self._store.upload(path, self._key, NETWORK)
        history = {"steps": self._steps, "held_out": self._watch()}
        return pa.table({"history": [json.dumps(history)]})

    def _note(self, step: MetaStep) -> None:
        self._steps.append(step_figures(step))
        self._report.post(
            steps_done=step.step,
            steps=self._training.num_steps,
            loss=step.outer_nll,
            grad_norm=step.gradient_norm,
        )

    def _watch(self) -> dict[str, float]:
        """Return how well held-out documents are learnt with the network's weights, and without."""
        settings = ValidationSettings(
            optimizer=AdamW(learning_rate=self._settings.inner_learning_rate)
        )

        def learnt(phi: TrainAttention | None) -> Validation:
            return validate(self._theta, phi, self._watched, settings, self._pad_id)

        weighted, plain = learnt(self._phi), learnt(None)
        return {
            "nll_before": weighted.nll_before,
            "nll_weighted": weighted.nll,
            "nll_plain": plain.nll,
            "accuracy_weighted": weighted.accuracy,
            "accuracy_plain": plain.accuracy,
        }

    def _save(self) -> None:
        """Write a checkpoint; its list of steps comes last and makes it whole."""
        done = self._training.steps_done
        place = f"{CHECKPOINTS}/step-{done}"
        with tempfile.TemporaryDirectory(prefix="seekr-meta-") as path:
            self._training.save(path)
            self._store.upload(path, self._key, place)
        self._store.write_json(f"{self._key}/{place}/{_STEPS}", self._steps)
        for other in self._checkpoints():
            if other < done:
                self._store.remove(f"{self._key}/{CHECKPOINTS}/step-{other}")

    def _resume(self) -> None:
        for done in sorted(self._checkpoints(), reverse=True):
            place = f"{self._key}/{CHECKPOINTS}/step-{done}"
            if not self._store.exists(f"{place}/{_STEPS}"):
                continue
            with tempfile.TemporaryDirectory(prefix="seekr-meta-") as path:
                for file in self._store.list(place):
                    name = Path(file.path).name
                    (Path(path) / name).write_bytes(self._store.read_bytes(file.path))
                try:
                    self._training.load(path)
                except ConfigError:  # of other settings: a version before this one
                    continue
            self._steps = self._store.read_json(f"{place}/{_STEPS}")
            return

    def _checkpoints(self) -> Iterable[int]:
        names = self._store.children(f"{self._key}/{CHECKPOINTS}")
        return [int(name.rpartition("-")[2]) for name in names if name.startswith("step-")]


def step_figures(step: MetaStep) -> dict[str, float]:
    """Return one update's figures for the history, counted from 0 as training steps are."""
    return {
        "step": step.step - 1,
        "outer_nll": step.outer_nll,
        "entropy": step.entropy,
        "mean_weight": step.mean_weight,
        "grad_norm": step.gradient_norm,
    }
