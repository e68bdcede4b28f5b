"""Which licence each package has that is installed with docmill, and whether docmill may build on it: `make licences`, and `make check`.

Reads the metadata of what is installed. A licence that is not on the list, or that nobody can tell, fails until somebody has read it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageMetadata, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALLOWED = frozenset(
    {"0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib"}
)
"""Licences that ask for no more than their notice, and MPL-2.0, which holds for its own files alone."""
EXCEPTIONS = dict.fromkeys(("psycopg", "psycopg-binary", "psycopg-pool", "pygal"), "LGPL: imported unchanged, no copy shipped")
SPELLINGS = {
    "3-Clause BSD License": "BSD-3-Clause", "Apache 2.0": "Apache-2.0", "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0", "BSD License": "BSD", "ISC License": "ISC", "ISC License (ISCL)": "ISC",
    "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
    "BSD-3-Clause, Apache-2.0, dependency licenses": "BSD-3-Clause AND Apache-2.0",
}  # fmt: skip
"""What older metadata say, in the words of SPDX."""
EXTRAS = ("fast", "otel")


@dataclass(frozen=True)
class Package:
    """An installed package, what its metadata say of its licence, and whether that will do."""

    name: str
    version: str
    licence: str
    is_allowed: bool


def licence_of(metadata: PackageMetadata) -> str:
    """Return an SPDX expression, or what else the metadata say; empty where they say nothing."""
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [
        str(line).rpartition("::")[2].strip() for line in metadata.get_all("Classifier") or () if str(line).startswith("License ::")
    ]
    # Some put the whole text there; its first line is its name.
    said = [(metadata.get_all("License") or [""])[0].strip().partition("\n")[0], *classifiers]
    spelled = [SPELLINGS.get(words, words) for words in said if words]
    return next((words for words in spelled if is_allowed(words)), " / ".join(spelled))


def is_allowed(expression: str) -> bool:
    """Say whether everything that an SPDX expression binds to is allowed: all of AND, one of OR."""
    parts = expression.replace("(", " ").replace(")", " ").split(" AND ")
    return all(any(choice.strip() in ALLOWED for choice in part.split(" OR ")) for part in parts)


def installed(name: str, extras: frozenset[str] = frozenset(EXTRAS)) -> Iterator[Package]:
    """Yield a package and all that it needs here, by name. PackageNotFoundError: something is not installed."""
    found: dict[str, Package] = {}
    waiting, seen = [(name, extras)], set()
    while waiting:
        wanted, with_extras = waiting.pop()
        if (wanted, with_extras) in seen:
            continue
        seen.add((wanted, with_extras))
        facts = distribution(wanted)
        key = canonicalize_name(wanted)
        licence = licence_of(facts.metadata)
        found[key] = Package(key, facts.version, licence, is_allowed(licence) or key in EXCEPTIONS)
        waiting += [
            (need.name, frozenset(need.extras))
            for need in map(Requirement, facts.requires or ())
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in with_extras or {""})
        ]
    yield from (found[key] for key in sorted(found))


def main() -> int:
    """Print the list, or with --check only what is not allowed, and return the exit code."""
    try:
        packages = list(installed("docmill"))
    except PackageNotFoundError as error:
        print(f"licences: {error.name} is not installed; make the environment first", file=sys.stderr)
        return 1
    if "--check" not in sys.argv[1:]:
        for package in packages:
            print(f"{package.name:<40} {package.version:<16} {package.licence} {EXCEPTIONS.get(package.name, '')}".rstrip())
    refused = [package for package in packages if not package.is_allowed]
    for package in refused:
        print(
            f"licences: {package.name} {package.version} has {package.licence or 'none that its metadata tell'}; see docs/licences.py",
            file=sys.stderr,
        )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
