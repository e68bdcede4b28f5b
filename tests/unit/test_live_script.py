"""The pages' script, run by Node over the few parts of a document that it touches. Skipped, and said so, where Node is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs/serve/static/live.js"
DOCUMENT = """
const part = (id, html) => ({
  id, innerHTML: html, hidden: !html, childNodes: [html], contains: () => false, querySelectorAll: () => [],
  replaceChildren(given) { this.innerHTML = given; this.childNodes = [given]; },
});
const parts = given => Object.fromEntries(Object.entries(given).map(([id, html]) => [id, part(id, html)]));
const steps = JSON.parse(require("fs").readFileSync(0, "utf8"));
const page = parts(steps.shown), seen = [];
const lost = { hidden: true, textContent: "" }, state = { hidden: true }, button = { addEventListener() {}, setAttribute() {} };
let tick, asked = 0, answer;
global.document = {
  hidden: false, activeElement: null, querySelectorAll: () => [],
  querySelector: s => s.startsWith("main") ? { dataset: { live: "5" } } : s === ".lost" ? lost : s === ".live-state" ? state : null,
  getElementById: id => id === "live-switch" ? button : page[id] || null,
};
global.window = { location: { href: "/", reload() {} }, setInterval(given) { tick = given; }, getSelection: () => null };
global.DOMParser = class {
  parseFromString(text) {
    const fresh = parts(JSON.parse(text));
    const all = Object.values(fresh);
    return { querySelectorAll: () => all, querySelector: s => s === "[data-part]" ? all[0] || null : null };
  }
};
global.fetch = () => {
  asked += 1;
  if (answer === "never") return new Promise(() => {});
  if (answer === "refused") return Promise.reject(new TypeError("no connection"));
  const headers = { get: () => answer.type || "text/html; charset=utf-8" };
  return Promise.resolve({ status: answer.status, ok: answer.status < 400, headers, text: async () => JSON.stringify(answer.parts) });
};
eval(steps.script);
(async () => {
  for (answer of steps.answers) {
    asked = 0;
    for (let i = 0; i < 3; i++) tick();
    await new Promise(done => setTimeout(done, 20));
    seen.push({ parts: Object.fromEntries(Object.values(page).filter(p => !p.hidden).map(p => [p.id, p.innerHTML])),
                lost: lost.hidden ? "" : lost.textContent, asked });
  }
  console.log(JSON.stringify(seen));
  process.exit(0);
})();
"""

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")


def watched(shown: dict[str, str], *answers: Any) -> list[dict[str, Any]]:
    """Open a page and give it these answers, one at a time; return what it shows and how often it has asked after each. Empty parts are
    hidden. Three times it is due to ask come at once."""
    steps = {"script": SCRIPT.read_text(encoding="utf-8"), "shown": shown, "answers": answers}
    done = subprocess.run(["node", "-e", DOCUMENT], input=json.dumps(steps), capture_output=True, text=True, timeout=60, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def page(status: int = 200, **parts: str) -> dict[str, Any]:
    return {"status": status, "parts": parts}


def test_what_comes_to_be_after_a_page_was_opened_is_shown_and_what_is_over_goes() -> None:
    seen = watched({"figures": "1", "alerts": ""}, page(figures="2", alerts="no worker"), page(figures="3", alerts=""))
    assert [now["parts"] for now in seen] == [{"figures": "2", "alerts": "no worker"}, {"figures": "3"}]


def test_an_answer_that_tells_of_trouble_renews_what_it_knows_and_is_no_lost_server() -> None:
    trouble, bare, well = watched({"health": "well", "figures": "1"}, page(503, health="down"), page(504), page(health="well", figures="2"))
    assert trouble["parts"] == bare["parts"] == {"health": "down", "figures": "1"}
    for now in (trouble, bare):
        assert now["lost"] and "does not answer" not in now["lost"]
    assert (well["parts"], well["lost"]) == ({"health": "well", "figures": "2"}, "")


def test_a_server_that_cannot_be_reached_is_said_to_be_lost() -> None:
    [lost] = watched({"health": "well"}, "refused")
    assert "does not answer" in lost["lost"] and lost["parts"] == {"health": "well"}


def test_a_page_asks_again_only_when_its_last_question_is_answered() -> None:
    assert [now["asked"] for now in watched({"health": "well"}, page(health="well"), "never", page(health="well"))] == [1, 1, 0]
