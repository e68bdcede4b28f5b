"""What a worker process says of its own memory."""

from __future__ import annotations

import ctypes

import pytest

from jobs.registry import give_back_memory, resident_mb


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps memory so, and gives it back when asked")
def test_what_a_large_document_has_left_free_is_given_back() -> None:
    held = [bytes(100_000) for _ in range(1500)]  # too small for mappings of their own, which would go back by themselves
    before = resident_mb()
    kept = held[::150]  # what lives on between the pieces keeps the heap from shrinking
    del held
    assert resident_mb() > before - 50
    give_back_memory()
    assert resident_mb() < before - 100
    assert len(kept) == 10
