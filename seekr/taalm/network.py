"""Train-Attention: a decoder with a scalar head that gives every token of a document its weight.

The body is a causal language model without its output layer; the head reads each token's last hidden
state. A token's weight is made from the tokens up to and including itself, and belongs to it as a
label: to the loss of predicting it from those before. The head starts at a bias of 4 and next to no
slope, so all weights start near sigmoid(4) = 0.982: the plain language-model loss.

Shape suffixes: B batch, T tokens, H hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from seekr import attention as seekr_attention
from seekr.addition_files import read_addition
from seekr.collation import Batch
from seekr.errors import ConfigError
from seekr.forward import model_inputs
from seekr.models import AttentionName, check_weights, load_model
from seekr.softmax import exact_dtype
from seekr.taalm.adapters import adapter_tensors, add_adapters, plain_tensors
from seekr.taalm.weighted import counted
from seekr.training.settings import Lora

SPEC, TENSORS = "train_attention.json", "train_attention.safetensors"
HEAD_BIAS, HEAD_DEVIATION = 4.0, 0.001
_HEAD = "head."


class TrainAttention(nn.Module):
    """phi: from a document to one weight in (0, 1) per token. In evaluation mode, on the CPU.

    What has `requires_grad` is trained: the head, and the body's adapters or else all its weights.

    Args:
        body: A decoder without output layer; taken over, not copied.
        lora: Adapters that the body gets; None trains all its weights.
        seed: Of the head's and the adapters' start.

    Raises:
        ConfigError: the adapters name layers that the body lacks.
    """

    def __init__(self, body: PreTrainedModel, lora: Lora | None = None, seed: int = 0) -> None:
        super().__init__()
        self.body, self.lora = body.requires_grad_(True), lora
        if lora is not None:
            add_adapters(body, lora, f"{seed}/train-attention")
        width = int(body.config.get_text_config().hidden_size)
        # nn.Linear would draw its own start from the global generator, and move it.
        with torch.random.fork_rng(devices=[]):
            self.head = nn.Linear(width, 1, dtype=exact_dtype(body.dtype))
        weight_H = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.head.weight.copy_(HEAD_DEVIATION * weight_H)
            self.head.bias.fill_(HEAD_BIAS)
        self.eval()

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attention: AttentionName = "sdpa",
        lora: Lora | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> TrainAttention:
        """Make an untrained one from the folder of a causal language model.

        Raises:
            ConfigError: as `seekr.models.load_model`, or something is attached to the model.
        """
        if read_addition(Path(folder)) is not None:
            raise ConfigError(
                f"model folder {folder} holds a model with prompts or blocks attached; "
                "Train-Attention starts from a plain model: use the base model"
            )
        model = load_model(
            folder, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
        )
        body: Any = model.base_model
        return cls(body, lora, seed)

    def forward(self, batch: Batch) -> Tensor:
        """Return the weights [B,T] of a batch's labels, in float32 or better, on its device.

        weights_BT[b, t] weighs the loss of token t as a label. It is 0 where there is none, on
        prompts and padding.
        """
        hidden_BTH = self.body(**model_inputs(batch), use_cache=False).last_hidden_state
        logits_BT = self.head(hidden_BTH.to(self.head.weight.dtype)).squeeze(-1)
        return torch.where(counted(batch.labels_BT), logits_BT.sigmoid(), 0.0)

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, from which it comes back to the same bits.

        config.json and model.safetensors are the body in Hugging Face layout, as it was without
        adapters; head and adapters lie beside it. A tokenizer can be saved into the same folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.body.save_pretrained(folder, state_dict=plain_tensors(self.body))
        tensors = adapter_tensors(self.body)
        tensors |= {f"{_HEAD}{name}": value for name, value in self.head.state_dict().items()}
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / TENSORS)
        lora = None if self.lora is None else asdict(self.lora)
        spec = {"lora": lora, "dtype": str(self.body.dtype).removeprefix("torch.")}
        (folder / SPEC).write_text(json.dumps(spec, indent=1))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        attention: AttentionName = "sdpa",
        trust_remote_code: bool = False,
    ) -> TrainAttention:
        """Load what `save` wrote, in the dtype it had.

        Raises:
            ConfigError: the folder holds no Train-Attention, or not all of its weights.
        """
        folder = Path(folder)
        if not (folder / SPEC).is_file():
            raise ConfigError(
                f"folder {str(folder)!r} has no {SPEC}; a trained Train-Attention is needed here: "
                "train one, or give the folder that TrainAttention.save wrote"
            )
        check_weights(folder)
        spec: dict[str, Any] = json.loads((folder / SPEC).read_text())
        lora = _lora_of(spec["lora"])
        body = _load_body(folder, getattr(torch, spec["dtype"]), attention, trust_remote_code)
        phi = cls(body, lora)
        saved = load_file(folder / TENSORS)
        own = adapter_tensors(body) | {f"{_HEAD}{n}": p for n, p in phi.head.state_dict().items()}
        if saved.keys() != own.keys():
            odd = sorted(saved.keys() ^ own.keys())[0]
            raise ConfigError(
                f"{folder / TENSORS} does not fit its model, the first odd tensor is {odd!r}; "
                "adapters and head of one training are needed: copy the folder again, as a whole"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        return phi


def _lora_of(values: Mapping[str, Any] | None) -> Lora | None:
    if values is None:
        return None
    targets = values["targets"]
    return Lora(**{**values, "targets": None if targets is None else tuple(targets)})


def _load_body(
    folder: Path, dtype: torch.dtype, attention: AttentionName, trust_remote_code: bool
) -> PreTrainedModel:
    if attention == "seekr":
        seekr_attention.register()
    loaded: Any = AutoModel.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    body, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"folder {folder} lacks {len(missing)} weights of {type(body).__name__}, the first is "
            f"{missing[0]!r}; all are needed, or they would be random: copy the folder again"
        )
    return body


class Tokenizer(Protocol):
    """What is compared of a tokenizer."""

    name_or_path: str

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...


def check_same_tokenizer(own: Tokenizer, learner: Tokenizer) -> None:
    """Check that Train-Attention and the model it weighs tokens for read the same tokens.

    The padding token may differ: padding is never seen.

    Raises:
        ConfigError: they differ in a token's id or in a special token.
    """
    theirs = (
        f"of Train-Attention ({own.name_or_path!r})",
        f"of the model ({learner.name_or_path!r})",
    )
    vocabularies = own.get_vocab(), learner.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        odd = vocabularies[0].items() ^ vocabularies[1].items()
        token = min(odd, key=lambda item: (item[1], item[0]))[0]
        found = [str(vocabulary.get(token, "absent")) for vocabulary in vocabularies]
        what = f"token {token!r} is {found[0]} and {found[1]}"
    else:
        specials = [
            {
                name: str(token)
                for name, token in one.special_tokens_map.items()
                if name != "pad_token"
            }
            for one in (own, learner)
        ]
        if specials[0] == specials[1]:
            return
        name = min(specials[0].items() ^ specials[1].items())[0]
        what = f"{name} is {specials[0].get(name)!r} and {specials[1].get(name)!r}"
    raise ConfigError(
        f"the tokenizers {theirs[0]} and {theirs[1]} differ: {what}. Weights belong to tokens, so both "
        "need the same vocabulary and special tokens: start Train-Attention from a model of the same "
        "family"
    )
