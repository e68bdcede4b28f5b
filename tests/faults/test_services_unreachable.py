"""Services that no connection reaches: a host that is down, a name that does not resolve, a certificate that nobody trusts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.harness import Arena
from tests.faults.service_checks import check_all_right, check_books
from tests.faults.services import Kind, Service, service
from tests.servers import Authority, blackhole

COUNT = 12


def fail_in_vain(outside: Service) -> None:
    outside.submit(COUNT)
    outside.work()
    outside.hold(outside.probed_in_vain, "a probe to fail")
    assert outside.server.tally.requests == 0


def judge(outside: Service, name: str, did: str) -> None:
    outside.arena.settle(240)
    line = outside.report(name, did)
    check_all_right(outside)
    check_books(outside, "failed", unheard=True)
    # None of it was the documents' fault, and nothing of it counts.
    assert (line["attempts"], line["dead_letters"]) == (0, 0)
    if name != "DNS failure":  # another name is another service: nothing is known of it, and nothing held against it
        assert line["stampede"] <= 10


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
def test_documents_outlast_a_host_that_takes_no_connection(arena: Arena, kind: Kind) -> None:
    down = ExitStack()
    port = urlsplit(down.enter_context(blackhole())).port
    with down, service(arena, kind, {"PROVIDER_CONNECT_SECONDS": "0.3"}, later=True, port=port) as outside:
        fail_in_vain(outside)
        down.close()
        outside.start()
        outside.recover()
        judge(outside, "hang at connect", "the host drops what is sent to it, then is back")


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
def test_documents_outlast_a_name_that_does_not_resolve(arena: Arena, kind: Kind) -> None:
    with service(arena, kind) as outside:
        outside.configure(f"http://docmill-{kind}.invalid/v1")
        fail_in_vain(outside)
        outside.configure()
        outside.recover()
        outside.work_anew()
        judge(outside, "DNS failure", "a name under .invalid, mended in the settings, workers started anew")


@pytest.mark.parametrize("kind", ["embedding", "extraction"])
def test_documents_outlast_a_certificate_that_is_not_trusted(
    arena: Arena, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    authority = Authority(tmp_path)
    with service(arena, kind, tls=authority.server_context) as outside:
        fail_in_vain(outside)
        outside.recover()
        outside.work_anew(SSL_CERT_FILE=str(authority.file))
        judge(outside, "certificate error", "a CA of one's own; SSL_CERT_FILE names it, workers started anew")
