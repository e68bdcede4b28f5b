"""One exchange with a service: every way in which it can fail has its class, its words and its bound, and none shows the key."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr

from jobs.adapters.exchange import Service, Timeouts
from jobs.adapters.exchange.verdict import clean, read_excuse
from models.errors import (
    BadAnswer,
    ConfigurationError,
    CredentialRefused,
    DocmillError,
    RateLimitError,
    RequestRefused,
    RetryableError,
    ServiceUnavailable,
    TimeoutError,
)
from tests.servers import Authority, LocalServer, Request, Response, TunnelProxy, blackhole, faults

KEY = "sk-proj-abcdefghijklmnop0123456789"


class Echo(LocalServer):
    """Answers with what it was sent."""

    async def handle(self, request: Request, mangle: str) -> Response:
        return Response.of({"path": request.path, "query": request.query, "headers": dict(request.headers)})


@pytest.fixture
def server() -> Iterator[Echo]:
    with Echo() as echo:
        yield echo


def service(base: str, **seconds: float) -> Service:
    return Service("The test service", base, SecretStr(KEY), Timeouts(**{"connect": 5, "read": 10, "total": 30, **seconds}))


async def get(called: Service, path: str = "/thing", limit: int = 100_000) -> bytes:
    try:
        return (await called.exchange("POST", path, limit=limit, json={"input": ["text"]})).body
    finally:
        await called.aclose()


FAILURES: list[tuple[str, type[DocmillError], float | None]] = [
    ("429", RateLimitError, None),
    ("429_retry_after", RateLimitError, 2),
    ("quota", CredentialRefused, None),
    ("500", RetryableError, None),
    ("502_html", ServiceUnavailable, 5),
    ("503", ServiceUnavailable, 5),
    ("503_retry_after", ServiceUnavailable, 3),
    ("504", TimeoutError, None),
    ("401", CredentialRefused, None),
    ("403", CredentialRefused, None),
    ("404", CredentialRefused, None),
    ("400", RequestRefused, None),
    ("redirect", CredentialRefused, None),
    ("hang_in_headers", TimeoutError, None),
    ("hang_in_body", TimeoutError, None),
    ("cut_off", BadAnswer, None),
    ("reset", RetryableError, None),
    ("reset_in_body", BadAnswer, None),
    ("garbage", RetryableError, None),
    ("oversized", BadAnswer, None),
]


@pytest.mark.parametrize(("fault", "kind", "wait"), FAILURES, ids=[name for name, _, _ in FAILURES])
async def test_every_failure_has_its_class_and_names_service_and_status(
    server: Echo, fault: str, kind: type[DocmillError], wait: float | None
) -> None:
    played = faults.NAMED[fault]
    server.script(faults.always(played))
    with pytest.raises(DocmillError) as caught:
        await get(service(server.root, read=0.3 if fault.startswith("hang") else 10))
    error = caught.value
    assert type(error) is kind
    assert "The test service at 127.0.0.1:" in str(error)
    assert getattr(error, "retry_after", None) == wait
    assert error.call is not None and error.call.sent
    if played.status >= 300:
        assert error.call.status == played.status
        assert f"HTTP {played.status}" in str(error)
    assert len(str(error)) < 600 and "<html>" not in str(error)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("401", "credential"), ("403", "quota"), ("quota", "quota"), ("404", "configuration"), ("redirect", "configuration")],
)
async def test_what_somebody_has_to_mend_is_told_apart_from_an_outage(server: Echo, fault: str, reason: str) -> None:
    server.script(faults.always(faults.NAMED[fault]))
    with pytest.raises(CredentialRefused) as caught:
        await get(service(server.root))
    assert caught.value.reason == reason
    assert not isinstance(caught.value, RateLimitError)


async def test_a_redirect_carries_the_key_nowhere(server: Echo) -> None:
    server.script(faults.first(1, faults.NAMED["redirect"]))
    with pytest.raises(CredentialRefused):
        await get(service(server.root))
    assert server.tally.requests == 1


async def test_a_slow_drip_ends_at_the_whole_exchange_s_time(server: Echo) -> None:
    server.script(faults.always(faults.NAMED["drip"]))
    server.drip_seconds = 0.05
    with pytest.raises(TimeoutError, match=r"did not finish its answer within 0\.5 s") as caught:
        await get(service(server.root, total=0.5))
    assert caught.value.call is not None and caught.value.call.sent


async def test_a_host_that_takes_no_connection_is_unavailable_and_nothing_was_sent() -> None:
    with blackhole() as root, pytest.raises(ServiceUnavailable, match=r"could not be reached within 0\.2 s") as caught:
        await get(service(root, connect=0.2))
    assert caught.value.call is not None and not caught.value.call.sent


async def test_a_closed_port_is_unavailable(server: Echo) -> None:
    with Echo() as gone:
        root = gone.root
    with pytest.raises(ServiceUnavailable, match="ConnectError") as caught:
        await get(service(root))
    assert caught.value.call is not None and not caught.value.call.sent


async def test_a_name_that_does_not_resolve_is_unavailable() -> None:
    with pytest.raises(ServiceUnavailable, match=r"no-such-host\.invalid could not be reached") as caught:
        await get(service("http://no-such-host.invalid", connect=5))
    assert caught.value.call is not None and not caught.value.call.sent


async def test_a_certificate_that_is_not_trusted_is_unavailable_and_says_what_to_do(tmp_path: Path) -> None:
    with Echo(tls=Authority(tmp_path).server_context) as secure:
        with pytest.raises(ServiceUnavailable, match=r"certificate is not trusted; SSL_CERT_FILE") as caught:
            await get(service(secure.root))
        assert secure.tally.requests == 0
    assert caught.value.call is not None and not caught.value.call.sent


async def test_a_ca_of_ones_own_is_trusted_by_the_usual_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with Echo(tls=authority.server_context) as secure:
        assert b"/thing" in await get(service(secure.root))


async def test_a_handshake_that_never_ends_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with Echo(tls=authority.server_context) as secure:
        secure.script(faults.always(faults.NAMED["hang_in_handshake"]))
        with pytest.raises(ServiceUnavailable, match="could not be reached within") as caught:
            await get(service(secure.root, connect=0.3))
    assert caught.value.call is not None and not caught.value.call.sent


PROXY_VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No proxy is set, whatever this machine has."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


async def test_a_proxy_of_the_usual_variable_is_used(server: Echo, proxies: pytest.MonkeyPatch) -> None:
    proxies.setenv("HTTP_PROXY", server.root)
    answer = await get(service("http://embeddings.invalid/v1"))
    assert b"embeddings.invalid" in answer


@contextmanager
def behind_a_proxy(tmp_path: Path, proxies: pytest.MonkeyPatch, **proxy: str) -> Iterator[tuple[Echo, TunnelProxy]]:
    """A server with a certificate of a CA of one's own, and the proxy that leads to it."""
    authority = Authority(tmp_path)
    proxies.setenv("SSL_CERT_FILE", str(authority.file))
    with Echo(tls=authority.server_context) as secure, TunnelProxy(int(secure.root.rpartition(":")[2]), **proxy) as tunnels:
        proxies.setenv("HTTPS_PROXY", tunnels.url)
        yield secure, tunnels


async def test_https_goes_through_a_tunnel_of_the_proxy_and_connections_are_used_again(tmp_path: Path, proxies: pytest.MonkeyPatch) -> None:
    with behind_a_proxy(tmp_path, proxies, user="ann", password="proxy-pass") as (secure, tunnels):
        called = service("https://localhost:4433/v1")  # a port on which nobody listens: only the proxy leads anywhere
        for _ in range(3):
            await called.exchange("POST", "/thing", limit=10_000, json={})
        await called.aclose()
        assert tunnels.opened == ["localhost:4433"]
        assert secure.tally.requests == 3
        assert "proxy-authorization" not in secure.log[0].headers
        assert secure.log[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", ["127.0.0.1", "*"])
async def test_hosts_of_no_proxy_are_called_directly(tmp_path: Path, proxies: pytest.MonkeyPatch, value: str) -> None:
    with behind_a_proxy(tmp_path, proxies) as (secure, tunnels):
        proxies.setenv("NO_PROXY", value)
        await get(service(secure.root))
        assert (tunnels.asked, secure.tally.requests) == (0, 1)


@pytest.mark.parametrize("proxy", [{"user": "ann", "password": "right"}, {"refusal": "502 Bad Gateway"}], ids=["407", "502"])
async def test_a_proxy_that_refuses_is_an_outage_and_nothing_was_sent(
    tmp_path: Path, proxies: pytest.MonkeyPatch, proxy: dict[str, str]
) -> None:
    with behind_a_proxy(tmp_path, proxies, **proxy) as (secure, tunnels):
        proxies.setenv("HTTPS_PROXY", tunnels.url.replace("right", "proxy-pass"))
        with pytest.raises(ServiceUnavailable, match="could not be reached") as caught:
            await get(service("https://localhost:4433/v1"))
        assert (tunnels.asked, secure.tally.requests) == (1, 0)
    assert caught.value.call is not None and not caught.value.call.sent
    shown = "".join(traceback.format_exception(caught.value))
    assert "proxy-pass" not in shown and KEY not in shown


async def test_a_proxy_that_is_gone_is_an_outage(tmp_path: Path, proxies: pytest.MonkeyPatch) -> None:
    with Echo() as gone:
        proxies.setenv("HTTPS_PROXY", gone.root.replace("//", "//ann:proxy-pass@"))
    with pytest.raises(ServiceUnavailable, match="could not be reached") as caught:
        await get(service("https://localhost:4433/v1"))
    assert "proxy-pass" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://ann:proxy-pass@127.0.0.1:1080"), ("HTTPS_PROXY", "none://proxy-pass"), ("HTTPS_PROXY", "http://h:proxy-pass")],
)
async def test_a_proxy_that_cannot_be_used_is_an_outage_that_names_the_variables(
    proxies: pytest.MonkeyPatch, name: str, value: str
) -> None:
    proxies.setenv(name, value)
    with pytest.raises(ServiceUnavailable, match="ALL_PROXY or SSL_CERT_FILE cannot be used") as caught:
        await get(service("https://localhost:4433/v1"))
    assert caught.value.call is not None and not caught.value.call.sent
    assert "proxy-pass" not in "".join(traceback.format_exception(caught.value))


async def test_a_ca_file_that_is_not_there_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone.pem"))
    with pytest.raises(ServiceUnavailable, match="SSL_CERT_FILE cannot be used"):
        await get(service("https://localhost:4433/v1"))


async def test_an_answer_that_quotes_the_key_is_had_without_it(server: Echo) -> None:
    assert KEY.encode() not in await get(service(server.root))
    told = {"error": {"message": f"no such key {KEY}", "code": KEY, "type": KEY}}
    server.script(faults.always(faults.status(400, Response.of(told).body.decode(), x_request_id=KEY)))
    with pytest.raises(RequestRefused) as caught:
        await get(service(server.root))
    assert caught.value.call is not None
    assert KEY not in f"{caught.value} {caught.value.call.code} {caught.value.call.headers}"


async def test_connections_are_used_again(server: Echo) -> None:
    called = service(server.root)
    for _ in range(5):
        await called.exchange("POST", "/thing", limit=10_000, json={})
    await asyncio.gather(*(called.exchange("POST", "/thing", limit=10_000, json={}) for _ in range(3)))
    await called.aclose()
    assert server.tally.requests == 8
    assert server.tally.connections <= 3


async def test_an_answer_is_read_up_to_its_limit_and_no_farther(server: Echo) -> None:
    with pytest.raises(BadAnswer, match="more than 20 bytes"):
        await get(service(server.root), limit=20)


def test_a_service_outlives_an_event_loop(server: Echo) -> None:
    called = service(server.root)

    async def once() -> int:
        answer = await called.exchange("POST", "/thing", limit=10_000, json={})
        await called.aclose()
        return answer.status

    assert [asyncio.run(once()), asyncio.run(once())] == [200, 200]


async def test_azure_gets_its_header_and_its_version(server: Echo) -> None:
    called = service(f"{server.root}/openai/deployments/mine/?api-version=2024-10-21")
    await get(called, "/embeddings")
    (request,) = server.log
    assert request.path == "/openai/deployments/mine/embeddings"
    assert request.query == {"api-version": ["2024-10-21"]}
    assert request.headers["api-key"] == KEY
    assert "authorization" not in request.headers


@pytest.mark.parametrize("base", ["ftp://host", "https://", "https://user:secret@host/v1", "host/v1"])
def test_an_address_that_cannot_be_one_or_holds_a_key_is_refused(base: str) -> None:
    with pytest.raises(ConfigurationError, match="address must be") as caught:
        Service("The test service", base, None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a b", "sk-ü", "sk-\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Service("The test service", "https://host", SecretStr(key))
    assert key not in str(caught.value)


@pytest.mark.parametrize("fault", ["401", "reset", "hang_in_headers", "garbage", "502_html"])
async def test_no_error_log_or_repr_shows_the_key(server: Echo, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    called = service(server.root, read=0.3 if fault.startswith("hang") else 10)
    told = {"error": {"message": f"Incorrect API key provided: {KEY}, as in Bearer {KEY}", "code": "invalid_api_key"}}
    played = faults.status(401, Response.of(told).body.decode()) if fault == "401" else faults.NAMED[fault]
    server.script(faults.always(played))
    with pytest.raises(DocmillError) as caught:
        await get(called)
    shown = (
        "".join(traceback.format_exception(caught.value))
        + repr(called)
        + repr(caught.value.__dict__)
        + caplog.text
        + str(vars(caught.value))
    )
    assert KEY not in shown
    assert KEY[8:24] not in shown
    assert server.log[0].headers["authorization"] == f"Bearer {KEY}"


def test_foreign_words_are_bounded_on_one_line_and_without_keys() -> None:
    words = clean(f"a\nb \x1b[31m {KEY} sk-{'x' * 20} Bearer abc.def " + "long " * 1000, KEY)
    assert len(words) <= 300
    assert "\n" not in words and "\x1b" not in words
    assert KEY not in words and "sk-x" not in words and "abc.def" not in words


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"error": 5}', b'{"error": {"code": ["x"], "message": 3}}', b"[" * 100_000])
def test_an_error_body_of_any_shape_is_read_without_harm(body: bytes) -> None:
    excuse = read_excuse(body, KEY)
    assert (excuse.code, excuse.words) == (None, "")
