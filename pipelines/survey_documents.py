"""What a stream about documents names beside its tasks: sentences to score, pairs, networks; looked at.

Everything here is known before Ray starts: which columns the files have, how many of their rows can be
used, that two networks read text with one tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.config import StreamConfig
from pipelines.data_config import ProbeConfig
from pipelines.fingerprint import canonical_json, fingerprint, folder_digest
from pipelines.inspection import SourceReport, inspect, require_good
from pipelines.model_folder import read_model_config, read_tokenizer
from pipelines.rows import Columns
from pipelines.token_weights_config import MetaConfig, PairColumns
from pipelines.transfer import cache_folder
from seekr.errors import ConfigError, DataError


def probe_columns(item: ProbeConfig) -> Columns:
    """Return where a set of sentences has what; statements have their relation for a definition."""
    if item.statements:
        return Columns(input="subject", output="object", definition="relation")
    return Columns(input=item.sentence, output=item.answer)


def pair_columns(columns: PairColumns) -> Columns:
    """Return where pairs have what: the sentence is asked, the document defines it."""
    return Columns(input=columns.sentence, output=columns.answer, definition=columns.document)


def probe_digest(config: StreamConfig, item: ProbeConfig) -> str:
    """Look at a set of sentences; returns the digest of its files."""
    what = f"probes.{item.name}.data"
    return _report(item.data, probe_columns(item), what, config.data.max_bad_share).digest


def weighing(config: StreamConfig) -> dict[str, str]:
    """Look at what Train-Attention is or is made from; returns digests, by name.

    Raises:
        ConfigError: its tokenizer is another one, or documents are longer than a model can read.
        DataError: the pairs cannot be used.
    """
    weights = config.token_weights
    if weights is None or weights.by != "train_attention":
        return {}
    from seekr.taalm.network import check_same_tokenizer  # with it comes PEFT, which takes seconds

    cache = cache_folder() / "digests.json"
    found: dict[str, str] = {}
    for name, folder in (("network", weights.network), ("backbone", weights.model)):
        if folder is not None:
            read_model_config(folder, trust_remote_code=False)
            check_same_tokenizer(
                read_tokenizer(folder, trust_remote_code=False),
                read_tokenizer(config.model.path, config.model.trust_remote_code),
            )
            found[name] = folder_digest(folder, cache)
    if weights.trains_network:
        _check_length(config.model.path, config.model.trust_remote_code, weights.meta)
        if weights.model is not None:
            _check_length(weights.model, False, weights.meta)
        found |= _pairs(weights.meta, config.data.max_bad_share)
    return found


def _check_length(model: Path, trust_remote_code: bool, meta: MetaConfig) -> None:
    text = read_model_config(model, trust_remote_code).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and meta.max_length > positions:
        raise ConfigError(
            f"token_weights.meta.max_length is {meta.max_length} and the model {model.name} has "
            f"{positions} positions; lower it: the rest of a longer document is cut off"
        )


def _pairs(meta: MetaConfig, max_bad_share: float) -> dict[str, str]:
    columns = pair_columns(meta.columns)
    assert meta.pairs is not None
    report = _report(meta.pairs, columns, "token_weights.meta.pairs", max_bad_share)
    found = {"pairs": report.digest}
    if meta.exclude:
        name = "token_weights.meta.exclude"
        digests = [_report(s, columns, name, max_bad_share).digest for s in meta.exclude]
        found["exclude"] = fingerprint(canonical_json(sorted(digests)))
    return found


def _report(source: str | Path, columns: Columns, what: str, max_bad_share: float) -> SourceReport:
    try:
        report = inspect(source, columns, cache_dir=cache_folder() / "sources")
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    require_good(report, max_bad_share, what)
    return report
