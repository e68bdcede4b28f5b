"""`docmill index`: what a worker's maintenance does for the vector index, done by whoever may and at once."""

from __future__ import annotations

from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from jobs.maintenance import MOST_DIMENSIONS, Table, drop_index, look_after_index
from models.settings import Settings, load_settings

_SAID = {
    "not needed": "There are fewer passages than VECTOR_INDEX_THRESHOLD: searches compare with all of them.",
    "too wide": f"An index takes vectors of at most {MOST_DIMENSIONS:,} dimensions: searches compare with all passages.",
    "ready": "The vector index is there.",
    "built": "The vector index has been built.",
}


def run() -> ExitCode:
    """Build or drop what is due and say what was found or done."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_look_after(settings))


async def _look_after(settings: Settings) -> ExitCode:
    """Do first what an open re-embedding waits for: it decides where the serving model's index is to be."""
    for due in await rows(settings, "reembedding_steps"):
        for run in await rows(settings, "find_reembedding", reembedding_id=due["reembedding_id"]):
            done = await _do_for(settings, due["step"], run)
            if done:
                say("The open re-embedding has the index work done that it waited for; workers go on within a minute.")
            elif done is False:
                complain("Only the owner of the tables may do what the re-embedding waits for, unless a worker is doing it at this moment.")
                return ExitCode.FAILED
    return await _build(settings)


async def _do_for(settings: Settings, step: str, run: Row) -> bool | None:
    """Build or drop the index for a step of a re-embedding; say whether that could be done, None where none is due. Workers do the rest."""
    model, dimensions = run["to_model"], run["dimensions"]
    match step:
        case "list" if run["switched_at"] is not None:
            return await drop_index(settings, run["from_model"], run["from_dimensions"], "document_chunks")
        case "finish" | "forget" if dimensions is not None:
            return await drop_index(settings, model, dimensions, "chunk_embeddings")
        case "index" | "settle" if dimensions is not None:
            table: Table = "chunk_embeddings" if step == "index" else "document_chunks"
            outcome = await look_after_index(settings, model, dimensions, table=table, even_under_load=True)
            return outcome not in ("not allowed", "busy elsewhere")
    return None


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
