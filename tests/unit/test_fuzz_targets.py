"""What the fuzzer asserts holds for its seeds, for what it once found, and for some hundreds of inputs made of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_breaks_a_rule(target: str) -> None:
    given_seeds = seeds(target)
    for seed in given_seeds:
        TARGETS[target](seed)

    @settings(deadline=None, max_examples=150, database=None)
    @given(seed=st.sampled_from(given_seeds), cut=st.integers(0, 4000), at=st.integers(0, 4000), patch=st.binary(max_size=40))
    def mutated(seed: bytes, cut: int, at: int, patch: bytes) -> None:
        data = bytearray(seed[: max(cut, 1)] if cut % 2 else seed)
        data[at : at + len(patch)] = patch
        TARGETS[target](bytes(data))

    mutated()
