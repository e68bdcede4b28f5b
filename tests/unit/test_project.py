"""The project's own papers agree with each other: dependencies, their pins, their reasons, and the demo's questions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
INDEX_ADDRESS = re.compile(
    r"index[-_]url|find[-_]links|trusted[-_]host|tool\.uv\.(index|sources)|https?://\S*/simple\b|^\s*-[if]\s", re.I | re.M
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def dependencies() -> list[Requirement]:
    """Every dependency of the project with those of its extras."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for lines in lists for line in lines]


def pins() -> dict[str, Version]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s;@]+", line)] == [], "constraints.txt holds exact pins only"
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned_at_a_version_that_pyproject_allows() -> None:
    pinned = pins()
    wanted = dependencies()
    assert [str(need) for need in wanted if canonicalize_name(need.name) not in pinned] == []
    assert [str(need) for need in wanted if not need.specifier.contains(pinned[canonicalize_name(need.name)], prereleases=True)] == []


def test_every_dependency_says_what_is_the_least_that_works() -> None:
    assert [str(need) for need in dependencies() if not {"==", ">=", "~="} & {part.operator for part in need.specifier}] == []


def test_every_dependency_has_its_reason_written_down() -> None:
    bullets = re.findall(r"^- `([A-Za-z0-9._-]+)`.*: \S", read("docs/dependencies.md"), re.M)
    named = {canonicalize_name(name) for name in bullets}
    assert sorted({canonicalize_name(need.name) for need in dependencies()} - named) == []


def test_no_file_names_a_package_index() -> None:
    patterns = (
        "*requirements*.txt",
        "*constraints*.txt",
        "*.toml",
        "*.cfg",
        "Makefile",
        "Dockerfile",
        "compose*.y*ml",
        ".ci/*",
        ".github/**/*.y*ml",
    )
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    assert {"pyproject.toml", "constraints.txt", "Makefile", "Dockerfile"} <= {path.name for path in files}
    found = [f"{path.name}: {match.group()}" for path in files if (match := INDEX_ADDRESS.search(path.read_text(encoding="utf-8")))]
    assert found == []


def test_the_demo_asks_what_the_samples_answer() -> None:
    asked = re.findall(r"^DEMO_QUESTION_\w+ := (.+)$", read("Makefile"), re.M)
    page = read("samples/README.md")
    assert len(asked) == 2
    assert [question for question in asked if question not in page] == []


def test_every_sample_is_described() -> None:
    page = read("samples/README.md")
    files = [path.name for path in (ROOT / "samples").iterdir() if path.name != "README.md" and not path.name.startswith(".")]
    assert len(files) >= 10
    assert [name for name in files if f"`{name}`" not in page] == []


def test_every_requirement_has_its_row_and_all_evidence_exists() -> None:
    rows = re.findall(r"^\| R(\d+) \|.*\| (shown|partly: .+|not yet.*|shown, .+) \|$", read("docs/requirements.md"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 43))
    page = read("docs/requirements.md")
    for file, test in re.findall(r"`((?:unit|integration|acceptance|faults)/[\w/]+\.py)(?:::(\w+))?`", page):
        source = read(f"tests/{file}")
        assert not test or f"def {test}(" in source, f"{file} has no {test}"
    for module in re.findall(r"`bench\.(\w+)`", page):
        assert (ROOT / "bench" / f"{module}.py").is_file(), f"there is no bench.{module}"


def test_every_measurement_is_listed_and_every_listed_one_exists() -> None:
    listed = re.findall(r"^- `python -m bench\.(\w+)`", read("bench/README.md"), re.M)
    runnable = {path.stem for path in (ROOT / "bench").glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert sorted(listed) == sorted(runnable)
