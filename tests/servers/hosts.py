"""Hosts on one machine: network namespaces of their own, each joined to this one by a cable that can be pulled. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from typing import Self


def missing() -> str:
    """Why there can be none here, or nothing."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"dmprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    entered = subprocess.run(["ip", "netns", "exec", probe, "true"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return f"network namespaces cannot be entered here: {entered.stderr.strip()}" if entered.returncode else ""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def address_of(number: int) -> str:
    """This machine's address as host `number` (from 0) sees it; another process of tests has others."""
    pid = os.getpid()
    return f"10.{64 + pid % 128}.{pid // 128 % 256}.{4 * number + 1}"


class Host:
    """A host that reaches this machine at `address` and nothing else. It shares the disk."""

    def __init__(self, number: int) -> None:
        self.name = f"dm{os.getpid()}h{number}"
        self.address = address_of(number)
        self._own_address = f"{self.address[: self.address.rindex('.')]}.{4 * number + 2}"
        self._cable = f"{self.name[:13]}c"

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self.name)
            _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            _ip("address", "add", f"{self.address}/30", "dev", self._cable)
            _ip("link", "set", self._cable, "up")
            for device in ("lo", "eth0"):
                _ip("-n", self.name, "link", "set", device, "up")
            _ip("-n", self.name, "address", "add", f"{self._own_address}/30", "dev", "eth0")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            for pid in _ip("netns", "pids", self.name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for removal in (("netns", "delete", self.name), ("link", "delete", self._cable)):  # the second is gone with the first, as a rule
            with contextlib.suppress(RuntimeError):
                _ip(*removal)

    def command(self, *command: str) -> list[str]:
        """Return the command that runs another one on this host; the process id stays the same."""
        return ["ip", "netns", "exec", self.name, *command]

    def pull_cable(self) -> None:
        """Let no packet through any more, and tell nobody."""
        _ip("link", "set", self._cable, "down")

    def plug_in(self) -> None:
        """Let packets through again."""
        _ip("link", "set", self._cable, "up")
