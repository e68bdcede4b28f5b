"""Model files that installed packages carry: found without importing the package, and checked before use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from models.errors import ConfigurationError


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the SHA-256 over the contents of the files, in order, as lowercase hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def find_carried(package: str, relative: str, *, hint: str) -> Path:
    """Return the path of a file in an installed package; a package or file that is not there is a ConfigurationError ending in `hint`."""
    try:
        path = Path(str(distribution(package).locate_file(relative)))
    except PackageNotFoundError:
        raise ConfigurationError(f"The package {package}, which carries the embedding model, is not installed. {hint}") from None
    if not path.is_file():
        raise ConfigurationError(f"{path} is missing from the installed package {package}. {hint}")
    return path


def checked_file(package: str, relative: str, sha256: str, *, hint: str) -> Path:
    """Return the path as `find_carried` does; a file with another SHA-256 is a ConfigurationError that names both. Reads the file."""
    path = find_carried(package, relative, hint=hint)
    found = sha256_of([path])
    if found != sha256:
        raise ConfigurationError(f"{path} is not the file that docmill was tried with: its SHA-256 is {found}, expected {sha256}. {hint}")
    return path
