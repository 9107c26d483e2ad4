"""By which ids a row of a source is known to a store: what forgetting it has to look for."""

from __future__ import annotations

from pipelines.forgotten import ForgottenRows, quarantined_id
from pipelines.rows import EXCERPT_CHARS, BadRow, SourceRow
from seekr.prompts import document_id_of, row_id_of


def ids_of(row: SourceRow | BadRow) -> tuple[str, ...]:
    """Return all ids under which a row may be forgotten, the one that people are shown first.

    A usable row has its own, and the one that quarantine gives it where it cannot be encoded: there only
    the beginning of its input is known.
    """
    if isinstance(row, BadRow):
        return (quarantined_id(row.text),)
    if not row.input:
        return (document_id_of(row.references[0], row.focus),)
    own = row_id_of(row.input, row.references, row.definition)
    return own, quarantined_id(row.input[:EXCERPT_CHARS])


def is_forgotten(row: SourceRow | BadRow, forgotten: ForgottenRows) -> bool:
    """Return whether a row is to be left out."""
    return bool(forgotten.dates) and any(map(forgotten.holds, ids_of(row)))
