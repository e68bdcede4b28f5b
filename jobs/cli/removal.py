"""`docmill cancel` and `docmill delete`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import typer

from jobs import cancel_batch, cancel_document, delete_batch, delete_document
from jobs.cli.errors import ExitCode
from jobs.cli.naming import documents_named
from jobs.cli.output import aside, complain, print_json, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from jobs.front import close_sync
from models.errors import ConfigurationError, DocmillError, NotFound
from models.settings import Settings, load_settings


@dataclass(frozen=True, slots=True)
class Target:
    """What a word names."""

    kind: Literal["document", "batch"]
    id: str
    given: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A word that nothing was done for, and why."""

    given: str
    error: str


def cancel_some(words: Iterable[str], *, json: bool) -> ExitCode:
    """Cancel what the words name, as `docmill status` understands them."""

    def cancel(target: Target) -> Row:
        if target.kind == "batch":
            return {**asdict(target), "cancelled": cancel_batch(target.id)}
        return {**asdict(target), "state": str(cancel_document(target.id))}

    settings = _start()
    targets, refused = _resolve(settings, words, exactly=False)
    return _finish(targets, refused, cancel, json=json)


def delete_some(words: Iterable[str], *, yes: bool, json: bool) -> ExitCode:
    """Delete what the words name, whole ids only; a person at a terminal is asked first."""

    def delete(target: Target) -> Row:
        if target.kind == "batch":
            count = delete_batch(target.id)
            if count is None:
                raise NotFound(f'There is no batch "{target.id}" any more.')
            return {**asdict(target), "deleted": count}
        if not delete_document(target.id):
            raise NotFound(f'There is no document "{target.id}" any more.')
        return {**asdict(target), "deleted": 1}

    settings = _start()
    targets, refused = _resolve(settings, words, exactly=True)
    if targets and not yes and sys.stdin.isatty():
        for target in targets:
            say(f"  {target.kind:<8}", target.id, console=aside())
        if not typer.confirm("Delete with everything that belongs to it?", err=True):
            return ExitCode.FAILED
    return _finish(targets, refused, delete, json=json)


def _start() -> Settings:
    settings = load_settings()
    quiet_logs(settings)
    return settings


def _resolve(settings: Settings, words: Iterable[str], *, exactly: bool) -> tuple[list[Target], list[Refused]]:
    targets: list[Target] = []
    refused: list[Refused] = []

    async def look() -> None:
        for word in dict.fromkeys(words):
            found = await _named(settings, word, exactly=exactly)
            if len(found) == 1:
                targets.append(found[0])
                continue
            what = "id of a document or batch" if exactly else "document and no batch"
            error = f'"{word}" could be any of {len(found)}.' if found else f'"{word}": there is no such {what}.'
            refused.append(Refused(word, error))
            complain(error)

    run_async(look())
    return list(dict.fromkeys(targets)), refused


async def _named(settings: Settings, word: str, *, exactly: bool) -> list[Target]:
    """Return what a word may mean: what has it for an id, else the files of that name and what begins with it."""
    documents = [row["doc_id"] for row in await documents_named(settings, word, 11)]
    batches = [row["batch_id"] for row in await rows(settings, "find_batches", word=word, limit=11)]
    found = [Target("document", it, word) for it in documents] + [Target("batch", it, word) for it in batches]
    exact = [target for target in found if target.id == word]
    return exact if exactly or exact else found


def _finish(targets: list[Target], refused: list[Refused], act: Callable[[Target], Row], *, json: bool) -> ExitCode:
    """Do it to each; one that cannot be done keeps no other from it."""
    done: list[Row] = []
    try:
        for target in targets:
            try:
                done.append(act(target))
            except ConfigurationError:
                raise
            except DocmillError as error:
                refused.append(Refused(target.given, str(error)))
                complain(str(error))
                continue
            if not json:
                say(_told(done[-1]))
    finally:
        close_sync()
    if json:
        print_json({"done": done, "refused": [asdict(it) for it in refused]})
    return ExitCode.FAILED if refused else ExitCode.OK


def _told(row: Row) -> str:
    if "state" in row:
        return f"document {row['id']}: {row['state']}"
    verb = "cancelled" if "cancelled" in row else "deleted"
    if row["kind"] == "document":
        return f"document {row['id']}: {verb}"
    return f"batch {row['id']}: {row[verb]} document{'' if row[verb] == 1 else 's'} {verb}"
