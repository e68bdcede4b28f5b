"""What is extracted where EXTRACTION_SCHEMA is not set. Every field is there in every answer, empty where the document says nothing."""

from __future__ import annotations

from typing import Any


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _list(properties: dict[str, Any], description: str) -> dict[str, Any]:
    return {"type": "array", "items": _object(properties), "description": description}


def _text(description: str) -> dict[str, Any]:
    return {"type": ["string", "null"], "description": description}


_WORDS = {"type": "string"}

SCHEMA: dict[str, Any] = {
    "title": "document_facts",
    **_object(
        {
            "document_type": _text("What it is, in one or two words: invoice, lease, report, letter."),
            "title": _text("Its title as written."),
            "language": _text("ISO 639-1 code of its main language."),
            "summary": _text("What it says, in at most five sentences, in its own language."),
            "parties": _list({"name": _WORDS, "role": _text("Seller, tenant, author.")}, "Persons and organisations that matter."),
            "dates": _list({"date": _WORDS, "meaning": _WORDS}, "Dates that matter, as YYYY-MM-DD where the day is known."),
            "amounts": _list(
                {"amount": _WORDS, "currency": _text("ISO 4217."), "meaning": _WORDS}, "Sums of money; plain decimal, point before cents."
            ),
            "identifiers": _list({"name": _WORDS, "value": _WORDS}, "Numbers by which it is known: invoice, contract, case."),
            "topics": {"type": "array", "items": _WORDS, "description": "Up to ten keywords."},
        }
    ),
}
