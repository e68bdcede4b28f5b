"""Writing copies of texts for people, beside the work: whatever becomes of a copy, no document fails of it or waits for it.

What is told within one turn of the event loop, as by documents that were completed together, goes to the thread in one piece. A copy that
is not written for whatever reason is written by the hourly `prune` of some worker: see jobs/copies.py.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import dataclass
from queue import SimpleQueue

from loguru import logger

from jobs import clock
from jobs.adapters.storage.copies import TextCopies, copy_name
from jobs.pipeline.work import Work
from jobs.redaction import describe

MOST_BYTES = 64_000_000
"""Memory for texts that wait to be written, for where the storage is slower than the work. A larger one is taken if it is the only one."""
_SILENCE = 60.0
"""Seconds between two warnings."""
_LAST_SECONDS = 3.0
"""How long a worker that stops waits for copies on their way."""


@dataclass(frozen=True, slots=True)
class _Change:
    doc_id: str
    replaced: frozenset[str]
    """SHA-256 of the texts whose copies go."""
    sha256: str | None = None
    text: str | None = None
    size: int = 0
    """Bytes of memory."""


class Copier:
    """Belongs to one event loop, and to the worker that has committed what it is told of."""

    def __init__(self, copies: TextCopies, *, keep: bool) -> None:
        """Without `keep` nothing is written, and copies of what is no longer served go all the same."""
        self._copies, self._keep = copies, keep
        self._told: list[_Change] = []
        self._queue: SimpleQueue[list[_Change] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._waiting = 0  # bytes
        self._missed = 0
        self._warned_at = float("-inf")

    def add(self, work: Work, *, served: bool) -> None:
        """Take in a document whose last checkpoint has been committed: its text is served, or it is a duplicate and has none."""
        document, size = work.document, 0
        text, sha256 = (document.markdown, document.markdown_sha256) if served else (None, None)
        replaced = frozenset(work.dropped_texts - {sha256})
        if not self._keep:
            text = None
        elif text is not None:
            size = sys.getsizeof(text)
            if not self._has_room_for(size):
                self._miss("the storage is slower than the work")
                return  # an old copy is better than none
        if text is None and not replaced:
            return
        if not self._told:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._told.append(_Change(document.doc_id, replaced, sha256, text, size))

    def _has_room_for(self, size: int) -> bool:
        with self._lock:
            has_room = not self._waiting or self._waiting + size <= MOST_BYTES
            self._waiting += size if has_room else 0
        return has_room

    def _hand_over(self) -> None:
        told, self._told = self._told, []
        if self._thread is None:
            # A daemon: a share that has stopped answering must not keep a worker from leaving.
            thread = threading.Thread(target=self._run, name="copier", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has none left
                with self._lock:
                    self._waiting -= sum(change.size for change in told)
                self._miss(describe(error))
                return
            self._thread = thread
        self._queue.put(told)

    def _run(self) -> None:
        while (changes := self._queue.get()) is not None:
            while changes:
                self._make(changes.pop(0))

    def _make(self, change: _Change) -> None:
        try:
            if change.text is not None and change.sha256 is not None:
                self._copies.write(copy_name(change.doc_id, change.sha256), change.text)
        except Exception as error:  # the thread must go on, whatever it is
            self._miss(describe(error))
        finally:
            with self._lock:
                self._waiting -= change.size
        try:
            for sha256 in change.replaced:
                self._copies.remove(copy_name(change.doc_id, sha256))
        except Exception as error:
            self._miss(describe(error))

    def _miss(self, why: str) -> None:
        with self._lock:
            self._missed += 1
            if clock.seconds() - self._warned_at < _SILENCE:
                return
            self._warned_at, missed, self._missed = clock.seconds(), self._missed, 0
        logger.warning(
            "Copies of parsed texts for people (STORAGE_EXTRACTED_DIR) could not be brought up to date, {} since the last warning; the "
            "documents are as they should be, and the copies follow within a day where workers run round the clock. The last one: {}",
            missed,
            why,
        )

    async def aclose(self) -> None:
        """Write what is on its way, as far as it takes no longer than some seconds."""
        if self._told:
            self._hand_over()
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join, _LAST_SECONDS)
