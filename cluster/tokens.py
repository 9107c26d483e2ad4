"""Ray's token: where it comes from, and how it reaches a cluster. It is held in memory alone.

A cluster that asks for a token refuses whoever has none or another one. The token is looked up as Ray
itself does it: `RAY_AUTH_TOKEN`, the file that `RAY_AUTH_TOKEN_PATH` names, `~/.ray/auth_token`; or it is
read from a Kubernetes Secret. It goes into a header and nowhere else, and its type hides it from logs.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from seekr.errors import ConfigError, SeekrError

SECRET_KEY = "auth_token"
"""Under which KubeRay keeps the token in a Secret."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def token_of(environment: Mapping[str, str]) -> SecretStr | None:
    """Return the token that an environment holds or points to, None if there is none.

    Raises:
        ConfigError: the file that it names cannot be read, or is empty.
    """
    if text := environment.get("RAY_AUTH_TOKEN", "").strip():
        return SecretStr(text)
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named or environment.get("HOME", "~")).expanduser()
    path = path if named else path / ".ray" / "auth_token"
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH names {path}, which cannot be read ({type(error).__name__}); correct it, "
            "or unset it to use ~/.ray/auth_token"
        ) from error
    if not text and named:
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH names {path}, which is empty; write the token into it"
        )
    return SecretStr(text) if text else None


def token_in(secret: Mapping[str, Any]) -> SecretStr:
    """Return the token that a Kubernetes Secret holds.

    Raises:
        SeekrError: it holds none.
    """
    name = secret.get("metadata", {}).get("name", "")
    encoded = (secret.get("data") or {}).get(SECRET_KEY)
    if encoded is None:
        keys = ", ".join(secret.get("data") or {}) or "none"
        raise SeekrError(
            f"Secret {name} has no key {SECRET_KEY}, under which Ray's token is kept; its keys are: {keys}"
        )
    try:
        return SecretStr(base64.b64decode(encoded, validate=True).decode().strip())
    except (binascii.Error, UnicodeDecodeError) as error:
        raise SeekrError(
            f"Secret {name}: what stands under {SECRET_KEY} is no text; make the Secret anew"
        ) from error


def headers(token: SecretStr | None) -> dict[str, str]:
    """Return the header that carries a token."""
    return {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}


def in_clear(address: str, token: SecretStr | None) -> bool:
    """Whether a token would cross a network where others may read it."""
    parts = urlsplit(address)
    return token is not None and parts.scheme == "http" and parts.hostname not in _LOOPBACK
