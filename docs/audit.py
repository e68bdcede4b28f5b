"""Looks the pinned dependencies up in a database of known vulnerabilities: `make audit`, and once a day `make check`.

Findings fail. Where the tool cannot be installed or the database not be reached, it says that it was skipped and why, and fails nothing:
work goes on without a network. PIP_AUDIT_OSV_URL names a mirror of the database.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
TOOLS = ROOT / ".venv" / "tools"
"""An environment of its own: what the tool needs shall be among neither docmill's dependencies nor the tests'."""
DONE = ROOT / ".venv" / ".audited"
DAY = 86_400
INSTALL_SECONDS, AUDIT_SECONDS = 180, 180


class Skipped(Exception):
    """Nothing could be found out, and why."""


def tool() -> Path:
    """Return the program pip-audit, installed on first use. Skipped where it cannot be."""
    program = TOOLS / "bin" / "pip-audit"
    if program.exists():
        return program
    pip = [str(TOOLS / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1", "-c", str(PINS)]
    for command in ([sys.executable, "-m", "venv", str(TOOLS)], [*pip, "pip-audit"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)  # noqa: S603 - our own words
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Skipped(f"pip-audit could not be installed ({type(error).__name__})") from error
        if done.returncode != 0:
            raise Skipped(f"pip-audit could not be installed: {last_line(done.stderr)}")
    return program


def audit(program: Path, pins: Path) -> tuple[int, list[str]]:
    """Return how many packages were looked up, and a line for each known vulnerability. Skipped where none could be."""
    command = [
        str(program),
        "--disable-pip",
        "--no-deps",
        "-r",
        str(pins),
        "-s",
        "osv",
        "--timeout",
        "5",
        "--progress-spinner",
        "off",
        "-f",
        "json",
    ]
    if mirror := os.environ.get("PIP_AUDIT_OSV_URL"):
        command += ["--osv-url", mirror]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_SECONDS, check=False)  # noqa: S603 - our own words
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"the database of vulnerabilities did not answer within {AUDIT_SECONDS} s") from error
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        raise Skipped(f"the database of vulnerabilities was not reached: {last_line(done.stderr)}") from None
    looked_up = [package for package in found if "vulns" in package]
    if not looked_up:
        raise Skipped("the database of vulnerabilities knows none of the packages")
    return len(looked_up), [
        f"{package['name']} {package['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for package in looked_up
        for flaw in package["vulns"]
    ]


def last_line(text: str) -> str:
    """Return the last line of what a program complained of, which for a traceback is its reason."""
    return (text.strip().splitlines() or ["no reason given"])[-1][:200]


def digest(pins: Path) -> str:
    """Return what tells one state of the pins from another."""
    return hashlib.sha256(pins.read_bytes()).hexdigest()


def audited_today() -> bool:
    """Say whether these very pins were looked up within a day, and nothing was found."""
    return DONE.exists() and DONE.read_text(encoding="utf-8") == digest(PINS) and time.time() - DONE.stat().st_mtime < DAY


def main() -> int:
    """Audit, print the outcome, and return the exit code."""
    if "--daily" in sys.argv[1:] and audited_today():
        return 0
    try:
        count, flaws = audit(tool(), PINS)
    except Skipped as skipped:
        print(f"audit of dependencies: skipped, {skipped}")
        return 0
    for flaw in flaws:
        print(flaw, file=sys.stderr)
    print(f"audit of dependencies: {count} looked up, {len(flaws)} known vulnerabilities")
    if not flaws:
        DONE.write_text(digest(PINS), encoding="utf-8")
    return 1 if flaws else 0


if __name__ == "__main__":
    sys.exit(main())
