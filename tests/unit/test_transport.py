"""What is said of secrets and documents that others can read on their way or where they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from jobs.redaction import secret_parts
from jobs.transport import clear_text, exposures
from models.settings import Settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("host", "address", "encrypted", "sslmode", "is_said"),
    [
        ("db.example", "198.51.100.7", False, "prefer", True), ("db.example", "198.51.100.7", False, "allow", True),
        ("db.example", "2001:db8::7", False, "prefer", True), ("198.51.100.7", "", False, "prefer", True),
        ("db.example", "198.51.100.7", True, "prefer", False), ("db.example", "198.51.100.7", False, "disable", False),
        ("localhost", "127.0.0.1", False, "prefer", False), ("mine.example", "127.0.0.1", False, "prefer", False),
        ("localhost", "::1", False, "prefer", False), ("/run/postgresql", "", False, "prefer", False),
    ],
)  # fmt: skip
def test_a_connection_in_the_clear_is_told_unless_it_stays_here_or_somebody_chose_it(
    host: str, address: str, encrypted: bool, sslmode: str, is_said: bool
) -> None:
    said = clear_text(host, address, encrypted=encrypted, sslmode=sslmode)
    assert (said is not None) == is_said
    assert said is None or (host in said and "verify-full" in said)


def test_a_key_over_plain_http_is_told_where_it_leaves_this_machine() -> None:
    key, hook = SecretStr("sk-0123456789"), SecretStr("http://chat.example/T0ken")
    exposed = Settings(
        embedding_provider="openai", embedding_api_key=key, embedding_base_url="http://vllm:8000/v1",
        extraction_provider="openai", extraction_api_key=key, extraction_base_url="http://127.0.0.1:8000/v1",
        llamaparse_api_key=key, llamaparse_base_url="http://parse.example", alert_webhook_url=hook,
    )  # fmt: skip
    found = list(exposures(exposed))
    assert [words.partition(" ")[0] for words in found] == ["EMBEDDING_API_KEY", "ALERT_WEBHOOK_URL"]
    assert "vllm" in found[0] and "T0ken" not in "".join(found) and "sk-" not in "".join(found)
    safe = {"embedding_base_url": "https://vllm/v1", "alert_webhook_url": SecretStr("https://chat.example/T0ken")}
    assert list(exposures(exposed.model_copy(update=safe))) == []


def test_a_secret_file_that_everybody_can_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mode in {"open": 0o644, "own": 0o600, "group": 0o640}.items():
        (tmp_path / name).write_text("sk-0123456789")
        (tmp_path / name).chmod(mode)
    monkeypatch.setenv("EMBEDDING_API_KEY_FILE", str(tmp_path / "open"))
    monkeypatch.setenv("EXTRACTION_API_KEY_FILE", str(tmp_path / "own"))
    (tmp_path / ".env").write_text(f"LLAMAPARSE_API_KEY_FILE={tmp_path / 'group'}\n")
    assert [words.partition(":")[0] for words in exposures(Settings())] == ["EMBEDDING_API_KEY_FILE"]
    (tmp_path / "group").chmod(0o644)
    assert [words.partition(":")[0] for words in exposures(Settings())] == ["EMBEDDING_API_KEY_FILE", "LLAMAPARSE_API_KEY_FILE"]


def test_what_libpq_keeps_secret_is_known() -> None:
    assert {"password", "sslpassword", "oauth_client_secret"} <= secret_parts()
    assert not {"user", "host", "dbname", "sslkey"} & secret_parts()
