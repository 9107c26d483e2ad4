"""Models and tokenizers: from a local folder, back to one, and small ones made from nothing.

Only local folders and only safetensors: nothing is downloaded behind the user's back and no pickle
is opened. A checkpoint must cover the model: a weight that would be left at its random start is an
error. The tiny Llama and the byte tokenizer exist so that tests and the demo need no other files.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from seekr import attention as seekr_attention
from seekr.addition import seeing
from seekr.addition_files import load_addition
from seekr.collation import Batch
from seekr.errors import ConfigError, UnsupportedModel

AttentionName = Literal["seekr", "sdpa", "eager"]
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes head scores and targets are indexed by."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Read the sizes of a decoder with one attention layout in all layers (Llama, Mistral, Qwen).

    Raises:
        UnsupportedModel: the configuration does not name its layers and heads.
    """
    text = config.get_text_config()
    layers, heads = (
        getattr(text, key, None) for key in ("num_hidden_layers", "num_attention_heads")
    )
    if not isinstance(layers, int) or not isinstance(heads, int):
        raise UnsupportedModel(
            f"model type {config.model_type!r} has no integer num_hidden_layers and "
            "num_attention_heads; a decoder with self-attention is needed (Llama, Mistral, Qwen): "
            "use another model"
        )
    return ModelShape(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
    )


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    attention: AttentionName = "seekr",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from a local folder, in evaluation mode, on the CPU.

    An addition that lies beside its weights is attached (`seekr.addition`).

    Args:
        path: Folder with config.json and safetensors weights.
        dtype: Type of the weights in memory, whatever it is on disk.
        attention: "seekr" can be probed; "sdpa" and "eager" are transformers' own.
        trust_remote_code: Run Python code shipped in the folder.

    Raises:
        ConfigError: no such folder, no safetensors weights in it, or weights the model lacks.
    """
    folder = _model_folder(path)
    check_weights(folder)
    if attention == "seekr":
        seekr_attention.register()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"model folder {folder} lacks {len(missing)} weights of {type(model).__name__}, the "
            f"first is {missing[0]!r}; all are needed, or they would be random: use a complete "
            "checkpoint (a bare adapter is not a model)"
        )
    load_addition(model, folder)
    return model


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    folder = _model_folder(path)
    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"model folder {folder} has no tokenizer_config.json; the tokenizer is expected beside "
            "the weights: copy its files there"
        )
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_remote_code
    )


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write config.json, safetensors weights and the tokenizer into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model_folder(path: str | Path) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "no folder"
        raise ConfigError(
            f"model path {str(path)!r} is {found}; a local folder in Hugging Face layout is "
            "needed: download the model (hf download NAME --local-dir DIR) and give that folder"
        )
    return folder


def check_weights(folder: Path) -> None:
    """Raise ConfigError unless there is one safetensors file, or an index and all its shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ConfigError(
                f"model folder {folder} lacks {len(absent)} of {len(shards)} weight files, the "
                f"first is {absent[0]!r}; all are needed: download the model again"
            )
    elif not (folder / "model.safetensors").is_file():
        pickles = sorted(item.name for item in folder.glob("*.bin"))
        found = f"only pickle weights ({pickles[0]})" if pickles else "no weights"
        raise ConfigError(
            f"model folder {folder} has {found}; model.safetensors is needed, pickle is never "
            "loaded: convert the weights to safetensors"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer whose tokens are the 256 bytes, after <pad> = 0 and <eos> = 1.

    Byte b has id b + 2. It is lossless on any text, and needs neither training nor files.
    """
    vocab = {PAD_TOKEN: 0, EOS_TOKEN: 1}
    vocab |= {letter: byte + 2 for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> list[str]:
    """Return the printable letter GPT-2's byte-level scheme gives each byte, in byte order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def tiny_llama(
    vocab_size: int = 258,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    max_positions: int = 1024,
) -> LlamaForCausalLM:
    """Build a random Llama with grouped-query attention; a pure function of its arguments.

    Token ids 0 and 1 are padding and EOS as in `byte_tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    batch_prompts: Batch,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> list[list[int]]:
    """Continue left-padded prompts greedily, with none of the model's own sampling defaults.

    Args:
        batch_prompts: From `collate_prompts`, on the model's device.
        max_new_tokens: Limit of the continuation; it ends earlier at EOS.

    Returns:
        Per row the new token ids, without EOS and padding.
    """
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    generator: Any = model  # transformers' generate() has no usable type
    was_training, own_settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # transformers would fill gaps from the model's
    try:
        with seeing(model, batch_prompts):
            ids_BT = generator.generate(
                input_ids=batch_prompts.input_ids_BT,
                attention_mask=batch_prompts.attention_mask_BT,
                generation_config=settings,
            )
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    width = batch_prompts.input_ids_BT.shape[1]
    return [_until(ids[width:].tolist(), eos_id) for ids in ids_BT]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
