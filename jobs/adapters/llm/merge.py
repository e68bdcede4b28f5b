"""Putting the answers for the parts of a document together, always in the same way. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def merge(answers: Sequence[Any]) -> Any:
    """Return one answer for all parts, in order.

    Objects are merged field by field, lists appended with each different item once, and of anything else the first that says something
    (not null, not an empty text) is taken: what a document says first about itself, it says on its first pages.
    """
    said = [answer for answer in answers if answer is not None and answer != ""]
    if not said:
        return answers[0] if answers else None
    first = said[0]
    if isinstance(first, dict):
        objects = [answer for answer in said if isinstance(answer, dict)]
        names = dict.fromkeys(name for each in objects for name in each)
        return {name: merge([each[name] for each in objects if name in each]) for name in names}
    if isinstance(first, list):
        different: dict[str, Any] = {}
        for item in (item for answer in said if isinstance(answer, list) for item in answer):
            different.setdefault(json.dumps(item, sort_keys=True, ensure_ascii=False), item)
        return list(different.values())
    return first


def trim(data: Any, schema: Any) -> Any:
    """Return merged data with lists cut to the `maxItems` of their schema: several parts that each keep to it may not do so together."""
    if not isinstance(schema, dict):
        return data
    if isinstance(data, dict):
        properties = schema.get("properties", {})
        return {name: trim(value, properties.get(name)) for name, value in data.items()}
    most = schema.get("maxItems")
    return data[:most] if isinstance(data, list) and isinstance(most, int) else data
