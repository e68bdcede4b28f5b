"""The task that unpacks an archive, registered on the App."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.retry import StageRetry
from models.errors import PermanentError
from models.stages import CPU_QUEUE
from procrastinate_app import app

if TYPE_CHECKING:
    from jobs.adapters.sandbox import ProcessSandbox
    from jobs.batch.unpacking import Unpacker

_settings = app.settings
_unpackers: list[Unpacker] = []


def _sandbox(folder: Path) -> ProcessSandbox:
    """Return a sandbox for one archive: its child may write to the archive's folder, and larger files than parsers may."""
    from jobs.adapters.sandbox import ProcessSandbox  # noqa: PLC0415 - an idle worker does without
    from jobs.adapters.sandbox_child import Limits  # noqa: PLC0415

    return ProcessSandbox(
        children=1,
        limits=Limits(
            timeout=_settings.parse_timeout_seconds,
            memory_mb=_settings.parse_memory_mb,
            max_output_mb=max(_settings.max_archive_mb, _settings.max_file_size_mb) + 1,
        ),
        writable=folder,
        loaded=False,
    )


async def _forget() -> None:
    _unpackers.clear()


def _unpacker() -> Unpacker:
    """Return this worker's unpacker, made on first use."""
    from jobs.batch.unpacking import Unpacker  # noqa: PLC0415 - an idle worker does without

    if not _unpackers:
        _unpackers.append(Unpacker(settings=_settings, pool=app.pool, sandbox=_sandbox, stopping=app.stopping))
        app.at_close.append(_forget)
    return _unpackers[0]


@app.task(
    name="unpack",
    queue=CPU_QUEUE,
    retry=StageRetry(
        max_attempts=_settings.max_retry_attempts, base=_settings.retry_base_delay_seconds, max_delay=_settings.retry_max_delay_seconds
    ),
)
async def unpack(archive_id: int) -> None:
    """Unpack an archive of a batch, or go on with it. What it is and how far it has come stands in its row of batch_archives."""
    if not isinstance(archive_id, int):
        raise PermanentError(f"The task unpack takes an archive_id, a number; it was given {archive_id!r}.")
    await _unpacker().run(archive_id)
