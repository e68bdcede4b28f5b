"""The name under which workers share what they know of a service."""

from __future__ import annotations

from pydantic import SecretStr

from jobs.services.own import service_id

KEY = SecretStr("sk-very-secret-0123456789")


def test_a_service_is_named_by_kind_address_and_a_fingerprint_and_by_no_secret() -> None:
    name = service_id("embedding", "https://ann:pass@Host.test:8443/v1/?token=hush", KEY)
    assert name.startswith("embedding https://host.test:8443/v1 key:") and len(name.rpartition(":")[2]) == 12
    assert not any(secret in name for secret in ("ann", "pass", "hush", "sk-"))
    assert service_id("embedding", "https://host.test:8443/v1", SecretStr("other")) != name
    assert service_id("embedding", "http://localhost:8080", None) == "embedding http://localhost:8080 key:none"
