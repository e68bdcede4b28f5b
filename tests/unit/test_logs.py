"""Logs: one format for all, context that ends with its job, no secrets, one file a process."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import psycopg
import pytest
from loguru import logger

from jobs import log_files, redaction
from jobs.logs import bound, configure_logging
from jobs.redaction import LONGEST_ERROR, describe, redact, register_secret
from models.errors import ConfigurationError
from models.settings import load_settings

ROOT = Path(__file__).parents[2]
Lines = Callable[[], list[dict[str, object]]]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give every test clean settings, and everything that logging changes back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_known", [])
    root, hooks = logging.root, (sys.excepthook, threading.excepthook)
    handlers, level = root.handlers[:], root.level
    load_settings.cache_clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    logger.remove()
    logger.configure(patcher=lambda _: None, extra={})
    load_settings.cache_clear()


@pytest.fixture
def json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lines:
    """Log as JSON at INFO, and return what was logged since the last call."""
    monkeypatch.setenv("LOG_FORMAT", "json")
    configure_logging(load_settings(), role="worker")
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line_is_one_object_with_context_and_traceback(json_lines: Lines) -> None:
    with bound(doc_id="d1", correlation_id="c", stage="parse", attempt=2, batch_id=None):
        try:
            raise ValueError("broken\nin two lines")
        except ValueError:
            logger.bind(duration_ms=12.5).exception("Parsing {} failed", "a {curly} name")
    (line,) = json_lines()
    assert line["message"] == "Parsing a {curly} name failed"
    assert (line["doc_id"], line["stage"], line["attempt"], line["duration_ms"]) == ("d1", "parse", 2, 12.5)
    assert "batch_id" not in line
    assert "ValueError: broken" in str(line["exception"])
    assert str(line["time"]).endswith("+00:00")


async def test_context_belongs_to_its_own_task_and_ends_with_its_block(json_lines: Lines) -> None:
    async def job(name: str) -> None:
        with bound(doc_id=name):
            await asyncio.sleep(0)
            logger.info("working")

    await asyncio.gather(job("a"), job("b"))
    logger.info("after")
    assert [line.get("doc_id") for line in json_lines()] == ["a", "b", None]


def test_standard_records_come_through_under_their_own_logger_and_with_context(json_lines: Lines) -> None:
    with bound(doc_id="d"):
        logging.getLogger("psycopg.pool").warning("error %s {not a field}", "x")
    (line,) = json_lines()
    assert (line["logger"], line["level"], line["message"], line["doc_id"]) == ("psycopg.pool", "WARNING", "error x {not a field}", "d")


def test_procrastinates_routine_is_debug_by_its_action_alone(json_lines: Lines) -> None:
    for action in ("start_job", "job_success", "start_worker", "job_error_retry"):
        logging.getLogger("procrastinate.worker").info("Starting job", extra={"action": action})
    logging.getLogger("elsewhere").info("Starting job", extra={"action": "start_job"})
    logging.getLogger("procrastinate.worker").error("Starting job", extra={"action": "start_job"})
    assert [line["level"] for line in json_lines()] == ["INFO", "INFO", "INFO", "ERROR"]


def test_a_broken_standard_record_does_not_stop_the_program(monkeypatch: pytest.MonkeyPatch, json_lines: Lines) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger("x").warning("%d", "no number")
    logger.info("still here")
    assert [line["message"] for line in json_lines()] == ["still here"]


def test_text_keeps_each_record_recognisable_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(load_settings(), role="cli")
    with bound(doc_id="evil\nname"):
        logger.info("first\n2026-01-01 00:00:00.000 INFO forged \x1b[31mred")
    with bound(file_name="a\r2026-01-01 00:00:00.000 INFO forged\u2028\x85b\u202ecod.exe"):
        logger.info("second")
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("    ") for line in lines] == [False, True, True, False]
    assert not set("\x1b\r\u2028\x85\u202e") & set("".join(lines)) and "\\x1b[31m" in lines[1] and "\\u202ecod.exe" in lines[3]


def test_secrets_are_masked_in_messages_context_and_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://ann:tr%C3%B6ub4dor@db/x")
    monkeypatch.setenv("PGPASSWORD", "pg-pass-word")
    for form in ("text", "json"):
        monkeypatch.setenv("LOG_FORMAT", form)
        load_settings.cache_clear()
        configure_logging(load_settings(), role="worker")
        with bound(password="bound-secret", detail={"api_key": "sk-1", "list": ["tröub4dor"]}, path=Path("/x/pg-pass-word")):
            try:
                raise RuntimeError("postgresql://ann:tr%C3%B6ub4dor@db/x and tröub4dor")
            except RuntimeError:
                logger.exception("host=db password='an other' user=ann; pg-pass-word")
        err = capsys.readouterr().err
        for secret in ("tröub4dor", "tr%C3%B6ub4dor", "pg-pass-word", "an other", "bound-secret", "sk-1"):
            assert secret not in err, (form, secret)
        assert "ann" in err and "RuntimeError" in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://u:p@ss@h/db", "postgres://u:***@h/db"),
        ("{'password': 'x y', 'user': 'u'}", "{'password': ***, 'user': 'u'}"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("http://host:80/path and fencing token=5", "http://host:80/path and fencing token=5"),
        ("PGPASSWORD=hush psql", "PGPASSWORD=*** psql"),
    ],
)
def test_secrets_are_known_by_their_surroundings(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_password_that_is_a_name_does_not_blind_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://docmill:docmill@db/docmill")
    redaction.register_secrets_of(load_settings())
    assert redact("docmill starts") == "docmill starts"


def test_rows_that_postgres_quotes_stay_out_of_error_texts() -> None:
    class Diagnosis:
        message_primary = "value violates check constraint"

    class Violation(psycopg.IntegrityError):
        @property
        def diag(self) -> Diagnosis:  # type: ignore[override]  # the real one is made by a server
            return Diagnosis()

    assert describe(Violation("value violates...\nDETAIL:  Failing row contains (top secret text)")) == "value violates check constraint"


def test_no_part_of_a_secret_is_left_where_a_long_message_is_cut() -> None:
    register_secret("sk-hush-hush-hush")
    for before in range(LONGEST_ERROR - 20, LONGEST_ERROR):
        assert "sk-h" not in describe(ValueError("x" * before + "sk-hush-hush-hush and more"))


@pytest.mark.parametrize("text", ["a.a", "a-", "a://b:", "a://", "bearer ", "password='"])
def test_a_secret_behind_a_long_text_that_looks_like_others_is_masked(text: str) -> None:
    """Going back in the text for each of its characters would take minutes."""
    assert redact(f"{text * 30_000} https://ann:hush@db/x").endswith(" https://ann:***@db/x")


def test_chained_and_grouped_exceptions_are_all_rendered(json_lines: Lines) -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ExceptionGroup("two", [ValueError("one of two"), TypeError("other of two")]) from error
    except ExceptionGroup:
        logger.exception("x")
    text = str(json_lines()[0]["exception"])
    assert all(part in text for part in ("KeyError: 'inner'", "ValueError: one of two", "TypeError: other of two"))


def test_each_process_rotates_its_own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOG_FILE_PATH", "docmill.log")
    monkeypatch.setenv("LOG_ROTATION_MB", "0.001")
    monkeypatch.setenv("LOG_RETENTION_FILES", "2")
    configure_logging(load_settings(), role="worker")
    folder = tmp_path / ".docmill/logs"
    assert not list(folder.iterdir()), "a process that logs nothing leaves no file"
    for number in range(40):
        logger.info("{} {}", number, "x" * 200)
    names = [file.name for file in folder.iterdir()]
    assert len(names) == 3
    assert all(name.startswith("docmill.worker-") and f"-{os.getpid()}." in name and name.endswith(".log") for name in names)
    for name in names:
        os.utime(folder / name, (1, 1))
    (folder / "other.log").write_text("not ours")
    os.utime(folder / "other.log", (1, 1))
    log_files.remove_abandoned(folder / "docmill.log", keep=1)
    assert len([file for file in folder.iterdir() if file.name != "other.log"]) == 1
    assert (folder / "other.log").exists()


def test_rotated_files_of_a_process_that_lives_are_its_own_to_remove(tmp_path: Path) -> None:
    def write(pid: int, day: str = "", days_ago: float = 0) -> str:
        file = tmp_path / f"docmill.worker-host.x-{pid}{day}.log"
        file.touch()
        os.utime(file, (time.time() - days_ago * 86_400,) * 2)
        return file.name

    stamps = [f".2026-01-0{day}_10-00-00_123456" for day in (1, 2, 3)]
    alive = [write(1), *(write(1, stamp, days_ago=3) for stamp in stamps)]
    ended = [write(2, days_ago=2), *(write(pid, stamp, days_ago=4) for pid in (2, 3) for stamp in stamps)]
    log_files.remove_abandoned(tmp_path / "docmill.log", keep=1)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {*alive, ended[0]}


def test_braces_in_the_storage_path_are_letters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STORAGE_BASE_PATH", str(tmp_path / "a{time} {b} }"))
    monkeypatch.setenv("LOG_FILE_PATH", "docmill.log")
    monkeypatch.setenv("LOG_ROTATION_MB", "0.001")
    monkeypatch.setenv("LOG_RETENTION_FILES", "2")
    configure_logging(load_settings(), role="worker")
    for number in range(40):
        logger.info("{} {}", number, "x" * 200)
    assert len([*(tmp_path / "a{time} {b} }" / "logs").iterdir()]) == 3


def test_containers_with_one_host_name_have_log_files_of_different_names(tmp_path: Path) -> None:
    ask = "from pathlib import Path; from jobs.log_files import own_log_file; print(own_log_file(Path('x.log'), 'worker'), flush=True)"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", f"{ask}; input()"]
    if os.getuid() != 0:
        command[1:1] = ["--user", "--map-root-user"]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=tmp_path, env=given) for _ in range(2)]
    names = [process.stdout.readline().strip() for process in running if process.stdout is not None]
    left = [process.communicate("\n") for process in running]
    if not all(names):
        pytest.skip(f"no namespaces here: {left[0][1].strip()[-200:]}")
    assert names[0] != names[1]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f"x.worker-{socket.gethostname()}-7.log").touch()
    assert len(log_files.log_files(tmp_path / "x.log")) == 3


def test_a_log_file_that_cannot_be_written_is_named_at_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOG_FILE_PATH", str(tmp_path / "file/x.log"))
    with pytest.raises(ConfigurationError, match="LOG_FILE_PATH"):
        configure_logging(load_settings(), role="worker")


def _run(code: str, tmp_path: Path, *arguments: str) -> str:
    (tmp_path / "some_app.py").write_text(textwrap.dedent(code))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{tmp_path}", "LOG_FORMAT": "json"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stderr


def test_under_procrastinates_command_no_line_appears_twice(tmp_path: Path) -> None:
    err = _run(
        """
        import logging, procrastinate
        from procrastinate import testing
        from jobs.logs import configure_logging
        from models.settings import load_settings
        configure_logging(load_settings(), role="worker")
        logging.getLogger("elsewhere").warning("only once")
        app = procrastinate.App(connector=testing.InMemoryConnector())
        """,
        tmp_path, "-m", "procrastinate", "--app=some_app.app", "worker", "--one-shot",
    )  # fmt: skip
    lines = [json.loads(line)["message"] for line in err.splitlines() if line.startswith("{")]
    assert err.count("only once") == 1 and "only once" in lines
    assert sum(message.startswith("Starting worker") for message in lines) == 1
    assert err.count("Starting worker") == 1


def test_uncaught_exceptions_are_logged_without_secrets(tmp_path: Path) -> None:
    err = _run(
        """
        import threading
        from jobs.logs import configure_logging
        from models.settings import load_settings
        configure_logging(load_settings(), role="worker")
        def fail(): raise ValueError("in thread")
        thread = threading.Thread(target=fail); thread.start(); thread.join()
        raise RuntimeError("postgresql://u:hush@h/d")
        """,
        tmp_path, "some_app.py",
    )  # fmt: skip
    first, second = (json.loads(line) for line in err.splitlines())
    assert (first["level"], second["level"]) == ("CRITICAL", "CRITICAL")
    assert "ValueError: in thread" in first["exception"]
    assert "u:***@h" in second["exception"]
