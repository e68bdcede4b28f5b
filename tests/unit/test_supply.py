"""The checks of dependencies can fail: a known vulnerability, a licence that is not allowed, and nothing where nobody can be asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.utils import canonicalize_name

from docs import audit, licences, sbom
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


A_BILL = {"components": [{"name": "One_Thing", "version": "1"}, {"name": "two", "version": "2", "licenses": [{"license": {"id": "MIT"}}]}]}


@pytest.mark.parametrize(
    ("packages", "pins", "words"),
    [
        ({"one-thing": "BSD-3-Clause AND MIT", "two": ""}, {"one-thing": "1", "two": "2"}, ""),
        ({"one-thing": "", "two": ""}, {"one-thing": "1", "two": "2"}, "one-thing 1 has no licence"),
        ({"one-thing": "MIT", "two": ""}, {"one-thing": "1", "two": "2.1"}, "two 2 is not pinned: constraints.txt has 2.1"),
        ({"one-thing": "MIT", "two": ""}, {"one-thing": "1"}, "two 2 is not pinned"),
        ({"one-thing": "MIT", "two": "", "three": ""}, {"one-thing": "1", "two": "2"}, "three is needed and not in the bill"),
        ({"two": ""}, {"one-thing": "1", "two": "2"}, "one-thing 1 has no licence"),
    ],
    ids=["good", "no licence", "other version", "no pin", "not in the bill", "not known here"],
)
def test_a_bill_lacks_no_package_pin_or_licence(packages: dict[str, str], pins: dict[str, str], words: str) -> None:
    bill = json.loads(json.dumps(A_BILL))
    wrong = sbom.complete(bill, (licences.Package(name, "1", licence, True) for name, licence in packages.items()), pins)
    assert (len(wrong), words in "".join(wrong)) == (1 if words else 0, True)
    if not words:
        assert [component["licenses"] for component in bill["components"]] == [
            [{"expression": "BSD-3-Clause AND MIT", "acknowledgement": "declared"}], [{"license": {"id": "MIT"}}],
        ]  # fmt: skip


def test_all_that_is_installed_with_docmill_is_pinned() -> None:
    needed = {package.name: package.version for package in licences.installed("docmill") if package.name != "docmill"}
    assert {name: sbom.pinned().get(name) for name in needed} == needed


@pytest.mark.long
def test_make_sbom_writes_a_valid_bill_of_every_pinned_package_with_its_licence(tmp_path: Path) -> None:
    """Makes fresh environments from the package index: `pytest -m long tests/unit/test_supply.py`. Whether the bill keeps to CycloneDX's
    schema the target asks cyclonedx's own validator, and fails otherwise."""
    command = ["make", "-C", str(sbom.PINS.parent), "-o", ".venv/.installed", "sbom", f"SBOM={tmp_path / 'bill.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bill = json.loads((tmp_path / "bill.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "1.6", "docmill")
    needed = {package.name: package.version for package in licences.installed("docmill") if package.name != "docmill"}
    assert {canonicalize_name(component["name"]): component["version"] for component in bill["components"]} == needed
    assert all(component["licenses"] for component in bill["components"])
    known = {component["bom-ref"] for component in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {entry["ref"] for entry in bill["dependencies"]} == known
