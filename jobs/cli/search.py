"""`docmill search`: the query becomes a vector, the SQL functions find passages."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from psycopg.types.json import Jsonb
from rich.padding import Padding
from rich.text import Text

from jobs.adapters.embedders import HostedEmbedder
from jobs.arguments import check_metadata
from jobs.cli.errors import ExitCode
from jobs.cli.output import complain, out, print_json, printable, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from jobs.serving import embedder_of, own_embedder
from jobs.stages import Embedder
from models.documents import FileType
from models.errors import ConfigurationError, SubmitError
from models.settings import Settings, load_settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXCERPT = 400
"""Characters of a passage that are shown; --json gives the whole."""

_QUERIES = {"hybrid": "search_passages_hybrid", "vector": "search_passages_by_vector", "text": "search_passages_by_text"}


@dataclass(frozen=True, slots=True)
class Filters:
    """What the documents must be, as the command line has it."""

    user: str | None = None
    batch: str | None = None
    type: str | None = None
    metadata: tuple[str, ...] = ()


def parse_metadata(pairs: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` pairs as metadata. A value that is JSON is taken so (`year=2026`, `no="7"`), any other as text.

    BadParameter for what is no pair, and what no document's metadata can hold.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"{pair!r} is not of the form KEY=VALUE.", param_hint="--metadata")
        try:
            found[key] = jsonlib.loads(value, parse_constant=str)
        except ValueError:
            found[key] = value
        except RecursionError:
            raise typer.BadParameter(f"the value of {key!r} is nested too deeply.", param_hint="--metadata") from None
    try:
        check_metadata(found)
    except SubmitError as error:
        raise typer.BadParameter(str(error), param_hint="--metadata") from None
    return found


def _refuse(query: str, filters: Filters) -> None:
    if not query.strip():
        raise typer.BadParameter("must not be empty.", param_hint="QUERY")
    if filters.type is not None and filters.type not in set(FileType):
        raise typer.BadParameter(f"{filters.type!r} is no type; there are {', '.join(FileType)}.", param_hint="--type")


def run(query: str, mode: str, limit: int, filters: Filters, *, json: bool) -> ExitCode:
    """Search and print what was found. Finding nothing is no error, but looking in a batch that is not there is."""
    query = query.replace("\x00", " ").encode("utf-8", "replace").decode()
    _refuse(query, filters)
    params = {
        "text": query,
        "limit": limit,
        "user_id": filters.user,
        "batch_id": filters.batch,
        "file_type": filters.type,
        "metadata": Jsonb(parse_metadata(filters.metadata)) if filters.metadata else None,
    }
    settings = load_settings()
    quiet_logs(settings)
    found = run_async(_search(settings, mode, params))
    if not found and filters.batch is not None and not run_async(_has_batch(settings, filters.batch)):
        complain(f'There is no batch "{printable(filters.batch)}": --batch takes a whole id.')
        return ExitCode.FAILED
    if json:
        print_json(found)
    else:
        _print(found)
    return ExitCode.OK


async def _has_batch(settings: Settings, batch_id: str) -> bool:
    return any(row["batch_id"] == batch_id for row in await rows(settings, "find_batches", word=batch_id, limit=1))


async def _search(settings: Settings, mode: str, params: dict[str, Any]) -> list[Row]:
    if mode == "text":
        return await rows(settings, _QUERIES[mode], **params)
    while True:
        model = await _serving(settings)
        vectors = await _embed(_embedder(settings, model), params["text"])
        found = await rows(settings, _QUERIES[mode], **params, vector=vectors[0], embedding_model=model)
        if await _serving(settings) == model:
            return found
        # Searches went over to another model meanwhile, which alone is sure to know every passage.


async def _embed(embedder: Embedder, text: str) -> NDArray[np.float32]:
    try:
        return await embedder.embed([text], kind="query")
    finally:
        if isinstance(embedder, HostedEmbedder):
            await embedder.aclose()


async def _serving(settings: Settings) -> str:
    """Return the model that queries must be embedded with; while there are no passages, the one of EMBEDDING_PROVIDER."""
    served = await rows(settings, "serving_model")
    return str(served[0]["embedding_model"]) if served else own_embedder(settings).model


def _embedder(settings: Settings, model: str) -> Embedder:
    try:
        return embedder_of(settings, model)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"Searches by meaning are served by another model than can be made here. {error} --mode text works."
        ) from error


def _pages(row: Row) -> str:
    first, last = row["page_start"], row["page_end"]
    if first is None:
        return ""
    return f"page {first}" if last in (None, first) else f"pages {first} to {last}"


def excerpt(content: str, length: int = EXCERPT) -> str:
    """Return the beginning of a passage in one line, cut between words."""
    flat = " ".join(content.split())
    return flat if len(flat) <= length else flat[:length].rsplit(" ", 1)[0] + " …"


def _print(found: list[Row]) -> None:
    if not found:
        say("Nothing found.")
    for number, row in enumerate(found, start=1):
        where = " > ".join(row["heading_path"] or ())
        head = Text(f"{number}. ", style="dim") + Text(printable(row["file_name"]), style="bold")
        for part in (_pages(row), where):
            head += Text(f"  {printable(part)}" if part else "", style="cyan")
        out().print(head + Text(f"  {row['score']:.4f}", style="dim"), soft_wrap=True)
        out().print(Padding(Text(printable(excerpt(row["content"]))), (0, 0, 0, 3)))
