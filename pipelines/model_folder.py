"""A model's folder, looked at before anything is loaded from it: config, weight files, tokenizer.

Whatever a download can leave behind (a pickle, a missing shard, a Git LFS pointer in place of the
weights, a broken JSON) becomes one sentence with what to do. Only headers of weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from seekr.errors import ConfigError
from seekr.models import load_tokenizer

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_model_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Read config.json, after a look at the weights that must lie beside it.

    Raises:
        ConfigError: something is missing, damaged, or wants code to be run that is not trusted.
    """
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder, or does not exist"
        raise ConfigError(
            f"model.path {folder} {found}; a local folder in the Hugging Face layout is needed: "
            "correct the path, or download the model (hf download NAME --local-dir FOLDER)"
        )
    for weights in _weight_files(folder):
        _check_weights(weights)
    _refuse_code(folder, "config.json", trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises what its parsers and model code raise
        raise _unusable(folder, "config.json", error) from error


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    Raises:
        ConfigError: it is missing, damaged, or wants code to be run that is not trusted.
    """
    _refuse_code(folder, "tokenizer_config.json", trust_remote_code)
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"model.path: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise _unusable(folder, "tokenizer", error) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        shards = _read_json(folder, _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise _unusable(folder, _INDEX, ValueError("it has no weight_map"))
        files = [folder / name for name in sorted(set(shards.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ConfigError(
                f"model.path {folder} lacks {len(absent)} of {len(files)} weight files, the first "
                f"is {absent[0]}; all are needed: download the model again"
            )
        return files
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"model.path {folder} has pickled weights only ({pickles[0]}); {_SINGLE} is needed, "
            "since a pickle can run code and is never loaded: convert the weights to safetensors"
        )
    raise ConfigError(
        f"model.path {folder} has no weights; {_SINGLE}, or shards with {_INDEX}, are needed: "
        "download the model again (an adapter alone is not a model)"
    )


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, "numpy"):
            return
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"model.path {file.parent}: {file.name} has {file.stat().st_size} bytes and is not a "
            f"whole safetensors file ({error}); download it again, with `git lfs pull` in a clone"
        ) from error


def _refuse_code(folder: Path, name: str, trust_remote_code: bool) -> None:
    if trust_remote_code or not (folder / name).is_file():
        return
    wanted = _read_json(folder, name).get("auto_map")
    if wanted:
        raise ConfigError(
            f"model.path {folder}: {name} wants its own Python code to be run (auto_map) and "
            "model.trust_remote_code is false; read that code, then set it to true, or use a model "
            "that transformers knows"
        )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _unusable(folder, name, error) from error
    if not isinstance(value, dict):
        raise _unusable(folder, name, ValueError("it is not a JSON object"))
    return value


def _unusable(folder: Path, what: str, error: Exception) -> ConfigError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ConfigError(
        f"model.path {folder}: {what} cannot be used: {reason}; repair it or download it again"
    )
