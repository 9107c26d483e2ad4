"""How large a model is, piece by piece, read from its configuration without any of its weights.

The model is built on the meta device, where parameters have shapes and no memory, so the counts are the
real model's own: shared weights once, adapters as peft makes them. Everything that is estimated
of a training's memory (`memory`, `activations`) starts from these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seekr.addition import is_added
from seekr.answers import has_plain_head
from seekr.models import model_shape
from seekr.training.build import Origin, addition_after, decoder_layers, empty_model, is_adapter
from seekr.training.settings import Recipe

# Linear layers that read one tensor, and the one at which an adapter or a gradient keeps it.
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
ATTENTION_OUT, DOWN = "o_proj", "down_proj"
ALL_LINEAR = (*QUERY_KEY_VALUE, ATTENTION_OUT, *GATE_UP, DOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Counts of numbers, none of them bytes.

    Attributes:
        layers, heads, kv_heads, head_dim, vocab: as the configuration has them.
        width: of the hidden states. inner: of the MLP.
        layer: numbers of one decoder layer's own weights, without adapters.
        root: of everything that is in no layer: embedding, head, last norm.
        head: of the output layer's weight, and of the embedding's. tied: whether they are one.
        linear: of the matrices in all layers, which autocast makes copies of.
        trained, frozen: all numbers that are updated, and those that are not.
        adapters: trained numbers that belong to adapters.
        added: trained numbers beside a frozen model.
        rank, dropout: of adapters and added blocks, all tasks' together; 0 without.
        targets: linear layers with an adapter or blocks; without, all of them are trained
            themselves, or none where something else is added.
        plain_head: whether logits can be read in chunks.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    inner: int
    vocab: int
    layer: int
    root: int
    head: int
    tied: bool
    linear: int
    trained: int
    frozen: int
    adapters: int
    added: int
    rank: int
    dropout: float
    targets: tuple[str, ...]
    plain_head: bool

    @property
    def total(self) -> int:
        """Numbers of the model with its adapters."""
        return self.trained + self.frozen

    @property
    def base_frozen(self) -> bool:
        """Whether only adapters or an addition are trained."""
        return self.rank > 0 or self.added > 0

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def trained_root(self) -> int:
        """Trained numbers outside of layers."""
        return self.added if self.base_frozen else self.root

    @property
    def trained_layer(self) -> int:
        """Trained numbers of one layer."""
        return self.adapters // self.layers if self.base_frozen else self.layer


def read_sizes(origin: Origin, recipe: Recipe) -> ModelSizes:
    """Return the sizes of the model that a training would build; config.json is enough.

    Raises:
        ConfigError: the recipe's adapters name layers that the model lacks.
        UnsupportedModel: the configuration does not name its layers and heads.
    """
    model, lora = empty_model(origin, recipe), recipe.lora
    rank, targets = _read_layers(origin, recipe)
    shape, text = model_shape(model.config), model.config.get_text_config()
    layers = decoder_layers(model)
    named = list(model.named_parameters())
    own = sum(p.numel() for name, p in named if not is_adapter(name) and not is_added(name))
    adapters = sum(p.numel() for name, p in named if is_adapter(name))
    added = [p for name, p in named if is_added(name)]
    in_layers = [(n, p) for layer in layers for n, p in layer.named_parameters()]
    in_layers = [(n, p) for n, p in in_layers if not is_adapter(n) and not is_added(n)]
    in_layer = sum(p.numel() for _, p in in_layers)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    return ModelSizes(
        layers=shape.num_layers,
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        width=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab=shape.vocab_size,
        layer=in_layer // shape.num_layers,
        root=own - in_layer,
        head=embedding.weight.numel(),
        tied=head is not None and head.weight is embedding.weight,
        linear=sum(p.numel() for _, p in in_layers if p.dim() == 2),
        trained=trained,
        frozen=own + adapters + sum(p.numel() for p in added) - trained,
        adapters=adapters,
        added=sum(p.numel() for p in added if p.requires_grad),
        rank=rank,
        dropout=0.0 if lora is None else lora.dropout,
        targets=targets,
        plain_head=has_plain_head(model),
    )


def _read_layers(origin: Origin, recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """Return the rank that adapters or blocks have, and the layers whose inputs backward needs."""
    if recipe.addition is not None:
        addition = addition_after(origin, recipe.addition, recipe.task)
        return addition.read_rank, addition.read_layers
    lora = recipe.lora
    targets = ALL_LINEAR if lora is None or lora.targets is None else lora.targets
    return 0 if lora is None else lora.rank, targets
