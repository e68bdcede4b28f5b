"""The examples for monitoring and the page for operators agree with the program: every rule has its section, every metric its source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sql.migrate import _own

ROOT = Path(__file__).resolve().parents[2]
METRIC = re.compile(r"\bdocmill_[a-z_]+")


def rules() -> list[dict[str, Any]]:
    made = yaml.safe_load((ROOT / "docs/prometheus-rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in made["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Every PromQL expression of the examples."""
    board = json.loads((ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8"))
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def sections() -> set[str]:
    """The anchors of docs/operations.md."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/operations.md").read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_rule_says_where_to_read_on_and_there_is_something_to_read() -> None:
    anchors = sections()
    migration = "".join(path.read_text(encoding="utf-8") for path in _own() if "watching" in path.name)
    own = re.findall(r"^    \('([a-z_]+)', '(?:warning|critical)'", migration, re.M)
    assert len(own) >= 7
    assert [rule for rule in own if rule.replace("_", "-") not in anchors] == []
    said = [rule["annotations"]["what_to_do"] for rule in rules()]
    assert [place for place in said if place.removeprefix("docs/operations.md#") not in anchors] == []
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(#([\w-]+)\)", text) if link not in anchors] == []


def test_every_rule_has_a_severity_a_summary_and_an_expression_that_is_closed() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] and rule["annotations"]["summary"], rule["alert"]
    for expression in expressions():
        assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]")), expression
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_the_panels_of_the_dashboard_do_not_lie_upon_each_other() -> None:
    board = json.loads((ROOT / "docs/grafana-dashboard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_every_metric_that_the_examples_ask_for_is_one_that_is_served() -> None:
    folder = ROOT / "jobs" / "serve"
    if not folder.is_dir():
        pytest.skip("nothing serves metrics")
    served = set(METRIC.findall("".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))))
    asked = {re.sub(r"_(total|bucket)$", "", name) for expression in expressions() for name in METRIC.findall(expression)}
    assert sorted(asked - {re.sub(r"_total$", "", name) for name in served}) == []
