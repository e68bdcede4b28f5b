"""Settings: every one documented, every bad value named with its fault and its range, no secret shown."""

import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from annotated_types import Interval
from pydantic import ValidationError

from docs.generate_settings import meaning
from models.documents import FileType
from models.errors import ConfigurationError
from models.settings import Settings, allowed_values, default_value, load_settings
from models.settings.checks import FILE_TYPES
from models.settings.places import SERVER_VARIABLES

ROOT = Path(__file__).parents[2]
INTERVALS = {
    name: mark for name, field in Settings.model_fields.items() for mark in field.metadata if isinstance(mark, Interval)
}  # fmt: skip
URL = "postgresql://ann:hush-hush@db:5432/docs"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep the developer's own environment and `.env` out, and what a test's `.env` sets in."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    for name in [*os.environ]:
        if name.startswith("PG") or name.lower().removesuffix("_file") in Settings.model_fields:
            monkeypatch.delenv(name)
    load_settings.cache_clear()
    yield
    os.environ.clear()
    os.environ.update(before)
    load_settings.cache_clear()


def test_defaults_are_those_that_people_rely_on(tmp_path: Path) -> None:
    settings = load_settings()
    assert (settings.database_max_connections, settings.database_timeout) == (10, 30)
    assert (settings.max_retry_attempts, settings.retry_base_delay_seconds, settings.batch_processing_timeout) == (3, 2.0, 1800)
    assert settings.storage_base_path == tmp_path / ".docmill"
    assert (settings.log_level, settings.log_format, settings.log_file_path) == ("INFO", "text", None)
    assert settings.database_conninfo is None


@pytest.mark.parametrize("end", ["below", "above"])
@pytest.mark.parametrize("name", INTERVALS)
def test_a_value_out_of_range_names_variable_and_range(name: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interval = INTERVALS[name]
    assert isinstance(interval.ge, int | float) and isinstance(interval.le, int | float)
    monkeypatch.setenv(name.upper(), str(interval.ge - 1 if end == "below" else interval.le + 1))
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  {name.upper()}=") and line.endswith(f"; allowed: {allowed_values(name)}")
    assert ("too small" if end == "below" else "too large") in line


@pytest.mark.parametrize("name", INTERVALS)
def test_the_ends_of_a_range_are_allowed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interval = INTERVALS[name]
    if name == "chunk_overlap":
        monkeypatch.setenv("CHUNK_SIZE", "20000")
    if name == "chunk_size":
        monkeypatch.setenv("CHUNK_OVERLAP", "0")
    for end in (interval.ge, interval.le):
        monkeypatch.setenv(name.upper(), str(end))
        load_settings.cache_clear()
        assert getattr(load_settings(), name) == end


@pytest.mark.parametrize(
    ("variable", "value", "fault"),
    [
        ("MAX_PAGES", "ten", "is not a whole number"),
        ("MAX_PAGES", "1.5", "is not a whole number"),
        ("LEASE_SECONDS", "soon", "is not a number"),
        ("LEASE_SECONDS", "nan", "is not a finite number"),
        ("EXTRACTION_REQUIRED", "maybe", "is not true or false"),
        ("LOG_FORMAT", "xml", "is not one of the allowed values; allowed: text or json"),
        ("HANDOFF", "both", "allowed: inline or queue"),
        ("EMBEDDING_PROVIDER", "best", "allowed: local or fast or hash"),
        ("EMBEDDING_BASE_URL", "api.openai.com/v1", "is not a web address"),
        ("EMBEDDING_BASE_URL", "https://me:hush@host/v1", "holds a user or a key"),
        ("EMBEDDING_DIMENSIONS", "many", "is not a whole number"),
        ("LOG_LEVEL", "LOUD", "allowed: TRACE or DEBUG"),
        ("LOG_FILE_PATH", "x-{user}.log", "braces"),
        ("LOG_FILE_PATH", "/", "names a folder and no file in it"),
        ("LOG_FILE_PATH", ".", "names a folder and no file in it"),
        ("LOG_FILE_PATH", "..", "names a folder and no file in it"),
        ("STORAGE_TEMP_DIR", "../elsewhere", "stays inside STORAGE_BASE_PATH"),
        ("STORAGE_TEMP_DIR", "/tmp", "stays inside STORAGE_BASE_PATH"),
        ("STORAGE_UPLOADS_DIR", ".", "stays inside STORAGE_BASE_PATH"),
        ("STORAGE_UPLOADS_DIR", "postgres/uploads", "is where the embedded server keeps its data"),
        ("STORAGE_LOGS_DIR", "uploads", "is the folder of STORAGE_UPLOADS_DIR"),
        ("CHUNK_OVERLAP", "500", "is not less than half of CHUNK_SIZE=1000"),
        ("DATABASE_URL_FILE", "/no/such/file", "cannot be read"),
        ("MAX_FILE_SIZE_MB_BY_TYPE", "exe=1", "names 'exe', which is none of pdf, word"),
        ("MAX_FILE_SIZE_MB_BY_TYPE", "html", "has no whole number of MB behind html="),
        ("MAX_FILE_SIZE_MB_BY_TYPE", "html=-1", "has no whole number of MB behind html="),
        ("MAX_FILE_SIZE_MB_BY_TYPE", "html=1,html=2", "names html twice"),
    ],
)
def test_a_bad_value_says_what_is_wrong_with_it(variable: str, value: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert variable in str(caught.value) and fault in str(caught.value)


def test_an_empty_pg_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PGHOST=from-file\n")
    monkeypatch.setenv("PGHOST", "")
    monkeypatch.delenv("DATABASE_URL", raising=False)
    assert load_settings().database_conninfo == ""
    assert os.environ["PGHOST"] == "from-file"


@pytest.mark.parametrize(
    ("variable", "value"), [("PGHOST", "mine"), ("PGHOSTADDR", "10.0.0.1"), ("PGSERVICE", "mine"), ("DATABASE_URL", URL)]
)
def test_a_server_that_is_named_elsewhere_is_not_sent_the_password_of_the_env_file_where_an_empty_one_is_set(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("PGHOST=from-file\nPGPASSWORD=hush\nPGSSLMODE=require\n")
    monkeypatch.setenv("PGPASSWORD", "")
    monkeypatch.setenv(variable, value)
    load_settings()
    assert (os.environ["PGPASSWORD"], os.environ["PGSSLMODE"]) == ("", "require")


PASSED_ON = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "FORWARDED_ALLOW_IPS")


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_what_libraries_read_from_the_environment_can_stand_in_the_env_file(
    case: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in PASSED_ON:
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(name.lower(), "")
    (tmp_path / ".env").write_text("".join(f"{case(name)}=http://file/{name}\n" for name in PASSED_ON) + "OTEL_SERVICE_NAME=not-this\n")
    load_settings()
    assert {name: os.environ[case(name)] for name in PASSED_ON} == {name: f"http://file/{name}" for name in PASSED_ON}
    assert "OTEL_SERVICE_NAME" not in os.environ


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_the_environment_wins_over_the_env_file_in_what_is_passed_on(
    case: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in PASSED_ON:
        monkeypatch.setenv(name.lower(), "")
        monkeypatch.setenv(name, "http://mine")
    (tmp_path / ".env").write_text("".join(f"{case(name)}=http://file\n" for name in PASSED_ON))
    load_settings()
    assert {os.environ[name] for name in PASSED_ON} == {"http://mine"}
    assert {os.environ[name.lower()] for name in PASSED_ON} == {""}


def test_a_way_around_a_pooler_needs_one_that_leads_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("DATABASE_URL_DIRECT", URL)
    with pytest.raises(ConfigurationError, match="DATABASE_URL_DIRECT is set without DATABASE_URL"):
        load_settings()
    monkeypatch.setenv("PGHOST", "pooler")
    assert load_settings().database_conninfo == ""


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EMBEDDING_BASE_URL", "https://me:hush@host/v1"),
        ("EXTRACTION_BASE_URL", "https://hush@host/v1"),
        ("LLAMAPARSE_BASE_URL", "https://host/v1?key=hush"),
        ("EMBEDDING_BASE_URL", "https://host/v1?sig=hush#top"),
        ("EMBEDDING_API_KEY_FILE", "sk-hush"),
        ("DATABASE_URL_FILE", "postgresql://me:hush@host/db"),
        ("ALERT_WEBHOOK_URL_FILE", "https://host/hush"),
    ],
)
def test_what_may_be_a_secret_in_the_wrong_place_is_not_quoted(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as caught:
        load_settings()
    assert "hush" not in str(caught.value)


def test_a_type_has_its_own_limit_or_that_of_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_FILE_SIZE_MB_BY_TYPE", " HTML = 20 , email=0,pdf=900")
    settings = load_settings()
    assert settings.max_file_size_mb_by_type == "html=20,email=0,pdf=900"
    assert [settings.file_size_limit_mb(name) for name in ("html", "email", "pdf", "text")] == [20, 0, 100, 100]
    assert set(FILE_TYPES) == set(FileType) - {FileType.ZIP, FileType.UNKNOWN}


def test_the_page_of_limits_has_the_settings_and_their_defaults() -> None:
    rows = [row.split(" | ") for row in (ROOT / "docs" / "limits.md").read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    named = {row[1].strip("`").lower(): row[2] for row in rows if len(row) > 3 and row[1].startswith("`")}
    assert len(named) >= 10
    for name, default in named.items():
        assert default.removesuffix(" s").replace(",", "") == default_value(name), name


def test_all_bad_values_are_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MAX_PAGES", "CHUNK_SIZE", "LOG_FORMAT"):
        monkeypatch.setenv(variable, "wrong")
    monkeypatch.setenv("DATABASE_URL_FILE", "/no/such/file")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert len(str(caught.value).splitlines()) == 1 + 4


def test_no_representation_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", URL)
    settings = load_settings()
    assert settings.database_conninfo == URL
    for text in (repr(settings), str(settings), f"{settings}", settings.model_dump_json(), str(settings.model_dump())):
        assert "hush" not in text


def test_a_bad_secret_is_never_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql+asyncpg//ann:hush-hush@db/docs")
    with pytest.raises(ConfigurationError, match="DATABASE_URL is not a connection string") as caught:
        load_settings()
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    with pytest.raises(ValidationError) as raw:
        Settings()
    assert "hush" not in str(raw.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:pre@hush@db/docs",
        "postgresql://ann:hush@@db/docs",
        "postgresql://ann:12/hush@db:5432/docs",
        "postgresql://ann:pre/hush@db/docs",
        "postgresql://ann@corp:hush@db/docs",
        "postgres://ann:pre@hush@db1,db2:5433/docs",
    ],
)
def test_a_password_that_would_pass_for_something_else_is_refused_without_showing_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        load_settings()
    assert "percent-encoded" in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///docs",
        "postgresql://ann:p%40ss%2Fw:o?r#d@db:5432/docs?sslmode=require",
        "postgresql://ann@corp.example/docs",
        "postgresql://ann:pw@db1:5432,db2:5433,db3/docs?application_name=a@b",
        "postgresql://ann:pw@[2001:db8::1]:5432/docs",
        "postgresql://ann:pw@%2Fvar%2Frun%2Fpostgresql/docs",
        "postgresql://ann:pw@/docs?host=/var/run/postgresql&port=5433",
        "postgresql://ann:pw@/docs?host=@abstract",
        "postgresql://ann:pw@db/a%40b",
        "host=db port=5432 user=ann@corp password=p://@ss@/@ dbname=a@b",
    ],
)
def test_every_form_that_postgres_clients_read_is_accepted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert load_settings().database_conninfo == url


@pytest.mark.parametrize("variable", ["EMBEDDING_API_KEY", "EXTRACTION_API_KEY", "LLAMAPARSE_API_KEY"])
def test_a_key_that_no_service_can_have_given_is_refused_without_showing_it(
    variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "sk-hush hush")
    with pytest.raises(ConfigurationError, match=f"{variable} holds a blank") as caught:
        load_settings()
    assert "hush" not in str(caught.value)
    monkeypatch.delenv(variable)
    (tmp_path / "key").write_text("sk-hush\n")
    monkeypatch.setenv(f"{variable}_FILE", str(tmp_path / "key"))
    assert getattr(load_settings(), variable.lower()).get_secret_value() == "sk-hush"
    assert "hush" not in repr(load_settings())


@pytest.mark.parametrize("variable", ["EMBEDDING_API_KEY", "EXTRACTION_API_KEY", "LLAMAPARSE_API_KEY"])
@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        (".", "not a regular file"),
        ("/proc/self/mem", "cannot be read"),  # nobody reads its first byte, not even root
        ("blank", "holds a blank"),
    ],
)
def test_a_key_file_that_gives_no_key_is_refused_by_its_name(
    variable: str, file: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "blank").write_text("sk-hush\nsk-hush\n")
    monkeypatch.setenv(f"{variable}_FILE", str(tmp_path / file))
    with pytest.raises(ConfigurationError, match=variable) as caught:
        load_settings()
    assert why in str(caught.value) and "hush" not in str(caught.value)


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(URL + "\n")
    (tmp_path / ".env").write_text("DATABASE_URL_FILE=secret\n")
    assert load_settings().database_conninfo == URL
    load_settings.cache_clear()
    monkeypatch.setenv("DATABASE_URL", URL)
    with pytest.raises(ConfigurationError, match="DATABASE_URL_FILE is set together with DATABASE_URL"):
        load_settings()


def test_a_secret_file_may_begin_with_the_mark_that_editors_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(URL, encoding="utf-8-sig")
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "secret"))
    assert load_settings().database_conninfo == URL


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"x" * 100_000])
def test_a_file_that_holds_no_secret_is_refused(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content)
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "secret"))
    with pytest.raises(ConfigurationError, match="DATABASE_URL_FILE"):
        load_settings()


@pytest.mark.parametrize("variable", SERVER_VARIABLES)
def test_a_pg_variable_that_names_a_server_leaves_the_rest_to_libpq(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "require")
    assert load_settings().database_conninfo is None
    monkeypatch.setenv(variable, "x")
    assert load_settings().database_conninfo == ""


def test_pg_variables_in_the_env_file_reach_libpq_and_lose_to_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PGHOST=from-file\nPGUSER=from-file\nMAX_PAGES=7\nSOMETHING_ELSE=1\n")
    monkeypatch.setenv("PGUSER", "from-environment")
    settings = load_settings()
    assert (settings.max_pages, settings.database_conninfo) == (7, "")
    assert (os.environ["PGHOST"], os.environ["PGUSER"]) == ("from-file", "from-environment")


def test_the_environment_wins_over_the_env_file_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_PAGES=7\nCHUNK_SIZE=500\n")
    monkeypatch.setenv("MAX_PAGES", "8")
    monkeypatch.setenv("CHUNK_SIZE", "")
    assert (load_settings().max_pages, load_settings().chunk_size) == (8, 500)


def test_an_env_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"MAX_PAGES=\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"\.env is not UTF-8"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("LOG_LEVEL=INFO\nDATABASE_URL='postgresql://ann:hush@db/docs\nMAX_PAGES=7\n", "line 2"),
        ("\n\n# no setting\nMAX_PAGES='7' hush\n\nCHUNK_SIZE=500\n=hush\n", "lines 4, 7"),
        ("MAX_PAGES=7\nDATABASE_URL\nexport CHUNK_SIZE\n", "lines 2, 3"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused_by_its_number(content: str, lines: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert str(caught.value).endswith(f".env has no NAME=value in {lines}: is a quote missing?")
    assert "hush" not in str(caught.value)


def test_words_may_be_written_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "debug")
    monkeypatch.setenv("HANDOFF", "Queue")
    assert (load_settings().log_level, load_settings().handoff) == ("DEBUG", "queue")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_settings().max_pages = 3


def test_a_way_around_the_pooler_is_used_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", URL)
    assert load_settings().database_conninfo_direct == URL
    load_settings.cache_clear()
    monkeypatch.setenv("DATABASE_URL_DIRECT", "postgresql://direct/docs")
    assert load_settings().database_conninfo_direct == "postgresql://direct/docs"


def test_every_setting_says_what_it_means() -> None:
    for name in Settings.model_fields:
        assert meaning(name) and allowed_values(name) and default_value(name) not in {"", "None", "PydanticUndefined"}, name


def test_the_generated_pages_are_up_to_date() -> None:
    pages = runpy.run_path(str(ROOT / "docs/generate_settings.py"))
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == pages["env_example"](), "run python docs/generate_settings.py"
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == pages["configuration_page"]()


def test_the_example_as_it_stands_changes_nothing(tmp_path: Path) -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    active = [line for line in lines if line and not line.startswith("#")]
    assert sorted(line.partition("=")[0].lower() for line in active) == sorted(Settings.model_fields)
    expected = load_settings()
    (tmp_path / ".env").write_text("\n".join(active))
    load_settings.cache_clear()
    assert load_settings() == expected
