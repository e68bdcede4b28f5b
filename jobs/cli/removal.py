"""`docmill cancel` and `docmill delete`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import typer

from jobs import cancel_batch, cancel_document, delete_batch, delete_document
from jobs.cli.errors import ExitCode
from jobs.cli.naming import SHOWN, complain_of, documents_named
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
            documents, batches = await _named(settings, word, exactly=exactly)
            found = [Target("document", it["doc_id"], word) for it in documents] + [Target("batch", it["batch_id"], word) for it in batches]
            if len(found) == 1:
                targets.append(found[0])
            elif found:
                refused.append(Refused(word, f'"{word}" could be any of {len(found)}.'))
                complain_of(word, documents, batches)
            else:
                what = "id of a document or batch" if exactly else "document and no batch"
                refused.append(Refused(word, f'"{word}": there is no such {what}.'))
                complain(refused[-1].error)

    run_async(look())
    return list(dict.fromkeys(targets)), refused


async def _named(settings: Settings, word: str, *, exactly: bool) -> tuple[list[Row], list[Row]]:
    """Return the documents and batches that a word may mean: what has it for an id, else the files of that name and what begins with it."""
    documents = await documents_named(settings, word, SHOWN + 1)
    batches = await rows(settings, "find_batches", word=word, limit=SHOWN + 1)
    whole = [row for row in documents if row["doc_id"] == word], [row for row in batches if row["batch_id"] == word]
    return whole if exactly or any(whole) else (documents, batches)


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
