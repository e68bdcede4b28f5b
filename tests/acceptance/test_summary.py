"""A folder of real files from `docmill ingest` to `docmill summary`, and the example in docs/ that was made in this way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.summaries import EXAMPLE, check, shape

ROOT = Path(__file__).parents[2]
FILES = {
    "contracts/supply-contract.pdf": "supply-contract.pdf",
    "contracts/2026/rechnung-2026-0417.docx": "rechnung-2026-0417.docx",
    "onboarding-guide.md": "onboarding-guide.md",
}


def docmill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=os.environ | {"COLUMNS": "200"})


def outcomes(ui: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(card["path"], card["file_type"], card["pages"], card["outcome"], card["error_type"]) for card in ui["files"]]


@pytest.mark.usefixtures("settings")
def test_a_folder_of_real_files_has_a_summary_like_the_example(tmp_path: Path) -> None:
    """With DOCMILL_WRITE_EXAMPLE set, the example is written anew."""
    folder = tmp_path / "documents"
    for place, sample in FILES.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "samples" / sample, folder / place)
    (folder / "contracts" / "empty.txt").write_bytes(b"")
    made = docmill("ingest", folder, "--json")
    assert made.returncode == 1, made.stderr
    batch_id = json.loads(made.stdout)["batches"][0]["batch_id"]
    answers = [docmill("summary", batch_id, *more, "--json") for more in ((), ("--nested",))]
    ui, nested = (json.loads(answer.stdout) for answer in answers)
    check(ui, nested)
    assert ui["batch"]["status"] == "completed_with_errors"
    if os.environ.get("DOCMILL_WRITE_EXAMPLE"):
        text = json.dumps({"ui_json": ui, "nested_summary": nested}, indent=2, ensure_ascii=False, sort_keys=True)
        EXAMPLE.write_text(text.replace(str(folder), "/data/documents") + "\n", encoding="utf-8")
    example = json.loads(EXAMPLE.read_text("utf-8"))
    assert set(shape(example)) == set(shape({"ui_json": ui, "nested_summary": nested}))
    assert outcomes(example["ui_json"]) == outcomes(ui)
    shown = docmill("summary", batch_id[:12])
    assert "completed with errors" in shown.stdout
    assert "contracts/2026/rechnung-2026-0417.docx" in shown.stdout
    assert "contracts/2026/" in docmill("summary", batch_id, "--nested").stdout
    assert docmill("summary", "unknown").returncode == 1
