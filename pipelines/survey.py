"""What the world holds before a run: digests of model, tokenizer and data, and whether all of it fits.

Everything that can be known to be wrong is found here, before Ray starts and before anything is
written: a missing file, a bad row, a budget above what the model has, a sequence that the template
alone would fill. Files are read once; their digests and reports are cached by size and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipelines.config import StreamConfig
from pipelines.data_config import DataConfig, TaskConfig
from pipelines.fingerprint import canonical_json, file_digest, fingerprint, folder_digest
from pipelines.inspection import SourceReport, TakenFor, as_is, inspect, require_good
from pipelines.labels import REVIEW
from pipelines.model_folder import read_model_config, read_tokenizer
from pipelines.pool_config import GeneralConfig
from pipelines.readers import read_source
from pipelines.rows import Columns, SourceRow
from pipelines.section import identity
from pipelines.sources import Layout
from pipelines.survey_documents import probe_digest, weighing
from pipelines.train_config import training_execution
from pipelines.transfer import cache_folder
from seekr.attention import check_probeable
from seekr.errors import ConfigError, DataError, SeekrError
from seekr.methods.seekr import SEEKR
from seekr.models import ModelShape, model_shape
from seekr.prompts import DEFAULT_TEMPLATES, Template, check_limits, check_vocabulary
from seekr.sampling import replay_size
from seekr.training.optimizers import check_optimizer
from seekr.training.settings import Recipe

_T = TypeVar("_T")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """One task's sources and what follows from them. `num_train` is after any limit."""

    train: SourceReport
    test: SourceReport | None
    template: str
    num_train: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What identifies a stream's outside inputs, and what about them deserves a second look.

    Attributes:
        harness: version of lm-eval, where general ability is asked for; definitions: digest of the
            folder with one's own tasks for it.
        probes: digests of sets of sentences that are scored; weighing: of what says which tokens count.
        warnings: sentences.
    """

    model_digest: str
    tokenizer_digest: str
    shape: ModelShape
    tasks: dict[str, TaskFacts]
    harness: str | None = None
    definitions: str | None = None
    probes: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    weighing: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    warnings: tuple[str, ...] = ()


def survey(config: StreamConfig, taken_for: TakenFor = as_is) -> Facts:
    """Look at everything a stream names and check that it fits together.

    Args:
        taken_for: what a source counts as, given a task, train or test, and what the source holds.

    Raises:
        ConfigError, DataError: with all problems found, one after the other.
    """
    folder = Path(config.model.path)
    trust = config.model.trust_remote_code
    problems = _Problems()
    model = problems.collect(lambda: read_model_config(folder, trust))
    tokenizer = model and problems.collect(lambda: read_tokenizer(folder, trust))
    if model and tokenizer:
        problems.collect(lambda: check_vocabulary(tokenizer, model))
    shape = model and problems.collect(lambda: model_shape(model))
    if model and shape:
        problems.collect(lambda: _check_method(config, model, shape))
    for check in _training_checks(config, folder if model else None):
        problems.collect(check)
    facts: dict[str, TaskFacts] = {}
    for task in config.sources:
        look = _TaskLook(config, task, problems, taken_for)
        if model:
            problems.collect(lambda look=look: look.check_length(model))
        found = look.facts()
        if found is not None:
            facts[task.name] = found
        if found is not None and tokenizer:
            problems.collect(lambda look=look, found=found: look.check_template(found, tokenizer))
    probes = {
        item.name: digest
        for item in config.probes
        if (digest := problems.collect(lambda item=item: probe_digest(config, item)))
    }
    looked_at = problems.collect(lambda: weighing(config))
    cache = cache_folder() / "digests.json"
    harness = definitions = None
    if config.general.asked:
        harness = problems.collect(lambda: _harness(config.general))
        if config.general.folder is not None:
            own = config.general.folder
            definitions = problems.collect(lambda: folder_digest(own, cache))
    problems.raise_any()
    assert shape is not None
    return Facts(
        model_digest=folder_digest(folder, cache),
        tokenizer_digest=_tokenizer_digest(folder, cache),
        shape=shape,
        tasks=facts,
        harness=harness,
        definitions=definitions,
        probes=probes,
        weighing=looked_at or {},
        warnings=tuple(_repeated_sources(facts)),
    )


def _harness(asked: GeneralConfig) -> str:
    from pipelines.general import check_tasks, harness_version

    version = harness_version()
    if asked.folder is not None and not asked.folder.is_dir():
        raise ConfigError(
            f"general.folder {asked.folder} is no folder; give the one that holds the definitions"
        )
    check_tasks(asked.tasks, asked.folder)
    return version


def _repeated_sources(facts: dict[str, TaskFacts]) -> Iterator[str]:
    """Yield a sentence per group of sources with the same content: scores would not mean much."""
    places: dict[str, list[str]] = {}
    for name, task in facts.items():
        for part, report in (("train", task.train), ("test", task.test)):
            if report is not None:
                places.setdefault(report.digest, []).append(f"tasks.{name}.{part}")
    for same in places.values():
        if len(same) > 1:
            yield (
                f"{', '.join(same[:-1])} and {same[-1]} have the same content; a test set that is "
                "also trained on, or two tasks that are one, say nothing about retention: check the "
                "paths"
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


def _training_checks(config: StreamConfig, folder: Path | None) -> Iterator[Callable[[], None]]:
    """Yield what workers would find out only after they have started."""
    train = config.train
    if train.strategy == "fsdp":
        from seekr.training.fsdp import check_fsdp

        yield lambda: check_fsdp(training_execution(train))
    if train.strategy == "deepspeed":
        from seekr.training.zero import check_zero

        yield lambda: check_zero(training_execution(train))
    settings = identity(train) | {"dtype": config.model.dtype}
    recipe = Recipe.of(settings, addition=config.method.addition)
    yield lambda: check_optimizer(recipe, train.strategy)
    if recipe.frozen and folder is not None:
        from seekr.training.build import Origin, check_adapters

        origin = Origin(folder=folder, trust_remote_code=config.model.trust_remote_code)
        yield lambda: check_adapters(origin, recipe)


class _TaskLook:
    """One task's sources and options, looked at."""

    def __init__(
        self, config: StreamConfig, task: TaskConfig, problems: _Problems, taken_for: TakenFor
    ) -> None:
        self._config, self._task, self._problems = config, task, problems
        self._taken_for = taken_for
        self._options = config.options(task)
        columns = Columns(**self._options.columns.model_dump())
        self._columns = {"train": columns, "test": columns.of_questions}
        self._parts = ("train", "test") if task.test is not None else ("train",)

    def check_length(self, model: PretrainedConfig) -> None:
        positions = getattr(model.get_text_config(), "max_position_embeddings", None)
        vectors = self._config.virtual_tokens
        if isinstance(positions, int) and self._options.max_length + vectors > positions:
            beside = f", before which {vectors} vectors of prompts are put," if vectors else ""
            raise ConfigError(
                f"task {self._task.name}: max_length is {self._options.max_length}{beside} and the "
                f"model has {positions} positions; lower data.max_length or the task's own"
            )

    def facts(self) -> TaskFacts | None:
        """Return what the sources hold, None if one of them cannot be used."""
        reports = {
            part: report
            for part in self._parts
            if (report := self._problems.collect(lambda part=part: self._report(part)))
        }
        if len(reports) < len(self._parts):
            return None
        train = reports["train"]
        num_train = min(train.num_rows, self._options.train_rows or train.num_rows)
        held_out = self._options.validation_rows or 0
        self._problems.collect(lambda: self._check_validation(num_train, held_out))
        num_train -= held_out
        if self._config.method.needs.replay and num_train > 0:
            self._problems.collect(lambda: self._check_replay(num_train))
        template = _template(self._options, train)
        return TaskFacts(
            train=train, test=reports.get("test"), template=template, num_train=num_train
        )

    def check_template(self, facts: TaskFacts, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the template can be filled and leaves room for the input, if rows are asked."""
        options = self._options
        asked = [part for part in self._parts if self._columns[part].text is None]
        if not asked:
            return
        try:
            template = Template.parse(facts.template)
            check_limits(template, tokenizer, options.max_length, options.max_answer_length)
        except ConfigError as error:
            raise ConfigError(f"task {self._task.name}: {error}") from error
        borrows = self._config.method.needs.replay and self._config.replay.borrowed is not None
        if borrows and not template.wants_definition and not "".join(template.literals).strip():
            raise ConfigError(
                f"task {self._task.name}: its template {facts.template!r} has no instruction apart "
                "from the input, so replay.borrowed has nothing to put around other inputs; write the "
                "instruction into the task's template, or set replay.borrowed to null"
            )
        for part in asked if template.wants_definition else ():
            rows = read_source(getattr(self._task, part), self._columns[part])
            first = next(row for row in rows if isinstance(row, SourceRow))
            if first.definition is None:
                raise DataError(
                    f"tasks.{self._task.name}.{part}: {first.file}:{first.line} has no definition "
                    "and the template asks for one with {definition}; set columns.definition to "
                    "the column that holds it, or remove {definition} from the template"
                )

    def _report(self, part: str) -> SourceReport:
        what = f"tasks.{self._task.name}.{part}"
        if self._task.name == REVIEW:
            what = "replay.review"
        try:
            report = inspect(
                getattr(self._task, part), self._columns[part], cache_dir=cache_folder() / "sources"
            )
        except DataError as error:
            raise DataError(f"{what}: {error}") from error
        report = self._taken_for(self._task.name, part, report)
        require_good(report, self._options.max_bad_share, what)
        return report

    def _check_validation(self, num_train: int, held_out: int) -> None:
        name = f"task {self._task.name}"
        if held_out >= num_train:
            raise ConfigError(
                f"{name}: validation_rows is {held_out} and there are {num_train} training rows; "
                f"1..{num_train - 1} is allowed: lower it"
            )
        if not held_out and self._config.evaluate.split == "validation":
            raise ConfigError(
                f"{name}: evaluate.split is validation and validation_rows is null; set "
                "data.validation_rows, which are held out of the training rows"
            )

    def _check_replay(self, num_train: int) -> None:
        replay = self._config.replay
        try:
            replay_size(num_train, replay.ratio, replay.rows)
        except ConfigError as error:
            raise ConfigError(f"task {self._task.name}: {error}") from error


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
