"""What the world holds before a run: digests of model, tokenizer and data, and whether all of it fits.

Everything that can be known to be wrong is found here, before Ray starts and before anything is
written: a missing file, a bad row, a budget above what the model has, a sequence that the template
alone would fill. Files are read once; their digests and reports are cached by size and time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from pipelines.config import DataConfig, StreamConfig, TaskConfig
from pipelines.fingerprint import canonical_json, file_digest, fingerprint, folder_digest
from pipelines.inspection import SourceReport, inspect, require_good
from pipelines.rows import Columns
from pipelines.sources import Layout
from pipelines.transfer import cache_folder
from seekr.attention import check_probeable
from seekr.errors import ConfigError, DataError, SeekrError
from seekr.methods.seekr import SEEKR
from seekr.models import ModelShape, load_tokenizer, model_shape
from seekr.prompts import DEFAULT_TEMPLATES, Template, check_limits, check_vocabulary
from seekr.sampling import replay_size

_T = TypeVar("_T")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """One task's sources and what follows from them. `num_train` is after any limit."""

    train: SourceReport
    test: SourceReport
    template: str
    num_train: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What identifies a stream's outside inputs."""

    model_digest: str
    tokenizer_digest: str
    shape: ModelShape
    tasks: dict[str, TaskFacts]


def survey(config: StreamConfig) -> Facts:
    """Look at everything a stream names and check that it fits together.

    Raises:
        ConfigError, DataError: with all problems found, one after the other.
    """
    folder = Path(config.model.path)
    model = _model_config(folder, config.model.trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    check_vocabulary(tokenizer, model)
    shape = model_shape(model)
    problems = _Problems()
    problems.collect(lambda: _check_method(config, model, shape))
    facts: dict[str, TaskFacts] = {}
    for task in config.tasks:
        options = config.options(task)
        problems.collect(lambda t=task, o=options: _check_length(t, o, model))
        found = problems.collect(lambda t=task, o=options: _task_facts(config, t, o, tokenizer))
        if found is not None:
            facts[task.name] = found
    problems.raise_any()
    cache = cache_folder() / "digests.json"
    return Facts(
        model_digest=folder_digest(folder, cache),
        tokenizer_digest=_tokenizer_digest(folder, cache),
        shape=shape,
        tasks=facts,
    )


class _Problems:
    """Collects errors so that one run tells all of them."""

    def __init__(self) -> None:
        self._found: list[SeekrError] = []

    def collect(self, check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except (ConfigError, DataError) as error:
            self._found.append(error)
            return None

    def raise_any(self) -> None:
        if not self._found:
            return
        kind = type(self._found[0])
        raise kind("\n".join(str(error) for error in self._found))


def _model_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        found = "is not a folder" if not folder.is_dir() else "has no config.json"
        raise ConfigError(
            f"model.path {folder} {found}; a local folder in the Hugging Face layout is needed: "
            "correct the path or download the model first"
        )
    if not any(file.name.endswith(_WEIGHT_SUFFIXES) for file in folder.iterdir()):
        raise ConfigError(
            f"model.path {folder} has no *.safetensors weights; pickled weights are never loaded: "
            "convert the model to safetensors"
        )
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path {folder}: config.json cannot be used: {error}") from error


def _check_method(config: StreamConfig, model: PretrainedConfig, shape: ModelShape) -> None:
    method = config.method
    if not isinstance(method, SEEKR):
        return
    check_probeable(model)
    if method.layer_budget > shape.num_layers:
        raise ConfigError(
            f"method.layer_budget is {method.layer_budget} and the model has {shape.num_layers} "
            f"layers; 1..{shape.num_layers} is allowed: lower it"
        )
    most = method.layer_budget * shape.num_heads
    if method.head_budget > most:
        raise ConfigError(
            f"method.head_budget is {method.head_budget} and {method.layer_budget} layers have "
            f"{most} heads; 1..{most} is allowed: lower it or raise method.layer_budget"
        )


def _check_length(task: TaskConfig, options: DataConfig, model: PretrainedConfig) -> None:
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and options.max_length > positions:
        raise ConfigError(
            f"task {task.name}: max_length is {options.max_length} and the model has {positions} "
            "positions; lower data.max_length or the task's own"
        )


def _task_facts(
    config: StreamConfig, task: TaskConfig, options: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TaskFacts:
    columns = Columns(**options.columns.model_dump())
    cache = cache_folder() / "sources"
    reports: dict[str, SourceReport] = {}
    for part, source in (("train", task.train), ("test", task.test)):
        try:
            reports[part] = inspect(source, columns, cache_dir=cache)
        except DataError as error:
            raise DataError(f"tasks.{task.name}.{part}: {error}") from error
        require_good(reports[part], options.max_bad_share, f"tasks.{task.name}.{part}")
    template = _template(options, reports["train"])
    num_train = min(reports["train"].num_rows, options.train_rows or reports["train"].num_rows)
    try:
        lengths = (options.max_length, options.max_answer_length)
        check_limits(Template.parse(template), tokenizer, *lengths)
        if config.method.needs.replay:
            replay_size(num_train, config.replay.ratio, config.replay.rows)
    except ConfigError as error:
        raise ConfigError(f"task {task.name}: {error}") from error
    return TaskFacts(
        train=reports["train"], test=reports["test"], template=template, num_train=num_train
    )


def _template(options: DataConfig, report: SourceReport) -> str:
    if options.template is not None:
        return options.template
    layouts = {file.layout for file in report.files}
    key = "natural_instructions" if layouts == {Layout.INSTRUCTIONS} else "plain"
    return DEFAULT_TEMPLATES[key]


def _tokenizer_digest(folder: Path, cache: Path) -> str:
    files = {
        name: file_digest(folder / name, cache)
        for name in _TOKENIZER_FILES
        if (folder / name).is_file()
    }
    return fingerprint(canonical_json(files))
