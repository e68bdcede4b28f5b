"""What every embedder promises, tried on each that is installed; and that MiniLM's vectors are the published model's."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.adapters.embedders import (
    HashedText,
    HashedWords,
    HostedEmbedder,
    SentenceModel,
    Static,
    carried,
    make_embedder,
    make_minilm,
    make_own_model,
    minilm,
)
from jobs.adapters.embedders.hosted import Limits
from jobs.adapters.embedders.onnx_model import OnnxModel
from jobs.adapters.exchange import Service
from jobs.adapters.usage import measured
from models.errors import ConfigurationError
from models.settings import Settings
from tests.servers import OpenAIServer


class Embedder(Protocol):
    model: str
    dimensions: int

    async def embed(self, texts: Sequence[str], kind: Literal["passage", "query"] = "passage") -> NDArray[np.float32]: ...


_servers: dict[str, OpenAIServer] = {}


def hosted(dialect: str) -> HostedEmbedder:
    """The hosted embedder against a server of one dialect, which stays for the run; its limits are small, so that texts are split."""
    if dialect not in _servers:
        server = _servers[dialect] = OpenAIServer(dimensions=256 if dialect == "plain" else 1536).__enter__()
        server.shuffled = True
        if dialect == "plain":
            server.base64, server.chooses_dimensions = "refused", "refused"
    service = Service("The embedding service", _servers[dialect].url, None)
    return HostedEmbedder(service, "test-model", 256, Limits(max_texts=3, max_tokens=3000, max_text_tokens=1000))


@pytest.fixture(scope="session", autouse=True)
def _close_servers() -> Iterator[None]:
    yield
    while _servers:
        _servers.popitem()[1].__exit__()


MAKERS: dict[str, Callable[[], Embedder]] = {
    "hashed_words": HashedWords,
    "hashed_words_of_64": lambda: HashedWords(64),
    "hashed_text": HashedText,
    "hosted": lambda: hosted("openai"),
    "hosted_plain": lambda: hosted("plain"),
    "minilm": lambda: make_minilm(threads=2),
    "static": Static,
}
TEXTS = [
    "The lease ends on the last day of March.",
    "Kündigungsfrist: drei Monate zum Quartalsende, schriftlich.",
    "short",
    "Pressure is measured in bar. " * 12,
    "租约于三月最后一天结束。",
    "The invoice is due within thirty days.",
    "😀 e\u0301 \u202e \ufeff",
]
_made: dict[str, Embedder] = {}


@pytest.fixture(params=sorted(MAKERS))
def embedder(request: pytest.FixtureRequest) -> Embedder:
    """Each embedder, loaded once a run."""
    name = str(request.param)
    if name == "static" and find_spec("wordllama") is None:
        pytest.skip("the extra `fast` is not installed")
    return _made.setdefault(name, MAKERS[name]())


async def test_every_text_gets_one_unit_vector_in_order(embedder: Embedder) -> None:
    rows = await embedder.embed(TEXTS)
    assert rows.shape == (len(TEXTS), embedder.dimensions)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    alone = [(await embedder.embed([text]))[0] for text in TEXTS]
    nearest = (rows @ np.stack(alone).T).argmax(axis=1)
    assert nearest.tolist() == list(range(len(TEXTS)))


async def test_the_same_text_gets_the_same_bits_in_any_company(embedder: Embedder) -> None:
    together = await embedder.embed(TEXTS)
    backwards = (await embedder.embed(TEXTS[::-1]))[::-1]
    alone = np.concatenate([await embedder.embed([text]) for text in TEXTS])
    twice = await embedder.embed([TEXTS[0], *TEXTS])
    one, other = await asyncio.gather(embedder.embed(TEXTS), embedder.embed(TEXTS[:3]))
    for again in (backwards, alone, twice[1:], one):
        assert again.tobytes() == together.tobytes()
    assert other.tobytes() == together[:3].tobytes()


async def test_nothing_to_embed_gives_no_rows(embedder: Embedder) -> None:
    assert (await embedder.embed([])).shape == (0, embedder.dimensions)


@pytest.mark.parametrize(
    "text",
    ["", " \n\t ", "\x00", "a\x00b", "\ud800 alone", "\U0010ffff", "-" * 1000, "x" * 100_000, "international " * 7143],
    ids=["empty", "blank", "nul", "nul_inside", "surrogate", "last_code_point", "dashes", "one_long_word", "100000_characters"],
)
async def test_any_text_at_all_has_a_unit_vector(embedder: Embedder, text: str) -> None:
    (row,) = await embedder.embed([text])
    assert np.isfinite(row).all()
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


async def test_queries_find_the_passages_that_share_their_words(embedder: Embedder) -> None:
    if isinstance(embedder, HashedText):
        pytest.skip("digests of whole texts carry no meaning")
    (query,) = await embedder.embed(["when does the lease end"], "query")
    assert (await embedder.embed(TEXTS) @ query).argmax() == 0


async def test_the_model_is_named_and_named_the_same_again(embedder: Embedder) -> None:
    name = next(name for name, made in _made.items() if made is embedder)
    assert embedder.model
    assert (MAKERS[name]().model, MAKERS[name]().dimensions) == (embedder.model, embedder.dimensions)


async def test_embedding_counts_its_cpu_time() -> None:
    embedder = _made.setdefault("minilm", MAKERS["minilm"]())
    with measured() as usage:
        await embedder.embed(TEXTS)
    assert usage.cpu_ms > 1


async def test_concurrent_first_texts_load_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    open_model = OnnxModel

    def counted(graph: Path, tokenizer: Path) -> Any:
        opened.append(graph)
        return open_model(graph, tokenizer)

    monkeypatch.setattr(minilm, "OnnxModel", counted)
    embedder = make_minilm(threads=2)
    await asyncio.gather(*(embedder.embed(["a", "b"]) for _ in range(4)))
    assert len(opened) == 1


async def test_the_end_of_a_long_text_counts() -> None:
    embedder = _made.setdefault("minilm", MAKERS["minilm"]())
    filler = "The committee met and approved the minutes of the previous meeting. " * 30
    plain, salted, query = await embedder.embed([filler, filler + "The volcano erupted at dawn. " * 20, "volcanic eruption"])
    assert salted @ query > plain @ query + 0.05


async def test_minilm_gives_the_published_vectors(corpus: Path) -> None:
    folder = corpus / "retrieval" / "scifact"
    embedder = _made.setdefault("minilm", MAKERS["minilm"]())
    with (folder / "queries.jsonl").open(encoding="utf-8") as lines:
        queries = [json.loads(line)["text"] for line in lines][:50]
    rows = await embedder.embed(queries)
    known = np.load(folder / "scifact_q.f16.npy")[:50].astype(np.float32)
    assert (rows * known).sum(axis=1).min() > 0.999


async def test_a_model_of_ones_own_is_named_by_its_content(tmp_path: Path) -> None:
    mine = model_folder(tmp_path / "mine")
    (tmp_path / "copy").mkdir()
    for file in mine.iterdir():
        shutil.copy(file, tmp_path / "copy")
    first, second, by_file = make_own_model(mine), make_own_model(tmp_path / "copy"), make_own_model(mine / "model.onnx")
    assert first.model.startswith("mine@")
    assert first.model.split("@")[1] == second.model.split("@")[1]
    assert by_file.model == first.model
    assert first.dimensions == 384
    assert (await first.embed(TEXTS[:2])).tobytes() == (await make_minilm().embed(TEXTS[:2])).tobytes()
    tokenizer = mine / "tokenizer.json"
    content = tokenizer.read_text(encoding="utf-8")
    tokenizer.unlink()
    tokenizer.write_text(content + "\n", encoding="utf-8")
    assert make_own_model(mine).model != first.model


@pytest.mark.parametrize(
    ("broken", "named"), [("model.onnx", "model.onnx"), ("tokenizer.json", "tokenizer.json")], ids=["graph", "tokenizer"]
)
def test_a_model_of_ones_own_that_is_missing_or_broken_is_named(tmp_path: Path, broken: str, named: str) -> None:
    mine = model_folder(tmp_path / "mine")
    (mine / broken).unlink()
    with pytest.raises(ConfigurationError, match=named):
        make_own_model(mine)
    (mine / broken).write_text("no model")
    with pytest.raises(ConfigurationError, match=named):
        make_own_model(mine)


async def test_a_carried_file_that_is_not_the_tried_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "WEIGHTS", (minilm.WEIGHTS[0], "0" * 64))
    with pytest.raises(ConfigurationError) as caught:
        await make_minilm().embed(["text"])
    message = str(caught.value)
    assert "model.onnx_data" in message
    assert "0" * 64 in message
    assert "60c758432aa596c30a122942dfe594c457d4d713f890926f1c5f920bd496c8de" in message


def test_a_package_that_is_not_installed_is_named_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"no-such-package.*Install the extra"):
        carried.checked_file("no-such-package", "file", "0" * 64, hint="Install the extra.")
    with pytest.raises(ConfigurationError, match="nothing/here is missing"):
        carried.checked_file("numpy", "nothing/here", "0" * 64, hint="Install it again.")


@pytest.mark.parametrize(
    ("provider", "kind"),
    [("local", SentenceModel), ("fast", Static), ("hash", HashedWords), ("openai", HostedEmbedder)],
)
def test_the_setting_chooses_the_embedder(provider: str, kind: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDDING_PROVIDER", provider)
    monkeypatch.setenv("EMBEDDING_API_KEY", "sk-test")
    monkeypatch.delenv("EMBEDDING_MODEL_PATH", raising=False)
    assert type(make_embedder(Settings())) is kind


def test_the_setting_chooses_a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMBEDDING_PROVIDER", "local")
    monkeypatch.setenv("EMBEDDING_MODEL_PATH", str(model_folder(tmp_path / "mine") / "model.onnx"))
    assert make_embedder(Settings()).model.startswith("mine@")


def model_folder(folder: Path) -> Path:
    """A folder with the carried model's files in it, laid out as one's own would be."""
    folder.mkdir()
    for relative, sha256 in (minilm.GRAPH, minilm.WEIGHTS, minilm.TOKENIZER):
        path = carried.checked_file(minilm.PACKAGE, relative, sha256, hint="")
        # Linked, not copied: ninety megabytes.
        (folder / path.name).hardlink_to(path) if path.stat().st_dev == folder.stat().st_dev else shutil.copy(path, folder)
    return folder
