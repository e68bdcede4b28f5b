"""The language of a text, by py3langid: 4.5 MB with its model, offline."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

SAMPLES = 5
SAMPLE_CHARACTERS = 1_500
MIN_LETTERS = 3
MIN_CONFIDENCE = 0.3
"""Below it no language is named: the measured mistakes on titles of two words lie under 0.1, right answers over 0.35."""

_NOT_PROSE = re.compile(r"https?://\S++|[0-9|#*`_=~<>\[\]()\\{}]++")


def find_language(text: str) -> tuple[str, float] | None:
    """Return (ISO 639-1 code, confidence 0 to 1), None where the text has too little language in it.

    Samples spread over the text vote; the confidence is the winner's share of their certainty, so it is lower for mixed texts.
    """
    step = max(1, len(text) // SAMPLES)
    starts = range(0, max(1, step * SAMPLES), step) if len(text) > SAMPLES * SAMPLE_CHARACTERS else (0,)
    length = SAMPLE_CHARACTERS if len(starts) > 1 else SAMPLES * SAMPLE_CHARACTERS
    votes: dict[str, float] = {}
    judged = 0
    for start in starts:
        sample = " ".join(_NOT_PROSE.sub(" ", text[start : start + length]).split())
        if len(list(islice(filter(str.isalpha, sample), MIN_LETTERS))) < MIN_LETTERS:
            continue
        code, confidence = _classifier()(sample)
        judged += 1
        votes[code] = votes.get(code, 0.0) + float(confidence)
    if not judged:
        return None
    code, certainty = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
    confidence = round(certainty / judged, 3)
    return (code, confidence) if len(code) == 2 and confidence >= MIN_CONFIDENCE else None


@lru_cache(maxsize=1)
def _classifier() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415  # loads a model

    classify: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify
    return classify
