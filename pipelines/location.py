"""From a root URI to a file system: what `store.py` needs to know before it can move a byte.

One place parses URIs, so one place knows what is secret in them. A location can be shown, compared
and checked for writing; it has no verbs of its own.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from pipelines.provenance import redact
from seekr.errors import StoreError

ALLOWED: Final = "a local path, file://, s3:// or gs://"
_SHORTEST_SECRET: Final = 4  # shorter ones occur in ordinary words; they only exist in demos


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A root on a file system.

    Attributes:
        uri: what opens it again; may hold credentials, never show it.
        shown: the same place without credentials and options, for messages and records.
        filesystem: the pyarrow file system.
        root: path of the root on it.
        is_local: whether the root is a folder of this machine.
        secrets: parts of `uri` that must not appear anywhere.
    """

    uri: str
    shown: str
    filesystem: fs.FileSystem
    root: str
    is_local: bool
    secrets: tuple[str, ...] = ()

    def redact(self, text: str) -> str:
        """`text` without credentials, whatever the underlying library put into it."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return redact(text)


def locate(uri: str | os.PathLike[str]) -> Location:
    """Parses a root URI and builds its file system. Touches nothing.

    Raises:
        StoreError: the scheme is not supported or the URI cannot be parsed.
    """
    text = os.fspath(uri)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("", "file"):
        return _local(unquote(urlsplit(text).path) if scheme else text)
    if scheme not in ("s3", "gs"):
        raise StoreError(f"store {redact(text)!r}: unknown scheme {scheme}://. Allowed: {ALLOWED}.")
    parts = urlsplit(text)
    try:
        filesystem, root = fs.FileSystem.from_uri(
            _with_small_puts(text) if scheme == "s3" else text
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(
            f"store {redact(text)!r}: the URI cannot be used: {redact(str(error))}. Characters "
            "such as '/' or '+' in a key or secret must be percent-encoded; options follow a '?'."
        ) from None  # the cause would repeat the secret in a traceback
    credentials = [word for word in (parts.username, parts.password) if word]
    secrets = {*credentials, *map(unquote, credentials)}
    host = parts.netloc.rpartition("@")[2]
    return Location(
        uri=text,
        shown=f"{scheme}://{host}{unquote(parts.path).rstrip('/')}",
        filesystem=filesystem,
        root=root.rstrip("/"),
        is_local=False,
        secrets=tuple(word for word in secrets if len(word) >= _SHORTEST_SECRET),
    )


def check_writable(location: Location) -> None:
    """Proves that files can be created and removed below the root, and leaves no file behind.

    A local check uses a nameless temporary file in the nearest folder that exists, so the root
    itself is not created. An object store gets one object that is deleted again; pyarrow keeps an
    empty marker for the folder, as it does after every deletion.

    Raises:
        StoreError: with what was tried and what the file system answered.
    """
    if location.is_local:
        folder = Path(location.root)
        while not os.path.lexists(folder):
            folder = folder.parent
        tried = f"creating a file in {folder}"
        try:
            if not folder.is_dir():
                raise NotADirectoryError(f"{folder} is not a folder")
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"seekr")
        except OSError as error:
            raise _unwritable(location, tried, error) from error
        return
    probe = f"{location.root}/.seekr-probe-{uuid4().hex}"
    tried = f"writing and deleting the object {probe}"
    try:
        with location.filesystem.open_output_stream(probe) as stream:
            stream.write(b"seekr")
        location.filesystem.delete_file(probe)
    except (OSError, pa.ArrowException) as error:
        raise _unwritable(location, tried, error) from None


def _unwritable(location: Location, tried: str, error: Exception) -> StoreError:
    return StoreError(
        f"store {location.shown}: cannot be written. Tried {tried}: {location.redact(str(error))}. "
        "Check that the place exists, the credentials, and for an object store region and "
        "endpoint_override."
    )


def _local(path: str) -> Location:
    root = os.path.abspath(os.path.expanduser(path)).rstrip("/") or "/"
    # An absolute path: a worker that opens the store again may have another working directory.
    return Location(uri=root, shown=root, filesystem=fs.LocalFileSystem(), root=root, is_local=True)


def _with_small_puts(uri: str) -> str:
    """Asks pyarrow for one PUT per small object, instead of a multipart upload of three requests.

    It is also what makes an object's time stamp the time of its writing: a multipart upload is
    dated by its beginning.
    """
    if "allow_delayed_open" in parse_qs(urlsplit(uri).query):
        return uri
    return uri + ("&" if urlsplit(uri).query else "?") + urlencode({"allow_delayed_open": "true"})
