"""Putting the answers for the parts of a document together, always in the same way. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
    return _trim(data, [schema], schema)


def _trim(data: Any, told: Sequence[Any], root: Any) -> Any:
    """Trim what all these schemas are about; `root` is what references point into."""
    rules = [rule for each in told for rule in _rules(each, root)]
    if isinstance(data, dict):
        return {name: _trim(value, [_of_property(rule, name) for rule in rules], root) for name, value in data.items()}
    most = [rule["maxItems"] for rule in rules if isinstance(rule.get("maxItems"), int)]
    # Of several the most generous: the check that follows knows which of them holds.
    return data[: max(most)] if isinstance(data, list) and most else data


def _of_property(rule: Mapping[str, Any], name: str) -> Any:
    return rule.get("properties", {}).get(name, rule.get("additionalProperties"))


def _rules(schema: Any, root: Any, seen: tuple[Any, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield a schema and all that it names for the same place: references and choices."""
    if not isinstance(schema, dict) or any(schema is each for each in seen):
        return
    yield schema
    choices = [choice for name in ("anyOf", "oneOf", "allOf") for choice in schema.get(name, ())]
    for each in (_find(schema.get("$ref"), root), *choices):
        yield from _rules(each, root, (*seen, schema))


def _find(reference: Any, root: Any) -> Any:
    """Return what a reference such as `#/$defs/Line` points to, None for another kind of reference."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    for step in reference[1:].split("/")[1:]:
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root
