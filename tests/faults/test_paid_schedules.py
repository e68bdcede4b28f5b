"""13: random schedules of workers that die, freeze and stop before paid services that fail: the books are right, and nothing is paid twice.

What a schedule does is drawn from a seed before it begins; one that fails is printed, and can be played again without some of its actions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from models.settings import Settings
from tests.faults.books import OF_CHATS, OF_VECTORS, OUTCOMES, check_all
from tests.faults.paid import PASSAGES, USERS, Schedule

POINTS = ["claimed", "call_entered", "call_answered", "keeping", "kept", "before_checkpoint:*", "in_checkpoint:*", "committed:*",
    "after_checkpoint:*", "stage_done:embed", "stage_done:extract", "probing"]  # fmt: skip
"""Where a worker is struck in the middle of what it does."""
Action = tuple[str, dict[str, Any]]
WEIGHTS = {"submit": 5, "work": 9, "answer": 8, "strike": 2, "wake": 2, "time_passes": 5, "reconcile": 2, "change": 1, "reset": 1}


def draw(seed: int, steps: int) -> tuple[dict[str, Any], list[Action]]:
    """Return options and what is done, as the seed has it."""
    pick = random.Random(seed)
    options = {
        "kind": pick.choice(["embedding", "embedding", "extraction", "all"]), "policy": pick.choice(["reuse", "skip", "process"]),
        "handoff": pick.choice(["inline", "inline", "queue"]), "limit": pick.choice([0, 0, 0, 20]),
        "most": pick.choice(["0", "0", "0", "0", "0.3"]), "gather": pick.choice([0, 200]), "required": pick.choice([False, True]),
    }  # fmt: skip
    bad, hold = pick.choice([0.0, 0.1, 0.3, 0.7]), pick.choice([0.0, 0.15, 0.4])
    kinds = pick.choice([[*OUTCOMES, *OF_VECTORS, *OF_CHATS], ["500", "503", "reset"], ["429", "429_later"], ["401", "cut_off", "nan"]])

    def fate(hold: float) -> str:
        return "hold" if pick.random() < hold else pick.choice(kinds) if pick.random() < bad else "right"

    def fates() -> list[str]:
        return [fate(hold) for _ in range(pick.randrange(12))]

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "submit": lambda: {"doc_id": pick.choice(list(USERS)), "content": pick.choice([*PASSAGES, "4", "4", "4"])},
        "work": lambda: {
            "which": pick.randrange(2), "count": pick.randint(1, 4), "fates": fates(),
            "trap": pick.choice(POINTS) if pick.random() < 0.25 else None, "deed": pick.choice(["kill", "freeze", "stop"]),
        },
        "answer": lambda: {"which": pick.randrange(4), "fate": fate(0.0), "fates": fates()},
        "strike": lambda: {"which": pick.randrange(2), "deed": pick.choice(["kill", "freeze", "stop", "stop softly"])},
        "wake": lambda: {"leases_first": pick.random() < 0.5},
        "time_passes": lambda: {"seconds": pick.choice([1, 6, 30, 70, 130, 1000])},
        "reconcile": dict,
        "change": lambda: {"doc_id": pick.choice(list(USERS)), "deed": pick.choice(["cancel", "delete", "requeue", "requeue"])},
        "reset": dict,
    }  # fmt: skip
    names = ["submit"] * 8 + pick.choices(list(WEIGHTS), list(WEIGHTS.values()), k=steps)
    return options, [(name, makers[name]()) for name in names]


def play(database: str, base: Settings, options: dict[str, Any], actions: list[Action]) -> None:
    schedule = Schedule(database, base, **options)
    try:
        for name, given in actions:
            getattr(schedule, name)(**given)
        schedule.end_everything()
        check_all(schedule)
    finally:
        schedule.close()


def run(database: str, base: Settings, seeds: range, steps: int) -> None:
    for seed in seeds:
        options, actions = draw(seed, steps)
        try:
            play(database, base, options, actions)
        except BaseException:
            print(f"seed {seed} of {steps} steps: {options}", *actions, sep="\n  ")
            raise


def test_no_random_schedule_pays_twice_or_loses_what_was_paid_for(database: str, settings: Settings) -> None:
    run(database, settings, range(5), 20)


@pytest.mark.long
def test_no_long_random_schedule_pays_twice_or_loses_what_was_paid_for(database: str, settings: Settings) -> None:
    run(database, settings, range(1000, 1040), 40)
