"""`docmill index`: what a worker's maintenance does for the vector index, done by whoever may and at once."""

from __future__ import annotations

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, say
from jobs.cli.session import quiet_logs, rows, run_async
from jobs.maintenance import MOST_DIMENSIONS, look_after_index
from models.settings import Settings, load_settings

_SAID = {
    "not needed": "There are fewer passages than VECTOR_INDEX_THRESHOLD: searches compare with all of them.",
    "too wide": f"An index takes vectors of at most {MOST_DIMENSIONS:,} dimensions: searches compare with all passages.",
    "ready": "The vector index is there.",
    "built": "The vector index has been built.",
}


def run() -> ExitCode:
    """Build the index and say what was found or done."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_build(settings))


async def _build(settings: Settings) -> ExitCode:
    serving = await rows(settings, "serving_model")
    if not serving:
        say("There are no passages yet.")
        return ExitCode.OK
    place = await rows(settings, "where_served_vectors_lie", embedding_model=serving[0]["embedding_model"])
    if place[0]["table_name"] != "document_chunks":
        say("A re-embedding is moving vectors into document_chunks; it builds the index once all of them have arrived.")
        return ExitCode.OK
    outcome = await look_after_index(settings, serving[0]["embedding_model"], serving[0]["dimensions"], even_under_load=True)
    if outcome in _SAID:
        say(_SAID[outcome])
        return ExitCode.OK
    complain("Only the owner of the tables may build it." if outcome == "not allowed" else "A worker is building it at this moment.")
    return ExitCode.FAILED
