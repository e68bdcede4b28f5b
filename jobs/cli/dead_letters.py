"""`docmill dead`: list, show, requeue and discard dead letters."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import psycopg

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, moment, print_json, say, table
from jobs.cli.session import Row, quiet_logs, rows, run_async
from jobs.redaction import describe
from models.errors import DocmillError
from models.settings import Settings, load_settings

AT_A_TIME = 500
"""Documents that one transaction of `--all` takes up again."""
_REFUSALS = (psycopg.errors.NoDataFound, psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.LockNotAvailable)
"""How the SQL functions say that a letter is unknown or has been dealt with, or that somebody holds its document."""


class NotOneLetter(DocmillError):
    """A word names no dead letter, or two."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which dead letters; None for any."""

    error_type: str | None = None
    stage: str | None = None
    batch_id: str | None = None
    user_id: str | None = None


def _start(work: Coroutine[Any, Any, ExitCode], settings: Settings) -> ExitCode:
    quiet_logs(settings)
    return run_async(work)


def show_list(filters: Filters, limit: int, *, json: bool) -> ExitCode:
    """Print the open dead letters."""
    settings = load_settings()
    return _start(_list(settings, filters, limit, json=json), settings)


def show_one(word: str, *, json: bool) -> ExitCode:
    """Print one dead letter."""
    settings = load_settings()
    return _start(_show(settings, word, json=json), settings)


def requeue_some(words: Iterable[str], *, priority: int | None = None, json: bool) -> ExitCode:
    """Requeue the dead letters that the words name, with another priority if one is given.

    One that cannot be is reported and keeps no other from it.
    """
    settings = load_settings()
    return _start(_resolve(settings, words, "requeue_dead_letter", "requeued", priority, json=json), settings)


def discard_some(words: Iterable[str], *, json: bool) -> ExitCode:
    """Discard the dead letters that the words name; one that cannot be is reported and keeps no other from it."""
    settings = load_settings()
    return _start(_resolve(settings, words, "discard_dead_letter", "discarded", None, json=json), settings)


def requeue_all(filters: Filters, *, priority: int | None = None, json: bool) -> ExitCode:
    """Requeue all open dead letters that match, with another priority if one is given."""
    settings = load_settings()
    return _start(_requeue_all(settings, filters, priority, json=json), settings)


async def _list(settings: Settings, filters: Filters, limit: int, *, json: bool) -> ExitCode:
    found = await rows(settings, "list_dead_letters", limit=limit, **asdict(filters))
    total = found[0].pop("total") if found else 0
    for row in found[1:]:
        del row["total"]
    if json:
        print_json({"total": total, "dead_letters": found})
        return ExitCode.OK
    if not found:
        say("There is no open dead letter" + (" that matches." if filters != Filters() else "."))
        return ExitCode.OK
    cells = [
        [r["id"], r["file_name"] or r["doc_id"], r["stage"], r["error_type"], r["error_message"], moment(r["created_at"])] for r in found
    ]
    shown = "" if len(found) == total else f", the newest {len(found)}"
    table(f"Open dead letters: {total}{shown}", ["number", "file", "stage", "error", "reason", "since"], cells, numbers=["number"])
    say("`docmill dead show NUMBER` tells more, `docmill dead requeue NUMBER` tries again.")
    return ExitCode.OK


async def _find(settings: Settings, word: str) -> int:
    """Return the number of the dead letter that a word names. Raises NotOneLetter."""
    is_number = word.isascii() and word.isdigit() and int(word) < 2**63
    found = await rows(settings, "find_dead_letters", word=word, number=int(word) if is_number else None)
    if not found:
        raise NotOneLetter(f'There is no dead letter "{word}": neither a number nor a doc_id.')
    if len(found) > 1:
        other = next(row["id"] for row in found if row["id"] != int(word))
        by_number = next(row["doc_id"] for row in found if row["id"] == int(word))
        raise NotOneLetter(
            f'"{word}" is a doc_id, whose dead letter is {other}, and the number of one of document "{by_number}": name it by the other.'
        )
    number: int = found[0]["id"]
    return number


async def _show(settings: Settings, word: str, *, json: bool) -> ExitCode:
    row = (await rows(settings, "show_dead_letter", id=await _find(settings, word)))[0]
    if json:
        print_json(row)
        return ExitCode.OK
    say(f"Dead letter {row['id']}:", row["file_name"] or row["doc_id"], style="bold")
    resolved = f"{row['resolution']} at {moment(row['resolved_at'])}" if row["resolved_at"] else "open"
    facts = {
        "letter": resolved,
        "doc_id": row["doc_id"],
        "document": row["state"] or "no longer exists",
        "version": row["version"],
        "batch": row["batch_id"],
        "user": row["user_id"],
        "stage": row["stage"],
        "error": f"{row['error_type']}: {row['error_message']}",
        "since": moment(row["created_at"]),
        "correlation": row["correlation_id"],
        **row["context"],
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name:<13}", value)
    for line in (row["traceback"] or "").rstrip("\n").split("\n"):
        say(f"  {line}")
    if row["how_to_requeue"]:
        say(f"`docmill dead requeue {row['id']}` takes it up again at {row['stage']}; `docmill dead discard {row['id']}` puts it away.")
    return ExitCode.OK


async def _resolve(settings: Settings, words: Iterable[str], name: str, outcome: str, priority: int | None, *, json: bool) -> ExitCode:
    """Do one of the SQL functions to each letter, each in a transaction of its own."""
    before = (await rows(settings, "look_at_dead_letters"))[0]["at"]
    done: list[Row] = []
    refused: list[Row] = []
    for word in dict.fromkeys(words):
        try:
            number = await _find(settings, word)
            answer = (await rows(settings, name, id=number, priority=priority))[0]
        except (NotOneLetter, *_REFUSALS) as error:
            refused.append({"given": word, "error": describe(error)})
            complain(describe(error))
            continue
        stage = answer.get("stage")
        done.append({"id": number, "given": word, "stage": stage})
        if not json:
            say(f"dead letter {number}: {outcome}" + (f", goes on at {stage}" if stage else ""))
    batches = (await rows(settings, "reopen_batches", since=before))[0]["batches"]
    if json:
        print_json({outcome: done, "refused": refused, "batches_reopened": batches})
    return ExitCode.FAILED if refused else ExitCode.OK


async def _requeue_all(settings: Settings, filters: Filters, priority: int | None, *, json: bool) -> ExitCode:
    # Documents that fail once more meanwhile get new numbers, so this comes to an end.
    start = (await rows(settings, "look_at_dead_letters"))[0]
    count = 0
    params = {**asdict(filters), "max_count": AT_A_TIME, "up_to_id": start["last_id"], "priority": priority}
    while made := (await rows(settings, "requeue_dead_letters", **params))[0]["requeued"]:
        count += made
    batches = (await rows(settings, "reopen_batches", since=start["at"]))[0]["batches"]
    if json:
        print_json({"requeued": count, "batches_reopened": batches})
    else:
        say(f"{count} dead letter{'' if count == 1 else 's'} requeued")
    return ExitCode.OK
