"""`docmill reembed`: start, watch and steer a run of re-embedding."""

from __future__ import annotations

from typing import Any

import psycopg

from jobs.cli.errors import ExitCode
from jobs.cli.output import aside, complain, duration, moment, print_json, say
from jobs.cli.session import Row, quiet_logs, rows, run_async
from jobs.redaction import describe
from jobs.serving import own_embedder
from models.settings import Settings, load_settings

SHOWN = 5
"""Newest runs that `status` shows."""
_REFUSALS = (psycopg.errors.NoDataFound, psycopg.errors.ObjectNotInPrerequisiteState, psycopg.errors.LockNotAvailable)
"""How the SQL functions say that it cannot be done now."""


def begin(provider: str | None, switch: str, priority: int, *, json: bool) -> ExitCode:
    """Start a run to the model of a provider and print its number."""
    settings = load_settings()
    quiet_logs(settings)
    chosen = settings if provider is None else settings.model_copy(update={"embedding_provider": provider})
    model = own_embedder(chosen).model
    return run_async(_begin(settings, model, switch, priority, json=json))


def order(name: str, **params: Any) -> ExitCode:
    """Call one of the SQL functions that steer the open run and print its state."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_order(settings, name, **params))


def show(*, json: bool) -> ExitCode:
    """Print which model serves and the newest runs."""
    settings = load_settings()
    quiet_logs(settings)
    return run_async(_show(settings, json=json))


async def _begin(settings: Settings, model: str, switch: str, priority: int, *, json: bool) -> ExitCode:
    try:
        made = (await rows(settings, "start_reembedding", to_model=model, switch=switch, priority=priority))[0]
    except _REFUSALS as error:
        complain(describe(error))
        return ExitCode.FAILED
    if json:
        print_json({"id": made["id"], "to_model": model})
    else:
        say(f"Re-embedding {made['id']} to {model} has begun; `docmill reembed status` shows how far it is.")
    if not (await rows(settings, "live_workers"))[0]["workers"]:
        say("No worker is running; `docmill worker` starts one.", console=aside())
    return ExitCode.OK


async def _order(settings: Settings, name: str, **params: Any) -> ExitCode:
    try:
        state = (await rows(settings, name, **params))[0]["state"]
    except psycopg.errors.LockNotAvailable:
        complain("Somebody's open transaction has inserted passages; try again when it has ended.")
        return ExitCode.FAILED
    except _REFUSALS as error:
        complain(describe(error))
        return ExitCode.FAILED
    if name == "switch_reembedding" and state not in ("switched", "complete"):
        say(
            f"The re-embedding is {state}; it switches as soon as every passage has its vector"
            + (", once resumed." if state == "paused" else ".")
        )
    else:
        say(f"The re-embedding is {state}.")
    return ExitCode.OK


async def _show(settings: Settings, *, json: bool) -> ExitCode:
    serving = await rows(settings, "serving_model")
    runs = await rows(settings, "show_reembeddings", limit=SHOWN)
    model = serving[0]["embedding_model"] if serving else None
    if json:
        print_json({"serving_model": model, "reembeddings": runs})
        return ExitCode.OK
    say("Searches are served by", model or "no model yet: there are no passages.")
    for run in runs:
        _print_run(run)
    return ExitCode.OK


def _print_run(run: Row) -> None:
    say(f"\nRe-embedding {run['id']}: {run['state']}", style="bold")
    progress = f"{run['done']} of {run['total']} passages"
    if run["listed_at"] is None and run["state"] in ("running", "paused"):
        progress = "being listed by a worker"
    elif run["rate"]:
        progress += f", {run['rate']:.1f} a second"
    if run["seconds_left"] is not None:
        progress += f", about {duration(float(run['seconds_left']))} left"
    facts = {
        "from": run["from_model"],
        "to": run["to_model"],
        "progress": progress,
        "to be moved": run["to_move"] or None,
        "failing": f"{run['failing']} documents" if run["failing"] else None,
        "trouble": run["error_message"],
        "switch": run["switch"] if run["switched_at"] is None else moment(run["switched_at"]),
        "worker": run["worker"],
        "started": moment(run["started_at"]),
        "ended": moment(run["ended_at"]),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            say(f"  {name:<12}", value)
