"""The settings of outside services: how they are called, and hosted embedding, parsing and extraction."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings.checks import AnyCase, BaseUrl, Key, Price, Words


class ProviderSettings(BaseSettings):
    """Part of `Settings`; EMBEDDING_PROVIDER stands there."""

    model_config = SettingsConfigDict(defer_build=True)

    # Calls, breakers and budgets
    provider_connect_seconds: Annotated[float, Interval(ge=0.1, le=300)] = 10
    """Longest wait for a connection to an outside service, in seconds."""
    provider_read_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Longest silence of an outside service in mid-call, in seconds."""
    breaker_failures: Annotated[int, Interval(ge=1, le=10_000)] = 5
    """Failures of an outside service, over all workers, after which it is not called for a while: in a row, or within
    BREAKER_WINDOW_SECONDS and a tenth of its calls. A refused key or a quota that is used up is enough at once."""
    breaker_window_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Seconds in which the failures must lie."""
    breaker_open_seconds: Annotated[float, Interval(ge=0.1, le=3600)] = 60
    """Seconds until one call tries whether the service is back; doubles while it is not."""
    breaker_max_open_seconds: Annotated[float, Interval(ge=0.1, le=86_400)] = 900
    """Longest time between two such tries, in seconds."""
    embedding_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the embedding service in any 60 s, over all workers that use the same address and key. 0: no limit."""
    embedding_tokens_per_minute: Annotated[int, Interval(ge=0, le=100_000_000_000)] = 0
    """Most tokens to the embedding service in any 60 s. 0: no limit."""
    extraction_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the extraction service in any 60 s, over all workers that use the same address and key. 0: no limit."""
    extraction_tokens_per_minute: Annotated[int, Interval(ge=0, le=100_000_000_000)] = 0
    """Most tokens to and from the extraction service in any 60 s. 0: no limit."""
    parse_requests_per_minute: Annotated[int, Interval(ge=0, le=10_000_000)] = 0
    """Most requests to the parsing service in any 60 s, over all workers that use the same address and key. 0: no limit."""

    # Hosted embedding
    embedding_base_url: BaseUrl = "https://api.openai.com/v1"
    """Where EMBEDDING_PROVIDER=openai finds /embeddings. For Azure the deployment's address with ?api-version=..., and the key goes
    into Azure's own header."""
    embedding_api_key: Key = None
    """Key of the embedding service. Servers of one's own may need none."""
    embedding_model: Annotated[str, Words(allowed="a name that the service knows")] = Field(
        default="text-embedding-3-small", min_length=1, max_length=200
    )
    """Model of the embedding service. Stored beside each vector as name@dimensions."""
    embedding_dimensions: Annotated[int | None, Interval(ge=1, le=16_000), Words(allowed="1 to 16000", default="unset")] = None
    """Dimensions of the service's vectors: asked for where the service can choose, and every vector is checked. Unset: the model's own
    size, for OpenAI's models (1536 for text-embedding-3-small); other models need it. HNSW indexes end at 2000."""
    embedding_max_texts: Annotated[int, Interval(ge=1, le=2048)] = 256
    """Most texts of one request. TEI refuses more than its --max-client-batch-size, 32 by default."""
    embedding_max_tokens: Annotated[int, Interval(ge=64, le=10_000_000)] = 250_000
    """Most tokens of one request, by a safe estimate without a tokenizer. OpenAI's limit is 300000."""
    embedding_gather_ms: Annotated[int, Interval(ge=0, le=10_000)] = 200
    """Longest wait of a request that is not full for texts of other documents which this worker has in hand, in milliseconds. 0: no
    request is shared by documents."""
    embedding_concurrent_requests: Annotated[int, Interval(ge=1, le=1000)] = 4
    """Most requests that one worker has under way to the embedding service; a document never has more than one."""
    embedding_max_text_tokens: Annotated[int, Interval(ge=16, le=1_000_000)] = 8000
    """Tokens that the model reads of one text, by the same estimate. OpenAI's limit is 8192; smaller models read 512 or less, and some
    servers cut off the rest without a word."""
    embedding_long_texts: Annotated[Literal["split", "refuse"], AnyCase] = "split"
    """A text over EMBEDDING_MAX_TEXT_TOKENS. split: its vector is the mean of its pieces, weighted by length.
    refuse: its document fails."""
    embedding_timeout_seconds: Annotated[float, Interval(ge=0.05, le=3600)] = 120
    """Seconds for one whole request to the embedding service."""

    # Hosted parsing
    parsing_provider: Annotated[Literal["local", "llamaparse"], AnyCase] = "local"
    """local: in a child process of the worker. llamaparse: by LlamaParse, and what it does not serve in a child process."""
    llamaparse_base_url: BaseUrl = "https://api.cloud.llamaindex.ai"
    """Where LlamaParse is; https://api.cloud.eu.llamaindex.ai in Europe."""
    llamaparse_api_key: Key = None
    """Key of LlamaParse."""
    llamaparse_tier: Annotated[Literal["cost_effective", "agentic", "agentic_plus"], AnyCase] = "cost_effective"
    """What a page may cost. The tier fast is not offered: it gives no markdown."""
    llamaparse_version: Annotated[str, Words(allowed="latest or a version that LlamaParse names")] = Field(
        default="latest", min_length=1, max_length=100
    )
    """Version of the tier. One that is named keeps results the same when the service changes."""
    llamaparse_max_file_mb: Annotated[int, Interval(ge=1, le=512)] = 512
    """Largest file that is sent to LlamaParse, in MB of 1,000,000 bytes. 512 is its own limit."""
    llamaparse_poll_seconds: Annotated[float, Interval(ge=0.01, le=300)] = 1
    """Seconds before the first question whether a job is done; grows by half with each further one, up to 15 s."""
    llamaparse_deadline_seconds: Annotated[float, Interval(ge=0.1, le=86_400)] = 1500
    """Seconds that a LlamaParse job may take before it counts as failed. Less than STAGE_TIMEOUT_SECONDS, or that comes first."""
    llamaparse_timeout_seconds: Annotated[float, Interval(ge=0.05, le=3600)] = 300
    """Seconds for one whole request to LlamaParse: an upload, or the download of all pages."""

    partial_parse: Annotated[Literal["keep", "fail"], AnyCase] = "keep"
    """A document that a limit cuts (MAX_PAGES, PARSE_OUTPUT_MB, PARSE_TIMEOUT_SECONDS, PARSE_MEMORY_MB), or of which LlamaParse fails on
    some pages twice. keep: it goes on without the rest, and the view incomplete_documents shows it. fail: it is failed."""

    # Extraction by a language model
    extraction_provider: Annotated[Literal["local", "openai"], AnyCase] = "local"
    """local: what can be read off a text without a model. openai: also what a language model finds in it, over OpenAI's chat protocol."""
    extraction_base_url: BaseUrl = "https://api.openai.com/v1"
    """Where EXTRACTION_PROVIDER=openai finds /chat/completions. Azure as for EMBEDDING_BASE_URL."""
    extraction_api_key: Key = None
    """Key of the extraction service. Servers of one's own may need none."""
    extraction_model: Annotated[str, Words(allowed="a name that the service knows")] = Field(
        default="gpt-4.1-mini", min_length=1, max_length=200
    )
    """Model of the extraction service; one with structured outputs."""
    extraction_schema: Annotated[
        str | None, Words(allowed="a JSON Schema file, or package.module:Model for a pydantic model", default="unset")
    ] = None
    """What is extracted. Unset: type, title, summary, language, parties, dates, amounts, identifiers and topics."""
    extraction_max_tokens: Annotated[int, Interval(ge=1000, le=10_000_000)] = 60_000
    """Most tokens of the document in one request, by the same estimate as for embedding. A longer document is read in parts, and the
    answers are merged."""
    extraction_max_parts: Annotated[int, Interval(ge=1, le=1000)] = 20
    """Most parts of one document. The extraction of a longer one is refused, never of a cut one."""
    extraction_max_answer_tokens: Annotated[int, Interval(ge=64, le=1_000_000)] = 8000
    """Most tokens of one answer."""
    extraction_timeout_seconds: Annotated[float, Interval(ge=0.05, le=3600)] = 180
    """Seconds for one whole request to the extraction service, and its longest silence."""

    # Prices and what may be spent
    embedding_price_per_million_tokens: Price = None
    """Price of a million tokens for EMBEDDING_MODEL, for the ledger; 0 for a server of one's own. Prices may be in any currency, all in the
    same one. Unset: not known; calls are in the ledger at no cost, and no limit of cost can be set."""
    extraction_price_per_million_input_tokens: Price = None
    """Price of a million tokens sent to EXTRACTION_MODEL; see EMBEDDING_PRICE_PER_MILLION_TOKENS."""
    extraction_price_per_million_output_tokens: Price = None
    """Price of a million tokens received from it."""
    parse_price_per_page: Price = None
    """Price of a page at LLAMAPARSE_TIER."""
    max_cost_per_document: Annotated[float, Interval(ge=0, le=1_000_000_000)] = 0
    """Most that the calls for one document may cost, in the currency of the prices, all its versions and runs together. A call that would
    go beyond is not made, and the document is a dead letter (or goes on without its extraction). Calls under way count with what they may
    cost at most. Needs the prices of the services in use. 0: no limit."""
    max_cost_per_batch: Annotated[float, Interval(ge=0, le=1_000_000_000)] = 0
    """The same for all documents of a batch together. 0: no limit."""
