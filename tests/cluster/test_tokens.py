"""Where Ray's token comes from, and that it shows nowhere."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from pydantic import SecretStr

from cluster.tokens import headers, in_clear, token_in, token_of
from seekr.errors import ConfigError, SeekrError

WORD = "a-token-of-letters"


def value(token: SecretStr | None) -> str | None:
    return None if token is None else token.get_secret_value()


def test_a_token_is_looked_up_as_ray_does(tmp_path: Path) -> None:
    home, named = tmp_path / ".ray" / "auth_token", tmp_path / "named"
    environment = {"HOME": str(tmp_path)}
    assert token_of(environment) is None
    home.parent.mkdir()
    home.write_text("of home\n")
    assert value(token_of(environment)) == "of home"
    named.write_text("of the path\n")
    environment["RAY_AUTH_TOKEN_PATH"] = str(named)
    assert value(token_of(environment)) == "of the path"
    environment["RAY_AUTH_TOKEN"] = " of the environment "
    assert value(token_of(environment)) == "of the environment"


def test_a_file_that_is_named_and_holds_no_token_is_told(tmp_path: Path) -> None:
    path = tmp_path / "token"
    environment = {"RAY_AUTH_TOKEN_PATH": str(path), "HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match="cannot be read"):
        token_of(environment)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        token_of(environment)


def test_a_token_comes_out_of_a_secret() -> None:
    data = {"auth_token": base64.b64encode(WORD.encode()).decode()}
    assert value(token_in({"metadata": {"name": "ray"}, "data": data})) == WORD


def test_a_secret_without_a_token_is_told_and_not_shown() -> None:
    with pytest.raises(SeekrError, match="its keys are: password"):
        token_in({"metadata": {"name": "ray"}, "data": {"password": "cGFzcw=="}})
    with pytest.raises(SeekrError) as told:
        token_in({"metadata": {"name": "ray"}, "data": {"auth_token": "not base64!"}})
    assert "not base64!" not in str(told.value)


def test_a_token_shows_in_its_header_alone() -> None:
    token = SecretStr(WORD)
    assert headers(token) == {"Authorization": f"Bearer {WORD}"}
    assert headers(None) == {}
    assert WORD not in f"{token} {token!r}"


@pytest.mark.parametrize(
    ("address", "clear"),
    [
        ("http://head:8265", True),
        ("https://head:8265", False),
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("http://[::1]:8265", False),
    ],
)
def test_a_token_on_an_open_network_is_noticed(address: str, clear: bool) -> None:
    assert in_clear(address, SecretStr(WORD)) is clear
    assert not in_clear(address, None)
