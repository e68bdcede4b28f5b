"""`docmill prune`: remove what has been kept long enough, at once and everywhere."""

from __future__ import annotations

import psycopg

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, print_json, say
from jobs.cli.session import quiet_logs
from jobs.copies import Tidied, tidy_copies
from jobs.front import sync_connection
from jobs.leftovers import remove_noted_files
from jobs.orphans import find_orphans
from jobs.retention import SomebodyElsePrunes, prune_rows
from models.settings import Settings, load_settings


def run(*, dry_run: bool, orphans: bool, json: bool) -> ExitCode:
    """Prune and print what went, or would go. Nothing of a document that has not ended ever does."""
    settings = load_settings()
    quiet_logs(settings)
    with sync_connection(settings, None) as conn:
        try:
            removed = prune_rows(settings, conn, dry_run=dry_run)
        except SomebodyElsePrunes:
            complain("A worker, or somebody else, is pruning at this moment.")
            return ExitCode.FAILED
        found = find_orphans(settings, conn, believe=orphans, dry_run=dry_run)
        if not dry_run:
            _remove(settings, conn)
        copies = Tidied() if found.suspicious else tidy_copies(settings, conn, believe=orphans, dry_run=dry_run)
    removed |= {"orphaned files": found.noted, "temporary files": found.temporary, "copies of texts": copies.removed}
    suspicious = found.suspicious + copies.suspicious
    _show(removed, copies.written, suspicious, dry_run=dry_run, json=json)
    return ExitCode.FAILED if suspicious else ExitCode.OK


def _remove(settings: Settings, conn: psycopg.Connection) -> None:
    while remove_noted_files(settings, conn):  # what an open transaction might still refer to, a worker removes later
        pass


def _show(removed: dict[str, int], written: int, suspicious: int, *, dry_run: bool, json: bool) -> None:
    if json:
        print_json({"dry_run": dry_run, "removed": removed, "copies_written": written, "suspicious_files": suspicious})
    else:
        for what, count in removed.items():
            say(f"{count:>9,}", what)
        say("Nothing was removed: this was a dry run." if dry_run else "Removed.", style="dim")
        if written:
            say(f"Copies of texts that were missing: {written:,} {'would be' if dry_run else 'are'} written.")
    if suspicious:
        complain(
            f"{suspicious} files in storage belong to nothing in this database: too many to be left-overs, so they stay. "
            "Is it the right database? If they are to go: docmill prune --orphans"
        )
