"""Writes `.env.example` and docs/configuration.md from the settings: run it after changing models/settings."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path

from models.settings import Settings, allowed_values, default_value
from models.settings.secret_files import holds_secret

ROOT = Path(__file__).parents[1]
NAMES = list(Settings.model_fields)
INTRODUCTION = """\
# Configuration

docmill reads environment variables, and `.env` in the working directory for those that are not set (`.env.example` lists them all).
An empty variable counts as unset, and one that docmill does not know is ignored. All are checked at start; an error names every bad one,
what is wrong with it and what is allowed. `procrastinate`'s own `--log-level` has no effect on a docmill app: use `LOG_LEVEL`.

A secret can come from a file instead: `DATABASE_URL_FILE=/run/secrets/database_url`. One that everybody can read is complained of
when a worker starts, outside of `/run/secrets`. Without `DATABASE_URL`, the variables that all
Postgres clients know (`PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`, `PGPASSFILE`, `PGDATABASE`, `PGSERVICE`, `PGSSLMODE`, `PGSSLROOTCERT`
and so on) say where the database is, from the environment or from `.env`; what `DATABASE_URL` leaves open they fill in as well. TLS is a
matter of the connection string or of these variables, see [operations.md](operations.md#tls). Outside services are called through the
proxy that `HTTPS_PROXY` names, but for the hosts in `NO_PROXY`, and `SSL_CERT_FILE` names a certificate authority of one's own. These,
`HTTP_PROXY`, `ALL_PROXY`, `SSL_CERT_DIR` and `FORWARDED_ALLOW_IPS` ([serve.md](serve.md)) may stand in `.env` as well; `OTEL_*` are read
from the environment alone.

<!-- Made by docs/generate_settings.py. -->

| variable | default | allowed | meaning |
|---|---|---|---|
"""


def env_example() -> str:
    """Return the text of `.env.example`: every setting at its default."""
    blocks = [
        "# Every setting of docmill at its default; an empty one is unset. Copy what you change to .env in the working directory.\n"
        "# Read from there too: PG* (PGHOST, PGSSLMODE, ...), HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR\n"
        "# and FORWARDED_ALLOW_IPS.\n"
    ]
    for name in NAMES:
        variable, default = name.upper(), default_value(name)
        lines = [f"# {meaning(name)}", f"# Allowed: {allowed_values(name)}; default: {default}"]
        if holds_secret(Settings.model_fields[name]):
            lines.append(f"# Or {variable}_FILE, the name of a file that holds it.")
        is_value = default != "unset" and " " not in default  # some defaults are only words: they depend on the machine
        blocks.append("\n".join([*lines, f"{variable}={default if is_value else ''}"]) + "\n")
    return "\n".join(blocks)


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    rows = [f"| `{name.upper()}` | {default_value(name)} | {allowed_values(name)} | {meaning(name)} |\n" for name in NAMES]
    return INTRODUCTION + "".join(rows)


def meaning(name: str) -> str:
    """Return on one line what stands below a setting."""
    return " ".join(_docstrings()[name].split())


@cache
def _docstrings() -> dict[str, str]:
    """Read them here: pydantic would do so each time that a worker or a command starts."""
    found: dict[str, str] = {}
    for part in Settings.__mro__:
        if part.__module__.startswith("models.settings"):
            (definition,) = ast.parse(inspect.getsource(part)).body
            assert isinstance(definition, ast.ClassDef)
            for field, below in pairwise(definition.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = text
    return found


if __name__ == "__main__":
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")
    (ROOT / "docs/configuration.md").write_text(configuration_page(), encoding="utf-8")
