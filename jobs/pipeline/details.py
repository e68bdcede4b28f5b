"""What the audit trail says of each stage beside its times. Facts and counts, never content."""

from __future__ import annotations

from typing import Any

from models.documents import Document


def stage_detail(stage: str, document: Document) -> dict[str, Any]:
    """Return the detail of a stage's event."""
    match stage:
        case "validate":
            return {"file_type": document.file_type, "mime_type": document.mime_type, "file_size": document.file_size}
        case "parse":
            made: dict[str, Any] = {"parser": document.parser, "pages": len(document.pages), "characters": len(document.markdown or "")}
            for name in ("parsed_locally", "failed_pages", "cut_by", "pages_kept", "pages_of"):
                if name in document.parse_metadata:
                    made[name] = document.parse_metadata[name]
            return made | _reused(document)
        case "check":
            return {"characters": len(document.markdown or ""), "duplicate_of": document.duplicate_of}
        case "chunk":
            return {"chunks": len(document.chunks or ())}
        case "embed":
            return {"model": document.embedding_model, "chunks": len(document.chunks or ()), "embedded": document.embedded_count}
        case _:
            return _reused(document) if stage == "extract" else {}


def _reused(document: Document) -> dict[str, Any]:
    return {} if document.reused_from is None else {"reused_from": document.reused_from}
