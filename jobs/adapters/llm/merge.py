"""Putting the answers for the parts of a document together, always in the same way. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote


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
    return _trim(data, [schema], [], schema)


def _trim(data: Any, must: Sequence[Any], may: Sequence[Any], root: Any) -> Any:
    """Trim what the schemas `must` are about, and one of `may` at least. `root` is what references point into."""
    must, may = _named_by(must, may, root)
    if isinstance(data, dict):
        return {name: _trim(value, _of_property(must, name), _of_property(may, name), root) for name, value in data.items()}
    if not isinstance(data, list):
        return data
    limits = [rule["maxItems"] for rule in must if isinstance(rule.get("maxItems"), int)]
    # Of alternatives the most generous: the check that follows knows which of them holds.
    lists = [rule for rule in may if rule.get("type") == "array" or "maxItems" in rule]
    generous = [rule["maxItems"] for rule in lists if isinstance(rule.get("maxItems"), int)]
    if generous and len(generous) == len(lists):
        limits.append(max(generous))
    return data[: min(limits)] if limits else data


def _of_property(rules: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [rule.get("properties", {}).get(name, rule.get("additionalProperties")) for rule in rules]


def _named_by(must: Sequence[Any], may: Sequence[Any], root: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return these schemas with all that they name for the same place, each once: references, what holds together, and alternatives."""
    held: dict[int, dict[str, Any]] = {}
    open_to: dict[int, dict[str, Any]] = {}
    waiting = [(rule, held) for rule in must] + [(rule, open_to) for rule in may]
    while waiting:
        rule, into = waiting.pop()
        if not isinstance(rule, dict) or id(rule) in into:
            continue
        into[id(rule)] = rule
        waiting += [(each, into) for each in (_find(rule.get("$ref"), root), *rule.get("allOf", ()))]
        waiting += [(each, open_to) for name in ("anyOf", "oneOf") for each in rule.get(name, ())]
    return list(held.values()), list(open_to.values())


def _find(reference: Any, root: Any) -> Any:
    """Return what a reference such as `#/$defs/Line` points to, None for another kind of reference."""
    if not isinstance(reference, str) or not f"{reference}/".startswith("#/"):
        return None
    for step in unquote(reference[1:]).split("/")[1:]:
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root
