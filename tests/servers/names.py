"""Host names of one's own: what is started here reads its own /etc/hosts, which may change meanwhile. Needs root and util-linux."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_MOUNTED = 'mount --bind "$0" /etc/hosts && exec "$@"'


def missing() -> str:
    """Why there can be none here, or nothing."""
    if shutil.which("unshare") is None:
        return "unshare is not installed (Debian: apt-get install util-linux)"
    if os.geteuid() != 0:
        return "mount namespaces need root"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True, text=True, check=False
    )
    return f"no mount namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Names:
    """This machine, with further names for itself."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.forget()

    def know(self, *names: str) -> None:
        """Let names mean this machine."""
        self._write(Path("/etc/hosts").read_text(encoding="utf-8") + "".join(f"127.0.0.1 {name}\n" for name in names))

    def forget(self) -> None:
        """Know no names but the machine's."""
        self._write(Path("/etc/hosts").read_text(encoding="utf-8"))

    def command(self, *command: str) -> list[str]:
        """Return the command that runs another one with these names; the process id stays the same."""
        return ["unshare", "--mount", "sh", "-c", _MOUNTED, str(self._file), *command]

    def _write(self, text: str) -> None:
        # In its place, as what is mounted is this file and no other of its name.
        with self._file.open("w", encoding="utf-8") as file:
            file.write(text)
