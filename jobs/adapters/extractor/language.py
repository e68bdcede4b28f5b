"""The language of a text, by py3langid: 4.5 MB with its model, offline."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

SAMPLES = 5
SAMPLE_CHARACTERS = 1_500
GLANCE_CHARACTERS = 120
"""Of each sample, to begin with: py3langid takes a quarter of a microsecond a byte, and most texts are in one language from end to end."""
SURE = 0.5
"""How certain each glance must be of the same language: over 1,000 texts in 71 languages none was named that samples did not name."""
MIN_LETTERS = 3
MIN_CONFIDENCE = 0.3
"""Below it no language is named: the measured mistakes on titles of two words lie under 0.1, right answers over 0.35."""

_NOT_PROSE = re.compile(r"https?://\S++|[0-9|#*`_=~<>\[\]()\\{}]++")


def find_language(text: str) -> tuple[str, float] | None:
    """Return (ISO 639-1 code, confidence 0 to 1), None where the text has too little language in it.

    Parts spread over the text vote; the confidence is the winner's share of their certainty, so it is lower for mixed texts. Glances
    settle it if they agree, otherwise longer samples do, or all of a text that is no longer than they are.
    """
    votes = _glances(text) or _samples(text)
    if not votes:
        return None
    certainties: dict[str, float] = {}
    for code, certainty in votes:
        certainties[code] = certainties.get(code, 0.0) + certainty
    code, certainty = max(certainties.items(), key=lambda vote: (vote[1], vote[0]))
    confidence = round(certainty / len(votes), 3)
    return (code, confidence) if len(code) == 2 and confidence >= MIN_CONFIDENCE else None


def _glances(text: str) -> list[tuple[str, float]]:
    """Return (code, certainty) of each glance; nothing as soon as they do not settle it."""
    step = len(text) // SAMPLES
    votes: list[tuple[str, float]] = []
    for start in range((step - GLANCE_CHARACTERS) // 2, step * SAMPLES, step) if step > GLANCE_CHARACTERS else ():
        vote = _vote(text[start : start + GLANCE_CHARACTERS])
        if vote is None or vote[1] < SURE or (votes and vote[0] != votes[0][0]):
            return []
        votes.append(vote)
    return votes


def _samples(text: str) -> list[tuple[str, float]]:
    """Return (code, certainty) of the samples that have letters."""
    if len(text) <= SAMPLES * SAMPLE_CHARACTERS:
        parts = [text]
    else:
        step = len(text) // SAMPLES
        parts = [text[start : start + SAMPLE_CHARACTERS] for start in range(0, step * SAMPLES, step)]
    return [vote for part in parts if (vote := _vote(part)) is not None]


def _vote(part: str) -> tuple[str, float] | None:
    sample = " ".join(_NOT_PROSE.sub(" ", part).split())
    if len(list(islice(filter(str.isalpha, sample), MIN_LETTERS))) < MIN_LETTERS:
        return None
    code, certainty = _classifier()(sample)
    return code, float(certainty)


@lru_cache(maxsize=1)
def _classifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415  # loads a model

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    return classify
