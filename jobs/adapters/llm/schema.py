"""The shape of an answer: a JSON Schema or a pydantic model of the caller's, and the check of an answer against it."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobs.adapters.llm.builtin import SCHEMA
from models.errors import ConfigurationError

LARGEST_SCHEMA = 1_000_000
"""Bytes."""
MAX_PROBLEMS = 10
_DATA = frozenset({"default", "const", "enum", "examples"})
"""Where a schema holds data, in which `$ref` is no reference."""
_STRICT = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf"),
        *("$ref", "$defs", "$schema", "title", "description"),
    }
)
_MODEL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer has to look like."""

    name: str
    """As the service is told: letters, digits, `_` and `-`, at most 64."""
    schema: dict[str, Any]
    sha256: str
    """Of the schema in canonical JSON; stored with each result."""
    strict: bool
    """Whether the schema keeps to the part of JSON Schema that OpenAI enforces while it generates."""
    check: Callable[[Any], tuple[Any, list[str]]]
    """Turns an answer into (what is stored, what is wrong with it). Problems name places and rules, never the document's words."""


def load_shape(given: str | None) -> Shape:
    """Return the shape of EXTRACTION_SCHEMA: a file, `module:Model`, or the built-in one. Anything else is a ConfigurationError."""
    if given is None:
        return _of_sound_schema(SCHEMA, "extraction")
    if _MODEL.fullmatch(given) and not Path(given).exists():
        return _of_model(given)
    path = Path(given)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_SCHEMA + 1)
        if len(raw) > LARGEST_SCHEMA:
            raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: larger than {LARGEST_SCHEMA:,} bytes.")
        schema = json.loads(raw)
    except OSError as error:
        raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: not JSON.") from None
    return of_schema(schema, source=f"EXTRACTION_SCHEMA={given}", fallback_name=path.stem)


def of_schema(schema: Any, *, source: str = "the built-in schema", fallback_name: str = "extraction") -> Shape:
    """Return the shape of a JSON Schema of an object; one that is invalid, or points outside itself, is a ConfigurationError."""
    from jsonschema import Draft202012Validator, SchemaError  # noqa: PLC0415 - a tenth of a second

    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ConfigurationError(f'{source}: not a JSON Schema with "type": "object" at its top.')
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ConfigurationError(f"{source}: not a valid JSON Schema at {error.json_path}: rule `{error.validator}`.") from None
    if outside := [reference for reference in _references(schema) if not reference.startswith("#")]:
        raise ConfigurationError(f"{source}: $ref {outside[0]!r} points outside the schema, and nothing is fetched.")
    if (lost := _dangling(Draft202012Validator(schema), schema)) is not None:
        raise ConfigurationError(f"{source}: $ref {lost!r} leads to nothing in the schema, or back to itself.")
    return _of_sound_schema(schema, fallback_name)


def _of_sound_schema(schema: dict[str, Any], fallback_name: str) -> Shape:
    @cache
    def validator() -> Any:
        from jsonschema import Draft202012Validator  # noqa: PLC0415 - as above, and an idle worker does without

        return Draft202012Validator(schema)

    def check(answer: Any) -> tuple[Any, list[str]]:
        errors = sorted(validator().iter_errors(answer), key=lambda error: (error.json_path, str(error.validator)))
        return answer, [_problem(error, names) for error in errors[:MAX_PROBLEMS]]

    names = _names(schema)
    title = schema.get("title")
    return _shape(title if isinstance(title, str) else fallback_name, schema, check)


def _of_model(given: str) -> Shape:
    from pydantic import BaseModel, ValidationError  # noqa: PLC0415

    module, _, attribute = given.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: cannot be imported ({type(error).__name__}: {error}).") from None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: not a pydantic model.")
    try:
        schema = model.model_json_schema()
    except Exception as error:
        raise ConfigurationError(f"EXTRACTION_SCHEMA={given}: has no JSON Schema ({type(error).__name__}).") from error

    def check(answer: Any) -> tuple[Any, list[str]]:
        try:
            return model.model_validate(answer).model_dump(mode="json"), []
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False, include_context=False)
            return answer, [f"{_place(detail['loc'], names)}: {detail['type']}" for detail in details[:MAX_PROBLEMS]]

    names = _names(schema)
    return _shape(attribute, schema, check)


def _shape(name: str, schema: dict[str, Any], check: Callable[[Any], tuple[Any, list[str]]]) -> Shape:
    def check_for_storing(answer: Any) -> tuple[Any, list[str]]:
        try:
            found, problems = check(answer)
        except RecursionError:
            return answer, ["$: nested too deeply"]
        # pydantic reads "NaN" as a number, and jsonb has none like it.
        return found, problems or ([] if _is_finite(found) else ["$: a number is not finite"])

    return Shape(_name(name), schema, _digest(schema), is_strict(schema), check_for_storing)


def _is_finite(data: Any) -> bool:
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        return False
    return True


def is_strict(schema: Any) -> bool:
    """Say whether a schema keeps to what `strict: true` allows: objects forbid other properties and require all of theirs, and no keyword
    is there that a service might refuse. The answer is checked against all of the schema in any case."""
    if isinstance(schema, list):
        return all(is_strict(each) for each in schema)
    if not isinstance(schema, dict):
        return True
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, dict):
        required = set(schema.get("required", []))
        if schema.get("additionalProperties") is not False or required != set(properties or {}):
            return False
    return schema.keys() <= _STRICT and all(
        is_strict(list(each.values()) if name in ("properties", "$defs") and isinstance(each, dict) else each)
        for name, each in schema.items()
        if name in ("properties", "$defs", "items", "anyOf")
    )


def _dangling(validator: Any, schema: dict[str, Any]) -> str | None:
    """Return a reference that no answer could be checked against; it would be noticed only once that is paid for."""
    if any("$id" in each for each in _objects(schema) if each is not schema):
        return None  # what a reference inside of such a schema means, it says itself
    for reference in _references(schema):
        try:
            validator.evolve(schema={"$ref": reference}).is_valid(None)
        except Exception:  # of a class that jsonschema keeps to itself, or a RecursionError
            return reference
    return None


def _references(schema: Any) -> list[str]:
    told = (item for each in _objects(schema) for item in each.items())
    return [value for name, value in told if name in ("$ref", "$dynamicRef") and isinstance(value, str)]


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all objects in it that are no example of data."""
    if isinstance(schema, dict):
        yield schema
        inside = [value for name, value in schema.items() if name not in _DATA]
    else:
        inside = schema if isinstance(schema, list) else []
    for each in inside:
        yield from _objects(each)


def _names(schema: Any) -> frozenset[str]:
    """Return the names of all properties that a schema knows."""
    if isinstance(schema, list):
        return frozenset().union(*map(_names, schema))
    if not isinstance(schema, dict):
        return frozenset()
    properties = schema.get("properties")
    return frozenset(properties if isinstance(properties, dict) else ()).union(*map(_names, schema.values()))


def _problem(error: Any, names: frozenset[str]) -> str:
    rule = error.validator_value
    limit = f" {json.dumps(rule)[:100]}" if isinstance(rule, str | int | float | list) else ""
    return f"{_place(error.absolute_path, names)}: {error.validator}{limit}"


def _place(location: Iterable[int | str], names: frozenset[str]) -> str:
    """Return where in an answer something is. Names that the schema does not know are the model's, or the document's, and not told."""
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step if step in names else '*'}" for step in location)[:200]


def _name(given: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", given)[:64].strip("_") or "extraction"


def _digest(schema: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(schema, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
