"""Whether the settings of outside services are enough to work with: asked once, when a worker starts, and nothing is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from models.errors import ConfigurationError
from models.settings import Settings

_RULES_TOKENS = 2000


def check_providers(settings: Settings) -> None:
    """Raise a ConfigurationError that lists everything that is missing or wrong, or nothing."""
    problems = []
    for make in _makers(settings):
        try:
            make(settings)
        except ConfigurationError as error:
            problems.append(str(error))
    problems += _contradictions(settings)
    used: dict[Literal["embedding", "extraction", "parse"], bool] = {
        "embedding": settings.embedding_provider == "openai",
        "extraction": settings.extraction_provider == "openai",
        "parse": settings.parsing_provider == "llamaparse",
    }
    problems += [problem for kind, is_used in used.items() if is_used and (problem := unpriced(settings, kind))]
    if problems:
        raise ConfigurationError("The configuration is wrong:\n" + "\n".join(f"  {problem}" for problem in problems))


def _makers(settings: Settings) -> Iterator[Callable[[Settings], object]]:
    """Yield what makes the clients of the services that are used. A worker that uses none does without their code until its first job."""
    if settings.parsing_provider != "local":
        from jobs.adapters.llamaparse import make_llamaparse  # noqa: PLC0415

        yield make_llamaparse
    if settings.extraction_provider != "local":
        from jobs.adapters.llm import make_extractor  # noqa: PLC0415

        yield make_extractor
    if settings.embedding_provider == "openai":
        from jobs.adapters.embedders import make_hosted  # noqa: PLC0415

        yield make_hosted


def unpriced(settings: Settings, kind: Literal["embedding", "extraction", "parse"]) -> str | None:
    """Return what is wrong where cost is limited and a price of a kind of service is not known: it would pass for free."""
    prices = {
        "embedding": {"EMBEDDING_PRICE_PER_MILLION_TOKENS": settings.embedding_price_per_million_tokens},
        "extraction": {
            "EXTRACTION_PRICE_PER_MILLION_INPUT_TOKENS": settings.extraction_price_per_million_input_tokens,
            "EXTRACTION_PRICE_PER_MILLION_OUTPUT_TOKENS": settings.extraction_price_per_million_output_tokens,
        },
        "parse": {"PARSE_PRICE_PER_PAGE": settings.parse_price_per_page},
    }[kind]
    limits = {"MAX_COST_PER_DOCUMENT": settings.max_cost_per_document, "MAX_COST_PER_BATCH": settings.max_cost_per_batch}
    limited = [name for name, limit in limits.items() if limit > 0]
    missing = [name for name, price in prices.items() if price is None]
    if not limited or not missing:
        return None
    verb = "needs" if len(limited) == 1 else "need"
    return f"{' and '.join(limited)} {verb} {' and '.join(missing)}: the price as its service has it, or 0 for a server of one's own."


def _contradictions(settings: Settings) -> list[str]:
    """Return which settings do not go together: what they ask for could never be sent, or never be waited for."""
    hosted, extracts = settings.embedding_provider == "openai", settings.extraction_provider == "openai"
    per_minute, to_extract = settings.embedding_tokens_per_minute, settings.extraction_tokens_per_minute
    # Beside the document's part there are the rules, the schema, and an answer that is sent back for repair.
    one_extraction = settings.extraction_max_tokens + 2 * settings.extraction_max_answer_tokens + _RULES_TOKENS
    pairs = [
        (hosted, "EMBEDDING_MAX_TEXT_TOKENS", settings.embedding_max_text_tokens, "EMBEDDING_MAX_TOKENS", settings.embedding_max_tokens),
        (
            hosted and per_minute > 0,
            "EMBEDDING_MAX_TEXT_TOKENS",
            settings.embedding_max_text_tokens,
            "EMBEDDING_TOKENS_PER_MINUTE",
            per_minute,
        ),
        (
            extracts and to_extract > 0,
            f"EXTRACTION_MAX_TOKENS and twice EXTRACTION_MAX_ANSWER_TOKENS and {_RULES_TOKENS} for rules and schema, together",
            one_extraction,
            "EXTRACTION_TOKENS_PER_MINUTE",
            to_extract,
        ),
        (
            settings.parsing_provider == "llamaparse",
            "LLAMAPARSE_DEADLINE_SECONDS",
            settings.llamaparse_deadline_seconds,
            "STAGE_TIMEOUT_SECONDS",
            settings.stage_timeout_seconds,
        ),
    ]
    return [
        f"{small}={one:g} must not be more than {large}={other:g}." for asked, small, one, large, other in pairs if asked and one > other
    ]
