"""What the server decides without a database: who comes in, where it may listen, how values and charts are shown."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import SecretStr

from jobs import health, serve
from jobs.adapters.storage import LocalStorage
from jobs.serve.charts import lines, stacked_bars
from jobs.serve.guard import cookie, host_names, name_of, our_own
from jobs.serve.rendering import _visible, ago, duration, link, money, number, or_id, size, tidy
from jobs.serve.run import check_place
from jobs.serve.sessions import MOST_SESSIONS, Sessions, Slowdown
from jobs.serve.tally import STAGE_BOUNDS, Durations
from jobs.transport import is_loopback
from models.errors import ConfigurationError
from models.settings import Settings

TOKEN = "correct-horse-battery-staple"


def test_a_token_lets_in_and_nothing_else_does() -> None:
    sessions = Sessions(TOKEN, seconds=60)
    assert sessions.needed
    assert sessions.is_token(TOKEN)
    assert [given for given in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "\udcff") if sessions.is_token(given)] == []
    assert not Sessions(None, seconds=60).is_token("")


def test_a_session_ends_with_its_time_or_when_it_is_signed_out() -> None:
    sessions = Sessions(TOKEN, seconds=60)
    one, other = sessions.begin(0), sessions.begin(0)
    assert one != other
    assert TOKEN not in one
    assert sessions.is_open(one, 59)
    assert not sessions.is_open(one, 60)
    sessions.end(other)
    assert not sessions.is_open(other, 1)
    assert not sessions.is_open(None, 0)
    assert not sessions.is_open("", 0)


def test_sessions_do_not_grow_without_bound() -> None:
    sessions = Sessions(TOKEN, seconds=60)
    first = sessions.begin(0)
    last = [sessions.begin(1) for _ in range(MOST_SESSIONS)][-1]
    assert not sessions.is_open(first, 2)
    assert sessions.is_open(last, 2)


def test_a_form_serves_only_the_visitor_and_the_process_it_was_made_for() -> None:
    sessions, restarted = Sessions(None, seconds=60), Sessions(None, seconds=60)
    token = sessions.form_token("visitor")
    assert sessions.is_form_token("visitor", token)
    assert not sessions.is_form_token("somebody else", token)
    assert not sessions.is_form_token(None, token)
    assert not sessions.is_form_token("visitor", "")
    assert not sessions.is_form_token("visitor", "ä")
    assert not restarted.is_form_token("visitor", token)


def test_who_guesses_waits_longer_each_time_and_others_do_not() -> None:
    slowdown, waits = Slowdown(), []
    for _ in range(12):
        slowdown.failed("1.2.3.4", 100)
        waits.append(slowdown.wait("1.2.3.4", 100))
    assert waits[:2] == [0, 0]
    assert waits[2:6] == [5, 10, 20, 40]
    assert waits[-1] == 60
    assert slowdown.wait("1.2.3.4", 161) == 0
    assert slowdown.wait("5.6.7.8", 100) == 0
    slowdown.failed("1.2.3.4", 100 + 3600)
    assert slowdown.wait("1.2.3.4", 100 + 3600) == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert is_loopback(host)
    check_place(Settings(serve_host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com", "localhost.example.com"])
def test_beyond_this_machine_nothing_is_served_without_a_token(host: str) -> None:
    with pytest.raises(ConfigurationError, match="SERVE_TOKEN"):
        check_place(Settings(serve_host=host))
    check_place(Settings(serve_host=host, serve_token=SecretStr(TOKEN)))


def test_a_short_token_is_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.settings import load_settings

    monkeypatch.setenv("SERVE_TOKEN", "hunter2-hunter")
    load_settings.cache_clear()
    with pytest.raises(ConfigurationError, match="SERVE_TOKEN is shorter than 16") as caught:
        load_settings()
    load_settings.cache_clear()
    assert "hunter2" not in str(caught.value)


def test_on_this_machine_only_its_own_names_reach_it() -> None:
    assert host_names(Settings()) == frozenset({"localhost", "127.0.0.1", "::1"})
    assert host_names(Settings(serve_host="0.0.0.0", serve_token=SecretStr(TOKEN))) is None
    named = host_names(Settings(serve_allowed_hosts="docs.example.com, Mill"))
    assert named is not None
    assert {"docs.example.com", "mill"} <= named


@pytest.mark.parametrize(
    ("header", "name"),
    [("localhost:8700", "localhost"), ("LOCALHOST", "localhost"), ("[::1]:80", "::1"), ("localhost.", "localhost"), ("", ""), ("[", ""),
     ("evil.example:80", "evil.example"), ("user@localhost", "localhost"), ("localhost:80/@evil", "localhost")],
)  # fmt: skip
def test_the_name_in_a_host_header_is_read_as_browsers_write_it(header: str, name: str) -> None:
    assert name_of(header) == name


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "", "/a\nb", "\\\\evil"]
)
def test_nobody_is_sent_on_to_another_site(target: str) -> None:
    assert our_own(target) == "/"


def test_one_is_sent_on_to_where_one_was() -> None:
    assert our_own("/document?id=a%2Fb&x=1") == "/document?id=a%2Fb&x=1"


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites() -> None:
    assert cookie("v", secure=True).split("; ") == ["docmill_session=v", "Path=/", "HttpOnly", "SameSite=Strict", "Secure"]


def test_values_are_shown_as_people_read_them() -> None:
    now = datetime.now(UTC)
    assert [duration(s) for s in (0.34, 2.46, 59, 200, 18_720, 273_600, None)] == [
        "340 ms",
        "2.5 s",
        "59 s",
        "3 min 20 s",
        "5 h 12 min",
        "3 d 4 h",
        "–",
    ]
    assert duration(timedelta(minutes=5)) == "5 min 0 s"
    assert [number(v) for v in (0, 1234567, 2.5, None)] == ["0", "1,234,567", "2.50", "–"]
    assert [size(v) for v in (0, 999, 1500, 25_000_000, None)] == ["0 B", "999 B", "1.5 kB", "25.0 MB", "–"]
    assert [money(v) for v in (0, 0.0004, 12.5, None)] == ["0.00", "0.0004", "12.50", "–"]
    assert [ago(now - timedelta(minutes=5)), ago(now + timedelta(hours=2, seconds=5)), ago(None)] == ["5 min ago", "in 2 h", "–"]


def test_text_that_would_turn_or_hide_its_neighbours_is_made_visible() -> None:
    assert _visible("invoice\u202egpj.exe") == "invoice\\u202egpj.exe"
    assert _visible("a\x00b\x1b[31m\u200b") == "a\\x00b\\x1b[31m\\u200b"
    assert _visible("two\nlines\tä") == "two\nlines\tä"
    assert or_id("\u3164\u2800\xad\u200d", "id") == or_id(None, "id") == "id"
    assert or_id("\u2060", "id") == "\u2060"  # is written as an escape
    assert tidy("x" * 30, 10) == "x" * 10 + " … (30 characters)"


def test_a_name_in_an_address_stays_one_value() -> None:
    assert link("/document", id="a/../b?c=d&e#f \u202e", state="") == "/document?id=a%2F..%2Fb%3Fc%3Dd%26e%23f+%E2%80%AE"


@pytest.mark.parametrize("draw", [stacked_bars, lines])
@pytest.mark.parametrize("values", [[1, 2, 3], [0, 0, 0], [None, None, None], []])
def test_a_chart_is_plain_svg_without_scripts_and_inline_styles(draw: type, values: list[float]) -> None:
    drawn = draw([str(i) for i in range(len(values))], {"complete": values, "failed": values}, title="<script>alert(1)</script>")
    root = ElementTree.fromstring(str(drawn))
    assert root.get("aria-label") == "<script>alert(1)</script>"
    everything = list(root.iter())
    assert [e.tag for e in everything if e.tag.rpartition("}")[2] in {"script", "style", "foreignObject", "a"}] == []
    assert [name for e in everything for name in e.attrib if name == "style" or name.startswith("on")] == []


def test_buckets_of_a_histogram_are_cumulative_and_end_with_all() -> None:
    durations = Durations([0] * (len(STAGE_BOUNDS) + 1))
    durations.add(0, 2, 0.006)
    durations.add(len(STAGE_BOUNDS), 1, 400)
    buckets = durations.cumulative(STAGE_BOUNDS)
    assert [buckets[0], *buckets[-2:]] == [("0.005", 2), ("300.0", 2), ("+Inf", 3)]


async def test_a_storage_that_hangs_is_not_asked_by_one_more_thread_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(storage_base_path=tmp_path / "storage")
    LocalStorage.prepared(settings)
    monkeypatch.setitem(health._storage_asked_at, settings.storage_base_path, time.monotonic() - 60)
    assert "has not answered for 60 s" in (await health._storage(settings)).message
    health._storage_asked_at.clear()
    assert (await health._storage(settings)).health in ("ok", "degraded")
    assert health._storage_asked_at == {}


def test_templates_hold_no_script_no_style_and_nothing_that_undoes_escaping() -> None:
    folder = Path(serve.__file__).parent / "templates"
    templates = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}
    assert len(templates) > 10
    undone = re.compile(r"\|\s*safe\b|autoescape|Markup|<style|\sstyle=|\son\w+=|<script(?! src=\"/static/live.js\")|javascript:", re.I)
    unquoted = re.compile(r"<[^>]*=\{\{")
    assert {name: found.group() for name, text in templates.items() if (found := undone.search(text) or unquoted.search(text))} == {}
