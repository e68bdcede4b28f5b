"""Completes and checks the bill that `make sbom` writes: every package that docmill needs, as it is pinned, with its licence.

cyclonedx-py does not read the licences that only older metadata tell; docs/licences.py does, in the words of SPDX.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from docs.licences import Package, installed

PINS = Path(__file__).parents[1] / "constraints.txt"
NO_SPDX = frozenset({"BSD"})
"""What docs/licences.py allows although it names no one licence."""


def says_licence(component: Mapping[str, Any]) -> bool:
    """Say whether a component of the bill has a licence in SPDX's words."""
    return any("expression" in entry or "id" in entry["license"] for entry in component.get("licenses", ()))


def complete(bill: dict[str, Any], packages: Iterable[Package], pins: Mapping[str, str]) -> list[str]:
    """Give each component its licence, and return what is wrong with the bill of these packages, in words."""
    missing = {package.name: package for package in packages}
    wrong = []
    for component in bill["components"]:
        name, version = canonicalize_name(component["name"]), component["version"]
        package = missing.pop(name, None)
        if pins.get(name) != version:
            wrong.append(f"{name} {version} is not pinned: constraints.txt has {pins.get(name)}")
        if says_licence(component):
            continue
        licence = "" if package is None else package.licence
        if not licence:
            wrong.append(f"{name} {version} has no licence that its metadata tell")
        elif licence in NO_SPDX:
            component["licenses"] = [{"license": {"name": licence, "acknowledgement": "declared"}}]
        else:
            component["licenses"] = [{"expression": licence, "acknowledgement": "declared"}]
    return wrong + [f"{name} is needed and not in the bill" for name in sorted(missing)]


def pinned() -> dict[str, str]:
    """Return the version of each package that constraints.txt pins."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def main() -> int:
    """Complete the file that is named, and return the exit code."""
    path = Path(sys.argv[1])
    bill = json.loads(path.read_text(encoding="utf-8"))
    wrong = complete(bill, (package for package in installed("docmill") if package.name != "docmill"), pinned())
    for words in wrong:
        print(f"sbom: {words}", file=sys.stderr)
    path.write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
