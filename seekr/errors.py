"""Errors a user can act on.

Every message names the object, what was found, what is allowed and what to do next. The class decides
the exit code of the command line: a wrong configuration or wrong data is 2, everything else is 1. An
internal invariant that breaks is an ordinary exception, never one of these.
"""

from __future__ import annotations


class SeekrError(Exception):
    """Root of all errors that are part of the product. `exit_code` is what the CLI returns."""

    exit_code: int = 1


class ConfigError(SeekrError):
    """The stream's configuration cannot be run as written. Nothing was computed or written."""

    exit_code = 2


class DataError(SeekrError):
    """A source file is missing, empty, malformed beyond the allowed share, or does not fit the model."""

    exit_code = 2


class UnsupportedModel(ConfigError):
    """The model has an attention that cannot be probed exactly, or lacks something a method needs."""


class StoreError(SeekrError):
    """The artifact store cannot be read or written, or holds something that fails verification."""


class LeaseLost(SeekrError):
    """Another run took this stage over; whatever this process computed must not be committed."""
