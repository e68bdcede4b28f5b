"""Coverage-guided fuzzing of one target: `python -m tests.fuzz chunk --minutes 10`. Needs `pip install atheris`, which is no dependency.

What it finds is written to a folder of its own; an input that ends in an error is minimised by hand and kept in `corpus/<target>/`, which
every test run tries again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Fuzz until the time is over or an input breaks a rule; libFuzzer prints executions, coverage and the path of that input."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=["validate", "archive", "check", "chunk"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--folder", type=Path, help="where inputs that add coverage, and those that fail, are kept")
    given = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: .venv/bin/pip install atheris")
    with atheris.instrument_imports(include=["jobs.adapters", "jobs.stages", "email", "zipfile"]):
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import TARGETS
    folder = given.folder or Path(tempfile.mkdtemp(prefix=f"docmill-fuzz-{given.target}-"))
    start = folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    (folder / "found").mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(given.target)):
        (start / f"{number:03}").write_bytes(seed)
    print(f"inputs are kept in {folder}", file=sys.stderr)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={int(given.minutes * 60)}",
            f"-artifact_prefix={folder}/",
            "-max_len=16384",
            "-timeout=60",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            str(folder / "found"),
            str(start),
        ],
        TARGETS[given.target],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
