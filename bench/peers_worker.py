"""docmill's app with the splitter and the embedding of the programs that `bench.peers` measures beside it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import jobs.serving
from jobs.adapters.embedders import HashedText
from jobs.pipeline.running import STAGE_FUNCTIONS
from jobs.stages import Tools
from jobs.stages.chunk import chunk_id
from models.chunks import Chunk
from models.documents import Document
from procrastinate_app import app

__all__ = ["app"]

SIZE, OVERLAP, DIMENSIONS = 1000, 100, 384


async def cut_at_fixed_lengths(document: Document, tools: Tools) -> Document:
    """Cut as those programs do, into passages that have what docmill's have."""
    text = document.markdown or ""
    made = []
    for index, start in enumerate(range(0, max(1, len(text) - OVERLAP), SIZE - OVERLAP)):
        content = text[start : start + SIZE]
        digest = hashlib.sha256(content.encode()).hexdigest()
        made.append(
            Chunk(
                id=chunk_id(document.doc_id, index, digest),
                index=index,
                content=content,
                content_sha256=digest,
                heading_path=(),
                page_start=None,
                page_end=None,
                char_start=start,
                char_end=start + len(content),
            )
        )
    return replace(document, chunks=tuple(made))


STAGE_FUNCTIONS["chunk"] = cut_at_fixed_lengths
setattr(jobs.serving, "make_embedder", lambda settings, caller: HashedText(DIMENSIONS))  # noqa: B010 - for this process alone
