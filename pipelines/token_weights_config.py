"""The schema of the YAML's section about token weights: what each token of a row counts in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipelines.pool_config import ActorConfig
from pipelines.section import Section, execution
from pipelines.train_config import LoraConfig


class PairColumns(Section):
    """Names of the columns of the pairs that Train-Attention learns from."""

    document: str = "evidence"
    """A text that says something."""
    sentence: str = "task_schematic"
    """What is to be known after the text was learnt."""
    answer: str = "object"
    """The part of the sentence that is scored."""


class MetaConfig(ActorConfig):
    """How Train-Attention is trained: to weight a document so that one step on it teaches a sentence."""

    pairs: str | None = execution(None, min_length=1)
    """File, folder, glob or URI of pairs; relative paths start at data_root."""
    columns: PairColumns = PairColumns()
    """Which columns of the pairs hold what."""
    exclude: tuple[str, ...] = execution(())
    """Files in the same columns; pairs that share a document or a sentence with them are left out."""
    max_length: int = Field(default=512, ge=4)
    """Tokens of a document; the rest of a longer one is cut off."""
    epochs: int = Field(default=30, ge=1)
    """Passes over the pairs."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs per update of Train-Attention."""
    episode_size: int = Field(default=1, ge=1)
    """Pairs that are learnt together in the inner steps; 1 as published, more are faster."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Of Train-Attention (outer)."""
    inner_learning_rate: float = Field(default=2e-4, gt=0)
    """Of the model's own steps on a document (inner)."""
    inner_damping: float = Field(default=1e-8, ge=0)
    """Under the root of the inner optimizer: makes a first step follow the gradient's size."""
    dummy_steps: int = Field(default=1, ge=0)
    """Inner steps before the one that is differentiated."""
    lora: LoraConfig | None = None
    """Adapters that are trained in Train-Attention instead of all its weights."""
    inner_lora: LoraConfig | None = None
    """Adapters that inner steps train in the model instead of all its weights."""
    hypergradient: Literal["unrolled", "jvp", "central"] = "jvp"
    """How the step is differentiated: second-order graph, forward derivative, or central differences."""
    held_out: int = Field(default=16, ge=1)
    """Pairs kept aside to watch."""
    checkpoint_every: int = execution(10, ge=1)
    """Updates between checkpoints."""


class TokenWeightsConfig(Section):
    """Who says what each token of a row counts."""

    by: Literal["train_attention", "focus"]
    """`train_attention` is a second network that looks at the row (TAALM); `focus` counts the tokens of
    data.columns.focus alone: a bound for what weights can do, as it knows beforehand what is asked."""
    network: Path | None = execution(None)
    """Folder of a Train-Attention that is trained already; null trains one, as `meta` says."""
    model: Path | None = execution(None)
    """Folder of the model that Train-Attention begins as, with the base model's tokenizer; null is the
    base model."""
    meta: MetaConfig = MetaConfig()
    """How Train-Attention is trained."""

    @model_validator(mode="after")
    def _trained_or_to_train(self) -> TokenWeightsConfig:
        if self.by == "train_attention" and (self.network is None) == (self.meta.pairs is None):
            found = "both null" if self.network is None else "both set"
            raise ValueError(
                f"network and meta.pairs are {found}; give the folder of a trained network, or pairs "
                "to train one with"
            )
        if self.network is not None and self.model is not None:
            raise ValueError(
                "network is trained already and model is what one begins as; set one of them to null"
            )
        return self

    @property
    def trains_network(self) -> bool:
        """Whether a Train-Attention is to be trained."""
        return self.by == "train_attention" and self.network is None
