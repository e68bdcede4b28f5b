"""The commands' arguments and help. What a command does is imported when it runs, so that `docmill --help` is quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = """\b
Exit codes:
  0    done: every document is complete, or was already
  1    a document failed or was refused, or something went wrong
  2    the command line or a setting is wrong
  3    the database cannot be reached
  130  interrupted or told to end (143 where it waited for nothing); what was submitted stays queued
"""

app = typer.Typer(
    help="Documents go in; parsed, chunked, embedded and searchable rows come out of Postgres.\n\nAll settings are environment "
    "variables or lines of `.env`: docs/configuration.md. Without DATABASE_URL an embedded Postgres starts by itself under .docmill/.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables, which hold documents and passwords
    rich_markup_mode=None,  # rich help takes twice as long to come up
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _path(word: str) -> Path:
    """Return a path; an empty word, as of a variable that is not set, is not the working directory."""
    if not word:
        raise typer.BadParameter("a path must not be empty; `.` is the working directory.")
    return Path(word)


def name(word: str) -> str:
    """Return what names a document, batch or user; an empty word, as of a variable that is not set, is the beginning of every id."""
    if not word:
        raise typer.BadParameter("a name must not be empty.")
    return word


Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
User = Annotated[str, typer.Option("--user", parser=name, metavar="USER", help="Whose documents they are.")]


class Mode(StrEnum):
    """How to search."""

    HYBRID = "hybrid"
    VECTOR = "vector"
    TEXT = "text"


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(f"docmill {version('docmill')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    _version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which release this is.")] = False,
) -> None:
    """Take what stands before any command."""


@app.command(epilog=EXIT_CODES)
def ingest(
    path: Annotated[
        list[Path], typer.Argument(parser=_path, metavar="PATH", help="Files, folders and zip archives. A folder or zip is one batch.")
    ],
    *,
    user: User = "default",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until every document has ended.")] = True,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Work on them here, or leave that to other workers.")] = True,
    priority: Annotated[int, typer.Option(metavar="N", help="Higher is worked on first.")] = 0,
    batch_id: Annotated[str | None, typer.Option(parser=name, metavar="ID", help="What the batch of one folder or zip is called.")] = None,
    json: Json = False,
) -> None:
    """Submit documents and see them through.

    Nested files are included, archives are unpacked; hidden and system files are skipped. Submitting again what has not changed does
    nothing; changed content becomes a new version. A bad file is reported and keeps no other from going on.
    """
    from jobs.cli.ingest import Options, run  # noqa: PLC0415

    raise typer.Exit(run(path, Options(user=user, wait=wait, worker=worker, priority=priority, batch_id=batch_id, json=json)))


@app.command(epilog=EXIT_CODES)
def sync(
    folder: Annotated[Path, typer.Argument(parser=_path, metavar="DIR", help="The folder.")],
    *,
    user: User = "default",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until every document has ended.")] = True,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Work on them here, or leave that to other workers.")] = True,
    priority: Annotated[int, typer.Option(metavar="N", help="Higher is worked on first.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done; write nothing.")] = False,
    checksum: Annotated[bool, typer.Option("--checksum", help="Read every file, also those that look unchanged.")] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Believe a folder that is empty, or looks as if something were not mounted.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, and sync again whenever something changes. Waits for no document.")
    ] = False,
    poll: Annotated[
        float | None, typer.Option("--poll", min=0.1, metavar="SECONDS", help="With --watch: look this often, for shares without events.")
    ] = None,
    json: Json = False,
) -> None:
    """Bring what is stored of a folder in line with what lies there.

    New and changed files are submitted. A moved file is not parsed or embedded again, and its old document is found until the new one is
    complete. The document of a vanished file is deleted, unless the folder looks as if it were not whole: gone, empty or not readable.
    """
    from jobs.cli.sync import Options, run  # noqa: PLC0415

    options = Options(user=user, wait=wait and not dry_run, worker=worker, priority=priority, json=json, checksum=checksum,
                      dry_run=dry_run, allow_empty=allow_empty)  # fmt: skip
    raise typer.Exit(run(folder, options, watch=watch, poll=poll))


@app.command(epilog=EXIT_CODES)
def status(
    id: Annotated[
        str | None, typer.Argument(parser=name, metavar="[ID]", help="doc_id or batch_id, the beginning of one, or a file name.")
    ] = None,
    *,
    batch: Annotated[str | None, typer.Option("--batch", parser=name, metavar="ID", help="A batch_id, or the beginning of one.")] = None,
    json: Json = False,
) -> None:
    """Show where everything stands and what is stuck, or one document with its timeline, or one batch with its progress."""
    from jobs.cli.status import run  # noqa: PLC0415

    if id is not None and batch is not None:
        raise typer.BadParameter("name a document or a batch, not both.", param_hint="--batch")
    raise typer.Exit(run(id, batch=batch, json=json))


@app.command(epilog=EXIT_CODES)
def summary(
    batch: Annotated[str, typer.Argument(parser=name, metavar="BATCH", help="batch_id or the beginning of one, or a run_id.")],
    *,
    nested: Annotated[
        bool, typer.Option("--nested", help="Folders, their files and the sections of these, rather than the files.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what became of a batch: totals, files and timeline. With --json it is the document that front ends get."""
    from jobs.cli.summary import run  # noqa: PLC0415

    raise typer.Exit(run(batch, nested=nested, json=json))


@app.command(epilog=EXIT_CODES)
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    mode: Annotated[Mode, typer.Option(help="By both, by meaning, or by words.")] = Mode.HYBRID,
    limit: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Most passages to show.")] = 10,
    user: Annotated[str | None, typer.Option("--user", parser=name, metavar="USER", help="Only this user's documents.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", parser=name, metavar="ID", help="Only documents of this batch.")] = None,
    type: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only pdf, word, excel, powerpoint, html, ...")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="KEY=VALUE", help="Only documents submitted with this metadata; VALUE may be JSON. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Find passages, with their file, page and heading."""
    from jobs.cli.search import Filters, run  # noqa: PLC0415

    raise typer.Exit(run(query, str(mode), limit, Filters(user, batch, type, tuple(metadata or ())), json=json))


@app.command(epilog=EXIT_CODES)
def cancel(
    id: Annotated[list[str], typer.Argument(parser=name, metavar="ID", help="doc_ids or batch_ids, the beginning of one, or a file name.")],
    *,
    json: Json = False,
) -> None:
    """Cancel documents or whole batches. What searches see stays; submitting again goes on where they were left."""
    from jobs.cli.removal import cancel_some  # noqa: PLC0415

    raise typer.Exit(cancel_some(id, json=json))


@app.command(epilog=EXIT_CODES)
def delete(
    id: Annotated[list[str], typer.Argument(parser=name, metavar="ID", help="Whole doc_ids or batch_ids.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete documents or whole batches with passages, text and files, in whatever state they are. The audit trail stays."""
    from jobs.cli.removal import delete_some  # noqa: PLC0415

    raise typer.Exit(delete_some(id, yes=yes, json=json))


@app.command(epilog=EXIT_CODES)
def extract(
    id: Annotated[list[str] | None, typer.Argument(parser=name, metavar="DOC_ID", help="Documents whose extraction failed.")] = None,
    *,
    all: Annotated[bool, typer.Option("--all", help="All such documents, or those that the filters name.")] = False,
    batch: Annotated[str | None, typer.Option("--batch", parser=name, metavar="ID", help="Only documents of this batch.")] = None,
    user: Annotated[str | None, typer.Option("--user", parser=name, metavar="USER", help="Only this user's documents.")] = None,
    json: Json = False,
) -> None:
    """Extract again where it failed. Nothing else is done or paid for again, and searches see the documents meanwhile."""
    from jobs.cli.extraction import requeue_all, requeue_some  # noqa: PLC0415

    if all == bool(id):
        raise typer.BadParameter("give either doc_ids or --all.", param_hint="DOC_ID")
    if (batch or user) and not all:
        raise typer.BadParameter("filters go with --all, not with doc_ids.", param_hint="--all")
    raise typer.Exit(requeue_all(batch, user, json=json) if all else requeue_some(id or [], json=json))


@app.command(epilog=EXIT_CODES)
def prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Remove files that belong to nothing also where there are suspiciously many.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove what has been kept long enough, by the settings *_RETENTION_DAYS and ORPHAN_FILE_DAYS, as a worker does every hour."""
    from jobs.cli.prune import run  # noqa: PLC0415

    raise typer.Exit(run(dry_run=dry_run, orphans=orphans, json=json))


@app.command(epilog=EXIT_CODES)
def index() -> None:
    """Build the vector index of the model that serves searches, if it pays, where workers may not: as the owner of the tables.

    An open re-embedding gets what it waits for as well: the index of its vectors built, or one that it leaves behind dropped.
    """
    from jobs.cli.index import run  # noqa: PLC0415

    raise typer.Exit(run())


@app.command(epilog=EXIT_CODES)
def migrate() -> None:
    """Bring the database to the present schema; safe to run twice and from two hosts at once."""
    from jobs.cli.migrate import run  # noqa: PLC0415

    raise typer.Exit(run())


@app.command(epilog=EXIT_CODES)
def worker(
    queues: Annotated[
        str | None, typer.Option(metavar="Q1,Q2", help="Queues to listen to: cpu, embed, extract. All, if not given.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, metavar="N", help="Documents in hand at a time.")] = None,
) -> None:
    """Work on queued documents until stopped, as `procrastinate --app=procrastinate_app.app worker` does.

    The first SIGINT or SIGTERM lets the work in hand come to a good end; a second one leaves at once.
    """
    from jobs.cli.worker import run  # noqa: PLC0415

    raise typer.Exit(run(queues, concurrency))


@app.command(epilog=EXIT_CODES)
def serve(
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Where to listen; SERVE_HOST, this machine only, if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, metavar="N", help="Port; SERVE_PORT if not given.")] = None,
    *,
    read_only: Annotated[bool, typer.Option("--read-only", help="Only show; nothing can be requeued or discarded.")] = False,
) -> None:
    """Serve the dashboard, /healthz, /readyz and /metrics until stopped. Beyond this machine it needs SERVE_TOKEN: docs/serve.md."""
    from jobs.cli.serve import run  # noqa: PLC0415

    raise typer.Exit(run(host, port, read_only=read_only))
