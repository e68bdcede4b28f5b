"""Which of those who come by a point a fault strikes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.faults import parse


def test_a_fault_spares_so_many_and_then_strikes_so_many(tmp_path: Path) -> None:
    (fault,) = parse(f"kill@kept;doc=a*;once={tmp_path / 'mark'};after=2;times=3")
    assert not fault.hits("kept", "b"), "another document is not counted"
    assert not fault.hits("keeping", "a1"), "nor is another point"
    assert [fault.hits("kept", "a1") for _ in range(7)] == [False, False, True, True, True, False, False]
    assert len(list(tmp_path.glob("mark*"))) == 3, "who was spared leaves no mark of a fault"


@pytest.mark.parametrize("line", ["kill", "kill@", "hug@kept", "kill@kept;often=2", "kill@kept;after=2"])
def test_what_is_no_fault_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="is no fault"):
        parse(line)
