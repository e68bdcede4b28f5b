"""The local servers speak the real protocol: OpenAI's own client understands them. And they count what they see."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel

from tests.servers import OpenAIServer, Tally, faults


class Facts(BaseModel):
    title: str
    pages: int


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(key="sk-test", dimensions=64) as running:
        yield running


@pytest.fixture
def sdk(server: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="sk-test", max_retries=0) as client:
        yield client


def test_openai_s_own_client_gets_embeddings(sdk: openai.OpenAI) -> None:
    answer = sdk.embeddings.create(model="text-embedding-3-small", input=["a", "b"], dimensions=32)
    assert [len(item.embedding) for item in answer.data] == [32, 32]
    assert answer.usage.prompt_tokens == 2


def test_openai_s_own_client_gets_a_structured_answer(sdk: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "<document x>\nAnnual report\n</document x>"}]
    answer = sdk.chat.completions.parse(model="gpt-4.1-mini", messages=messages, response_format=Facts)  # type: ignore[arg-type]
    assert answer.choices[0].message.parsed == Facts(title="Annual report", pages=0)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", openai.RateLimitError),
        ("401", openai.AuthenticationError),
        ("500", openai.InternalServerError),
        ("reset", openai.APIConnectionError),
    ],
)
def test_openai_s_own_client_knows_the_failures(server: OpenAIServer, sdk: openai.OpenAI, fault: str, kind: type[Exception]) -> None:
    server.script(faults.always(faults.NAMED[fault]))
    with pytest.raises(kind):
        sdk.embeddings.create(model="m", input=["a"])
    assert sum(server.tally.faults.values()) == 1


def test_the_server_keeps_to_its_limits_by_itself(server: OpenAIServer, sdk: openai.OpenAI) -> None:
    server.requests_per_minute = 3
    for _ in range(3):
        sdk.embeddings.create(model="m", input=["a"])
    with pytest.raises(openai.RateLimitError):
        sdk.embeddings.create(model="m", input=["a"])
    assert server.tally.answered == 3


def test_scripts_say_when() -> None:
    fault = faults.NAMED["500"]

    def played(script: faults.Script, times: int = 10, step: float = 1) -> str:
        return "".join("." if script(number + 1, number * step) is None else "x" for number in range(times))

    assert played(faults.only_every(5, fault)) == "xxxx.xxxx."
    assert played(faults.every(4, fault)) == "...x...x.."
    assert played(faults.first(3, fault)) == "xxx......."
    assert played(faults.outage(2, 5, fault)) == "..xxx....."
    assert played(faults.flapping(2, fault)) == "..xx..xx.."
    assert played(faults.sequence(None, fault)) == ".x........"


def test_a_tally_finds_the_hardest_window() -> None:
    tally = Tally(at=[0, 1, 59, 60.5, 60.9], tokens_at=[(0, 10), (30, 20), (61, 5)])
    assert tally.most_in_any(60) == 4
    assert tally.in_first_second_after(60.5) == 2
    assert tally.most_tokens_in_any(60) == 30


def test_a_server_runs_by_itself_and_is_scripted_over_http() -> None:
    command = [sys.executable, "-m", "tests.servers", "openai", "--port", "0", "--dimensions", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            root = process.stdout.readline().split()[-1].removesuffix("/v1")

            def post(path: str, data: object) -> dict[str, object]:
                request = urllib.request.Request(root + path, json.dumps(data).encode(), {"content-type": "application/json"})
                with urllib.request.urlopen(request) as answer:
                    return dict(json.load(answer))

            post("/_script", {"when": "first", "count": 1, "fault": "502_html"})
            with pytest.raises(urllib.error.HTTPError, match="502"):
                post("/v1/embeddings", {"model": "m", "input": ["a"]})
            post("/v1/embeddings", {"model": "m", "input": ["a"]})
            told = post("/_tally", {})
            assert (told["requests"], told["answered"], told["faults"]) == (2, 1, {"status_502": 1})
        finally:
            process.terminate()
