"""All settings together: every one has its default, its allowed values and its meaning in one of the classes that make up `Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from annotated_types import Interval
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from models.settings.checks import Words
from models.settings.documents import DocumentSettings
from models.settings.places import PlaceSettings
from models.settings.providers import ProviderSettings
from models.settings.secret_files import SecretFiles, secret_files_of
from models.settings.serving import ServingSettings
from models.settings.upkeep import UpkeepSettings
from models.settings.working import WorkSettings


class Settings(ProviderSettings, ServingSettings, UpkeepSettings, DocumentSettings, WorkSettings, PlaceSettings):
    """All configuration. The attribute `max_pages` is the environment variable `MAX_PAGES`; `load_settings()` reads it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,  # compose files pass unset variables on as empty ones
        hide_input_in_errors=True,
        allow_inf_nan=False,
        defer_build=False,  # as its parts do, of which nobody makes one
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments win over NAME_FILE (a secret in a file), that over the environment, that over `.env`."""
        return init_settings, SecretFiles(settings_cls, env_settings, dotenv_settings), env_settings, dotenv_settings


def secret_files() -> dict[str, Path]:
    """Return which file each NAME_FILE names, in the environment or in `.env`."""
    return secret_files_of(Settings)


def allowed_values(name: str) -> str:
    """Say in words which values a setting may have, for example `2 to 1000`."""
    field = Settings.model_fields[name]
    if words := next((mark.allowed for mark in field.metadata if isinstance(mark, Words) and mark.allowed), None):
        return words
    if options := get_args(field.annotation):
        return " or ".join(str(option) for option in options)
    interval = next(mark for mark in field.metadata if isinstance(mark, Interval))
    return f"{interval.ge} to {interval.le}"


def default_value(name: str) -> str:
    """Say in words what a setting is when it is not given."""
    field = Settings.model_fields[name]
    words = next((mark.default for mark in field.metadata if isinstance(mark, Words) and mark.default), None)
    return words or str(field.default).replace("False", "false").replace("True", "true")
