"""Holding summaries against their schema, and telling their shape."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "run_summary.example.json"


def _closed(part: Any) -> Any:
    """The schema with every object closed: a field that it does not name is a field that nobody documented."""
    if isinstance(part, dict):
        made = {key: _closed(value) for key, value in part.items()}
        if isinstance(part.get("properties"), dict) and part.get("type") == "object":
            made.setdefault("additionalProperties", False)
        return made
    return [_closed(value) for value in part] if isinstance(part, list) else part


@cache
def validator() -> Draft202012Validator:
    schema = json.loads((DOCS / "run_summary.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(_closed(copy.deepcopy(schema)), format_checker=FormatChecker())


def check(ui_json: Any, nested_summary: Any) -> None:
    """Fail if a summary does not fit its schema, has a field that is not in it, or does not agree with itself."""
    problems = [
        f"{error.json_path}: {error.message[:300]}"
        for error in validator().iter_errors({"ui_json": ui_json, "nested_summary": nested_summary})
    ]
    assert problems == []
    totals, folders = ui_json["totals"], nested_summary["folders"]
    assert totals["files"] == sum(totals[key] for key in ("succeeded", "failed", "cancelled", "unfinished"))
    assert totals["files"] == len(ui_json["files"]) + ui_json["files_omitted"] == sum(folder["files_here"] for folder in folders)
    assert totals["files"] == sum(len(folder["files"]) + folder["files_omitted"] for folder in folders) or nested_summary["folders_omitted"]
    if folders:
        assert (folders[0]["path"], folders[0]["parent"], folders[0]["files_below"]) == ("", None, totals["files"])
        assert {key: folders[0][key] for key in ("succeeded", "failed", "pages", "passages")}.items() <= totals.items()
    paths = {folder["path"] for folder in folders}
    assert {folder["parent"] for folder in folders} <= paths | {None} or nested_summary["folders_omitted"]
    times = [moment["at"] for moment in ui_json["timeline"]]
    assert times == sorted(times)
    for folder in folders:
        for file in folder["files"]:
            if file["sections"] is not None and file["sections_omitted"] == 0:
                assert sum(section["passages"] for section in file["sections"]) == (file["passages"] or 0)


def shape(part: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys, without the numbers of lists."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield f"{path}.{key}"
            yield from shape(value, f"{path}.{key}")
    elif isinstance(part, list):
        for value in part:
            yield from shape(value, f"{path}[]")
