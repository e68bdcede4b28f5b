"""Whether the settings of outside services are enough to work with: asked once, when a worker starts, and nothing is called."""

from __future__ import annotations

from collections.abc import Callable

from jobs.adapters.embedders import make_hosted
from jobs.adapters.llamaparse import make_llamaparse
from jobs.adapters.llm import make_extractor
from models.errors import ConfigurationError
from models.settings import Settings


def check_providers(settings: Settings) -> None:
    """Raise a ConfigurationError that lists everything that is missing or wrong, or nothing."""
    checks: list[Callable[[], object]] = [lambda: make_llamaparse(settings), lambda: make_extractor(settings)]
    if settings.embedding_provider == "openai":
        checks.append(lambda: make_hosted(settings))
    problems = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            problems.append(str(error))
    if settings.parsing_provider == "llamaparse" and settings.llamaparse_deadline_seconds >= settings.stage_timeout_seconds:
        problems.append(
            f"LLAMAPARSE_DEADLINE_SECONDS={settings.llamaparse_deadline_seconds:g} must be less than "
            f"STAGE_TIMEOUT_SECONDS={settings.stage_timeout_seconds:g}."
        )
    if settings.embedding_provider == "openai" and settings.embedding_max_text_tokens > settings.embedding_max_tokens:
        problems.append(
            f"EMBEDDING_MAX_TEXT_TOKENS={settings.embedding_max_text_tokens} must not be more than "
            f"EMBEDDING_MAX_TOKENS={settings.embedding_max_tokens}."
        )
    if problems:
        raise ConfigurationError("The configuration is wrong:\n" + "\n".join(f"  {problem}" for problem in problems))
