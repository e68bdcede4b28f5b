"""The rules of the layout: who may import whom, where SQL lives, and which names say too little."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("jobs", "models", "sql", "procrastinate_app")
VAGUE = frozenset({"util", "utils", "common", "helper", "helpers", "manager", "managers"})
DATABASE = ("psycopg", "psycopg_pool", "pgvector", "asyncpg", "sqlalchemy")
QUEUE = ("procrastinate",)


@dataclass(frozen=True)
class Rule:
    """What modules below `package` may import of ours (`allowed`; None: anything not forbidden), and what of anybody's they may not."""

    package: str
    allowed: tuple[str, ...] | None = None
    forbidden: tuple[str, ...] = ()
    exceptions: tuple[str, ...] = ()


RULES = (
    # Reading a connection string opens no connection.
    Rule("models", allowed=("models",), forbidden=DATABASE + QUEUE, exceptions=("psycopg.conninfo", "psycopg.ProgrammingError")),
    Rule("sql", allowed=("sql", "models")),
    Rule("jobs.adapters", allowed=("jobs.adapters", "models"), forbidden=DATABASE + QUEUE),
    Rule("jobs.stages", allowed=("jobs.stages", "jobs.adapters", "models"), forbidden=DATABASE),
    Rule("jobs.breaker", allowed=(), forbidden=DATABASE + QUEUE),
    Rule("jobs.services", forbidden=("jobs.cli", "jobs.worker", "jobs.stages", "jobs.pipeline", "procrastinate_app")),
    Rule("jobs.serve", forbidden=("jobs.cli", "jobs.worker", "jobs.stages", "jobs.pipeline", "jobs.adapters", "procrastinate_app")),
    Rule("jobs.pipeline", forbidden=("jobs.cli", "jobs.worker", "procrastinate_app")),
    Rule("jobs.submit", forbidden=("jobs.cli", "jobs.worker", "jobs.stages", "procrastinate_app")),
    Rule("jobs.worker", forbidden=("jobs.cli", "jobs.stages", "procrastinate_app")),
    Rule("procrastinate_app", allowed=("jobs.worker", "jobs.logs", "jobs.registry", "jobs.sessions", "models")),
)


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*packages: str) -> list[Path]:
    """All Python files of the packages; `procrastinate_app` is a file itself."""
    found = [path for package in packages for path in [ROOT / f"{package}.py", *(ROOT / package).rglob("*.py")] if path.is_file()]
    assert found, packages
    return sorted(found)


FILES = {module_name(path): path for path in sources(*OURS)}


def imports(module: str) -> Iterator[str]:
    """Everything that a module imports. `from a import b` is `a.b`, but `a` where that is a module of ours and b is none."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (base if is_ours(name) and name not in FILES else name for name in names)


def is_ours(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in OURS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.package)
def test_imports_go_one_way(rule: Rule) -> None:
    wrong = [
        f"{module} imports {target}"
        for module in FILES
        if below(module, rule.package)
        for target in imports(module)
        if (any(below(target, name) for name in rule.forbidden) and target not in rule.exceptions)
        or (rule.allowed is not None and is_ours(target) and not any(below(target, name) for name in rule.allowed))
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["models", "sql"])
def test_an_application_with_a_module_of_our_name_is_told_which_one(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").touch()
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from jobs import submit_document"]  # finds what lies in its working directory first
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    told = done.stderr.splitlines()[-1]
    assert (done.returncode, told.startswith("ImportError: "), f"{tmp_path}/{name}.py hides docmill's" in told) == (1, True, True), told


def test_stages_never_import_each_other() -> None:
    def stage(module: str) -> str:
        return module.split(".")[2] if module.count(".") >= 2 else ""

    wrong = [
        f"{module} imports {target}"
        for module in FILES
        if below(module, "jobs.stages") and stage(module)
        for target in imports(module)
        if below(target, "jobs.stages") and stage(target) not in {"", stage(module)}
    ]
    assert wrong == []


def task_modules() -> list[str]:
    """The `import_paths` that the app is made with."""
    tree = ast.parse(FILES["procrastinate_app"].read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "import_paths"]
    assert given, "the app is made without import_paths"
    return [name for value in given for name in ast.literal_eval(value)]


def test_the_app_names_its_task_modules_as_strings() -> None:
    assert task_modules() != []
    assert [name for name in task_modules() if name not in FILES] == []


def test_only_task_modules_and_the_command_import_the_app_and_nobody_the_command() -> None:
    may = {*task_modules(), *(module for module in FILES if below(module, "jobs.cli"))}
    wrong = [
        f"{module} imports {target}"
        for module in FILES
        for target in imports(module)
        if (below(target, "procrastinate_app") and module not in may) or (below(target, "jobs.cli") and not below(module, "jobs.cli"))
    ]
    assert wrong == []


def docstrings(tree: ast.AST) -> set[int]:
    """ids of the constants that stand alone as statements: docstrings of modules, classes, functions and attributes."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


STATEMENT = re.compile(
    r"\bSELECT\b.+\bFROM\b|\bSELECT\s+[\w.]+\(|\bINSERT\s+INTO\s+\w|\bUPDATE\s+[\w.]+\s+(AS\s+\w+\s+)?SET\b|\bDELETE\s+FROM\s+\w"
    r"|\bMERGE\s+INTO\s+\w|\bCOPY\s+[\w.]+.*\b(FROM|TO)\s+STD|\b(CREATE|ALTER|DROP)\s+(TABLE|INDEX|FUNCTION|VIEW|TRIGGER|TYPE|ROLE|POLICY)\b"
    r"|^\s*(LISTEN|UNLISTEN|NOTIFY|TRUNCATE|SAVEPOINT|SET\s+LOCAL|LOCK\s+TABLE|REINDEX|VACUUM)\s+\w",
    re.DOTALL,
)
RUNS_SQL = frozenset({"execute", "executemany", "copy", "stream", "SQL", "execute_query", "execute_query_one", "execute_query_all"})


def text_of(node: ast.expr) -> str | None:
    """The text of a string literal or f-string (its holes as `x`); None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
    return None


def inline_sql(tree: ast.AST) -> Iterator[str]:
    ignored = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = text_of(node.args[0]) if node.args else None
            if called in RUNS_SQL and first is not None:
                yield f"line {node.lineno}: {called}({first[:40]!r})"
        if isinstance(node, ast.expr) and id(node) not in ignored:
            text = text_of(node)
            # Upper case only: a sentence such as "select a file from the list" is no statement.
            if text is not None and STATEMENT.search(text):
                yield f"line {node.lineno}: {text[:60]!r}"


def test_sql_lives_in_the_sql_package_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} {found}"
        for path in sources("jobs", "models", "procrastinate_app")
        for found in inline_sql(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == []


def test_migrations_are_numbered_without_gaps_and_open_with_what_and_why() -> None:
    files = sorted(
        path for path in (ROOT / "sql" / "migrations").iterdir() if path.name != "__init__.py" and not path.name.startswith("__")
    )
    assert [path.name for path in files if not re.fullmatch(r"\d{4}_[a-z0-9_]+\.sql", path.name)] == []
    assert [int(path.name[:4]) for path in files] == list(range(1, len(files) + 1))
    assert [path.name for path in files if not re.match(r"--\s*\w", path.read_text(encoding="utf-8"))] == []


def test_names_say_what_is_inside() -> None:
    folders = [ROOT / name for name in ("jobs", "models", "sql", "tests", "bench")]
    paths = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    named = [path for path in paths if path.is_dir() or path.suffix in {".py", ".sql"}]
    assert [str(path.relative_to(ROOT)) for path in named if VAGUE & set(path.stem.lower().split("_"))] == []
