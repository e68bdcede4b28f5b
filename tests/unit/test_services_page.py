"""What docs/services.md tells people to set is accepted, and leads where it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.adapters.embedders import HostedEmbedder, make_embedder
from jobs.adapters.llamaparse import make_llamaparse
from jobs.adapters.llm import make_extractor
from models.settings import Settings

PAGE = Path(__file__).parents[2] / "docs/services.md"
ADDRESSES = {
    "OpenAI": ("https://api.openai.com/v1/embeddings", "Authorization", "text-embedding-3-small@1536"),
    "Azure": (
        "https://example.openai.azure.com/openai/deployments/embed/embeddings?api-version=2024-10-21",
        "api-key",
        "text-embedding-3-small@1536",
    ),
    "vLLM": ("http://vllm:8000/v1/embeddings", None, "BAAI/bge-m3@1024"),
    "TEI": ("http://tei:8080/v1/embeddings", None, "BAAI/bge-small-en-v1.5@384"),
    "Ollama": ("http://ollama:11434/v1/embeddings", None, "nomic-embed-text@768"),
    "LiteLLM": ("http://litellm:4000/v1/embeddings", "Authorization", "text-embedding-3-large@1536"),
}


def blocks() -> list[dict[str, str]]:
    """The settings of each example, with its first word as its name."""
    found = []
    for code in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for part in code.split("\n\n"):
            lines = dict(re.findall(r"^([A-Z][A-Z_]+)=(\S+)$", part, re.MULTILINE))
            if lines:
                title = re.match(r"# (\w+)", part)
                found.append({"": title.group(1) if title else "", **lines})
    return found


def settings_of(block: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    key = tmp_path / "key"
    key.write_text("sk-of-the-page\n", encoding="ascii")
    for name, value in block.items():
        if name:
            monkeypatch.setenv(name, str(key) if name.endswith("_FILE") else value)
    return Settings()


@pytest.mark.parametrize("title", ADDRESSES)
def test_the_settings_of_each_embedding_service_lead_to_its_address_with_its_key(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (each for each in blocks() if each[""] == title)
    settings = settings_of(block, tmp_path, monkeypatch)
    made = make_embedder(settings)
    assert isinstance(made, HostedEmbedder)
    address, header, model = ADDRESSES[title]
    assert (made.service.url("/embeddings"), made.model) == (address, model)
    assert list(made.service._headers()) == ([header] if header else [])
    assert all(str(getattr(settings, name.lower())) == value for name, value in block.items() if name and not name.endswith("_FILE"))


def test_the_settings_of_parsing_and_extraction_make_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (each for each in blocks() if not each[""])
    settings = settings_of(block, tmp_path, monkeypatch)
    assert make_llamaparse(settings) is not None
    assert make_extractor(settings) is not None
