"""Names, text and errors of others move no terminal: every command of `docmill`, over rows that hold escapes wherever they can."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import typer
from loguru import logger

from jobs.cli import main
from jobs.cli.commands import app
from models.settings import load_settings
from tests.sites import fill_with

NAMES = "\u202e[31m\u2066\ufeff"
"""What ids may hold: no control characters, but these turn a line round."""
WORDS = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nfine\u202e\x08\u2028"
DOCUMENT, BATCH = NAMES + "3", NAMES
ARGUMENTS: dict[str, list[list[str]]] = {
    "ingest": [["{folder}", "--no-worker", "--no-wait"]],
    "sync": [["{folder}", "--no-worker", "--no-wait"], ["{folder}", "--dry-run"]],
    "status": [[], [DOCUMENT], [BATCH], ["--batch", BATCH]],
    "summary": [[BATCH], [BATCH, "--nested"]],
    "search": [["pressure", "--mode", "text"], [WORDS], ["pressure", "--metadata", f"{WORDS}=x"]],
    "cancel": [[NAMES + "1"], [WORDS]],
    "delete": [[NAMES + "2", "--yes"], [WORDS, "--yes"]],
    "extract": [[DOCUMENT], [WORDS], ["--all"]],
    "prune": [["--dry-run"]],
    "migrate": [[]],
    "explain": [[DOCUMENT], [WORDS]],
    "logs": [[DOCUMENT], [WORDS]],
    "watch": [["--times", "1"]],
    "health": [[]],
    "dead list": [[], ["--batch", WORDS]],
    "dead show": [[DOCUMENT], [WORDS]],
    "dead requeue": [[WORDS], ["--all"]],
    "dead discard": [[DOCUMENT], [WORDS]],
    "breaker list": [[]],
    "breaker reset": [[NAMES], [WORDS]],
    "roles list": [[]],
    "roles grant": [[WORDS, "--user", NAMES]],
    "roles revoke": [[WORDS]],
    "reembed start": [["--to", "hash"]],
    "reembed status": [[]],
    "reembed pause": [[]],
    "reembed resume": [[]],
    "reembed switch": [[]],
    "reembed cancel": [[]],
}
"""Every command that ends by itself, with arguments that make it print what the rows hold, or complain of what it was given."""
UNTRIED = {"worker", "serve", "index", "roles create"}
"""Those that go on until they are stopped, and those that print nothing of others and change the whole server."""


def commands() -> set[str]:
    """All commands that there are, as they are typed."""
    found = {str(command.name or command.callback.__name__).replace("_", "-") for command in app.registered_commands if command.callback}
    for group in app.registered_groups:
        assert isinstance(group.typer_instance, typer.Typer)
        inner = (c for c in group.typer_instance.registered_commands if c.callback)
        found |= {f"{group.name} {c.name or c.callback.__name__}" for c in inner if c.callback}
    return found


def command_lines(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for command, variants in ARGUMENTS.items():
        for given in variants:
            yield command, [*command.split(), *(part.replace("{folder}", str(folder)) for part in given)]


@pytest.fixture
def filled(front_door: None, conn: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a hostile file name, and a database with hostile rows."""
    fill_with(conn, NAMES, WORDS)
    folder = tmp_path / "folder\x1b[31m\u202e"
    folder.mkdir()
    (folder / "a\x1b]0;owned\x07\r\n\u202e.txt").write_text(WORDS)
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")  # so that tracebacks are printed too
    load_settings.cache_clear()
    handlers, hooks = logging.root.handlers[:], (sys.excepthook, threading.excepthook)
    yield folder
    logging.root.handlers[:] = handlers
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    logger.remove()
    logger.configure(patcher=lambda _: None, extra={})


def printed(*arguments: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main(arguments)
    return out.getvalue(), err.getvalue()


def unsafe(text: str) -> list[str]:
    return sorted({letter for letter in text if not letter.isprintable() and letter != "\n"})


def test_no_command_prints_anything_that_a_terminal_obeys(filled: Path) -> None:
    assert commands() <= set(ARGUMENTS) | UNTRIED, "a new command is tried here too"
    seen = ""
    for _, arguments in command_lines(filled):
        out, err = printed(*arguments)
        assert unsafe(out + err) == [], (arguments, out, err)
        assert out + err, arguments
        seen += out
    assert seen.count("\\u202e") > 50 and "\\x1b]0;owned\\x07" in seen, "what is not shown proves nothing"


def test_json_for_programs_is_ascii_and_says_the_same(filled: Path) -> None:
    told = ""
    for command, arguments in command_lines(filled):
        out, err = printed(*arguments, "--json")
        assert out.isascii() and unsafe(out) == [], (arguments, out)
        assert unsafe(err) == [], (arguments, err)
        if out and command not in ("logs", "watch"):  # those print an object a line
            told += json.dumps(json.loads(out), ensure_ascii=False)
    assert "\u202e" in told
