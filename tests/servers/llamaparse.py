"""LlamaParse's API, version 2: upload, job, pages. A "page" of a file is what stands between form feeds in it."""

from __future__ import annotations

import json
import re
import ssl
import uuid
from dataclasses import dataclass, field
from typing import Any

from tests.servers.http import LocalServer, Request, Response


@dataclass(slots=True)
class Job:
    """One job."""

    name: str
    pages: list[str]
    wanted: set[int]
    configuration: dict[str, Any]
    ready_at: float
    status: str = "PENDING"
    error: str | None = None
    polls: int = field(default=0)


class LlamaParseServer(LocalServer):
    """Gives back the text of the file, page by page. Attributes may be changed while it runs."""

    def __init__(self, *, port: int = 0, latency: float = 0.0, key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(port=port, latency=latency, key=key, tls=tls)
        self.seconds = 0.0
        """How long a job takes."""
        self.jobs: dict[str, Job] = {}
        self.bad_pages: dict[int, int] = {}
        """Page number -> how many jobs fail on it yet."""
        self.blind = False
        """Whether pages come back without text."""
        self.fails: str | None = None
        """What jobs fail with as a whole."""

    async def handle(self, request: Request, mangle: str) -> Response:
        """Answer one request."""
        if request.method == "POST" and request.path == "/api/v2/parse/upload":
            return self._upload(request)
        match = re.fullmatch(r"/api/v2/parse/([\w-]+)", request.path)
        if request.method == "GET" and match and match[1] in self.jobs:
            return self._poll(match[1], expand=request.query.get("expand", []))
        return Response.of({"detail": "Not Found"}, 404)

    def _upload(self, request: Request) -> Response:
        parts = _multipart(request)
        configuration = json.loads(parts["configuration"][1])
        if configuration.get("tier") not in ("fast", "cost_effective", "agentic", "agentic_plus") or "version" not in configuration:
            return Response.of({"detail": [{"loc": ["configuration"], "msg": "Field required", "type": "missing"}]}, 422)
        name, content = parts["file"]
        pages = content.decode("utf-8", "replace").split("\f")
        wanted = _numbers(configuration.get("page_ranges", {}).get("target_pages")) or set(range(1, len(pages) + 1))
        job_id = str(uuid.uuid4())
        self.jobs[job_id] = Job(name, pages, wanted, configuration, self.clock + self.seconds)
        self.tally.uploads += 1
        self.tally.answered += 1
        self.tally.texts += len(wanted)
        return Response.of({"id": job_id, "project_id": "p", "status": "PENDING", "error_message": None})

    def _poll(self, job_id: str, *, expand: list[str]) -> Response:
        job = self.jobs[job_id]
        job.polls += 1
        self.tally.polls += 1
        self.tally.answered += 1
        if job.status in ("PENDING", "RUNNING"):
            job.status = "RUNNING" if self.clock < job.ready_at else "FAILED" if self.fails else "COMPLETED"
        told = {"id": job_id, "project_id": "p", "status": job.status, "error_message": self.fails, "tier": job.configuration["tier"]}
        data: dict[str, Any] = {"job": {**told, "usage": {"credits": 3.0 * len(job.wanted)}}}
        if job.status == "COMPLETED" and "markdown" in expand:
            data["markdown"] = {"pages": [self._page(number, job) for number in sorted(job.wanted)]}
            for number in job.wanted:
                if self.bad_pages.get(number):
                    self.bad_pages[number] -= 1
        return Response.of(data)

    def _page(self, number: int, job: Job) -> dict[str, Any]:
        if self.bad_pages.get(number):
            return {"page_number": number, "success": False, "error": "The page could not be rendered"}
        return {"page_number": number, "success": True, "markdown": "" if self.blind else job.pages[number - 1]}


def _multipart(request: Request) -> dict[str, tuple[str, bytes]]:
    """Return field -> (file name, content)."""
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    found: dict[str, tuple[str, bytes]] = {}
    for part in request.body.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        names = dict(re.findall(r'(\bname|filename)="([^"]*)"', head.decode()))
        found[names["name"]] = (names.get("filename", ""), content.removesuffix(b"\r\n"))
    return found


def _numbers(ranges: str | None) -> set[int]:
    numbers: set[int] = set()
    for part in (ranges or "").split(","):
        if part:
            low, _, high = part.partition("-")
            numbers |= set(range(int(low), int(high or low) + 1))
    return numbers
