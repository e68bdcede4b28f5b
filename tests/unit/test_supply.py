"""The checks of dependencies can fail: a known vulnerability, a licence that is not allowed, and nothing where nobody can be asked."""

from __future__ import annotations

import os
import sys
from email.message import Message
from pathlib import Path
from typing import Any, cast

import pytest

from docs import audit, licences
from tests.servers import LocalServer, Request, Response

PINS = "jinja2==2.4.1\nmarkupsafe==3.0.4\n"


class Advisories(LocalServer):
    """A database of vulnerabilities that knows one flaw of one package, in the words of OSV."""

    async def handle(self, request: Request, mangle: str) -> Response:
        if request.json()["package"]["name"] != "jinja2":
            return Response.of({})
        package = {"name": "jinja2", "ecosystem": "PyPI"}
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.5"}]}]
        flaw = {"id": "PYSEC-0000-1", "summary": "x", "details": "x", "published": "2026-01-01T00:00:00Z", "aliases": []}
        return Response.of({"vulns": [{**flaw, "affected": [{"package": package, "ranges": ranges}]}]})


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(audit, "PINS", tmp_path / "pins.txt")
    monkeypatch.setattr(audit, "DONE", tmp_path / "done")
    monkeypatch.setattr(sys, "argv", ["audit", "--daily"])
    audit.PINS.write_text(PINS)
    return audit.PINS


@pytest.mark.skipif(not (audit.TOOLS / "bin" / "pip-audit").exists(), reason="pip-audit is not installed: make audit")
def test_a_known_vulnerability_fails_and_what_has_none_is_not_asked_about_again_the_same_day(
    pins: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Advisories() as database:
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"{database.root}/v1/query")
        assert audit.main() == 1
        told = capsys.readouterr()
        assert "jinja2 2.4.1: PYSEC-0000-1, fixed in 2.5" in told.err and "2 looked up, 1 known" in told.out
        pins.write_text(PINS.replace("jinja2==2.4.1\n", ""))
        assert audit.main() == 0
        asked = len(database.log)
        assert audit.main() == 0
        assert len(database.log) == asked
        pins.write_text(PINS.replace("jinja2==2.4.1", "click==8.5.1"))
        assert audit.main() == 0
        assert len(database.log) == asked + 2
    pins.write_text("click==8.5.1\n")
    assert audit.main() == 0
    assert "skipped, the database of vulnerabilities was not reached" in capsys.readouterr().out


@pytest.mark.usefixtures("pins")
def test_where_the_tool_cannot_be_installed_the_audit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "TOOLS", tmp_path / "tools")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    assert audit.main() == 0
    assert "skipped, pip-audit could not be installed: ERROR: No matching distribution" in capsys.readouterr().out


def test_all_that_is_installed_with_docmill_may_be_used() -> None:
    packages = list(licences.installed("docmill"))
    assert {"psycopg", "wordllama", "opentelemetry-sdk", "h11"} <= {package.name for package in packages}
    assert [package for package in packages if not package.is_allowed] == []
    assert set(licences.EXCEPTIONS) <= {package.name for package in packages}, "an exception that nobody needs any more goes"


@pytest.mark.parametrize(
    ("metadata", "licence", "is_allowed"),
    [
        ({"License-Expression": "GPL-3.0-or-later"}, "GPL-3.0-or-later", False),
        ({"License-Expression": "MIT AND AGPL-3.0-only"}, "MIT AND AGPL-3.0-only", False),
        ({"License-Expression": "(GPL-2.0-only OR MIT) AND Zlib"}, "(GPL-2.0-only OR MIT) AND Zlib", True),
        ({"License": "AGPL", "Classifier": "License :: OSI Approved :: MIT License"}, "MIT", True),
        ({"License": "Dual, see file", "Classifier": "License :: OSI Approved :: GNU Affero General Public License v3"},
         "Dual, see file / GNU Affero General Public License v3", False),
        ({"License": "MIT License\n\nCopyright (c) somebody"}, "MIT", True),
        ({}, "", False),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_new_and_old_metadata_and_an_unknown_one_is_refused(
    metadata: dict[str, str], licence: str, is_allowed: bool
) -> None:
    message = Message()
    for key, value in metadata.items():
        message[key] = value
    found = licences.licence_of(cast(Any, message))
    assert (found, licences.is_allowed(found)) == (licence, is_allowed)
