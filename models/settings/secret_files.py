"""Secrets from files: DATABASE_URL_FILE=/run/secrets/url stands for DATABASE_URL, as with Docker and Kubernetes secrets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource

LARGEST_SECRET = 65_536


def holds_secret(field: FieldInfo) -> bool:
    """Tell whether a setting's value must never be shown."""
    return SecretStr.__name__ in repr(field.annotation)


@dataclass(frozen=True)
class BadSecretFile:
    """Stands in for a secret that could not be read, so that it is reported together with all other bad values."""

    variable: str
    problem: str


class SecretFiles(PydanticBaseSettingsSource):
    """Reads every secret setting NAME from the file that NAME_FILE names, in the environment or in `.env`."""

    def __init__(self, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._sources = [source for source in sources if isinstance(source, EnvSettingsSource)]

    def _variable(self, name: str) -> str | None:
        """Return the variable's value from the first source that sets it."""
        return next((value for source in self._sources if (value := source.env_vars.get(name))), None)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the secret, or a BadSecretFile, or None where NAME_FILE is not set."""
        path = self._variable(f"{field_name}_file")
        if path is None:
            return None, field_name, False
        variable = f"{field_name}_FILE".upper()
        if self._variable(field_name) is not None:
            return BadSecretFile(variable, f"is set together with {field_name.upper()}: set one of them"), field_name, False
        try:
            secret = _read(Path(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            # Where a file is expected the secret itself is soon put by mistake.
            folder = Path(path).parent
            shown = repr(path) if folder.is_absolute() and folder != Path("/") and folder.exists() else "a path of no folder that is there"
            return BadSecretFile(variable, f"names {shown}, which cannot be read: {reason}"), field_name, False
        return secret, field_name, False

    def paths(self) -> dict[str, Path]:
        """Return which file each NAME_FILE names, read or not."""
        given = {f"{name}_FILE".upper(): self._variable(f"{name}_file") for name, field in self._secrets()}
        return {variable: Path(path) for variable, path in given.items() if path is not None}

    def _secrets(self) -> Iterator[tuple[str, FieldInfo]]:
        return ((name, field) for name, field in self.settings_cls.model_fields.items() if holds_secret(field))

    def __call__(self) -> dict[str, Any]:
        """Return the settings that are given by a file."""
        values = {name: self.get_field_value(field, name)[0] for name, field in self._secrets()}
        return {name: value for name, value in values.items() if value is not None}


def secret_files_of(settings_cls: type[BaseSettings]) -> dict[str, Path]:
    """Return the files that hold secrets, by the variables that name them, as environment and `.env` are now."""
    return SecretFiles(settings_cls, EnvSettingsSource(settings_cls), DotEnvSettingsSource(settings_cls)).paths()


def _read(path: Path) -> str:
    """Read one secret without the line break at its end. ValueError for a file that cannot be a secret."""
    if not path.is_file():
        raise ValueError("no such file" if not path.exists() else "not a regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_SECRET + 1)
    if len(content) > LARGEST_SECRET:
        raise ValueError(f"larger than {LARGEST_SECRET} bytes")
    try:
        secret = content.decode("utf-8-sig").strip()  # some editors begin a file with a mark
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if not secret:
        raise ValueError("empty")
    return secret
