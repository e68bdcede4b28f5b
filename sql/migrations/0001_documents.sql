-- The tables that documents live in, and the functions that accept them.
--
-- One row of file_extractions is one document. `milestone` says how far it has come and only goes forward within a version;
-- `state` says what is happening to it now; `claim` is the fencing token of whoever works on it. Everything that readers may
-- see lies in document_chunks and raw_extraction; work in flight lies in the buffer tables until the last checkpoint swaps it in.
-- Lock order everywhere: document (by id), then job. The batch row is never locked in a document's transaction.

CREATE EXTENSION IF NOT EXISTS vector;

CREATE TYPE document_milestone AS ENUM (
    'uploaded', 'upload_validated', 'parse_complete', 'parse_validated',
    'chunks_stored', 'embeddings_stored', 'extracted', 'complete'
);
COMMENT ON TYPE document_milestone IS 'The last stage that a document has completed, in order of progress.';

CREATE TYPE document_state AS ENUM ('queued', 'working', 'retrying', 'complete', 'failed', 'duplicate', 'cancelled');
COMMENT ON TYPE document_state IS 'What is happening to a document now.';

CREATE TYPE document_error_type AS ENUM ('RETRYABLE', 'PERMANENT', 'TIMEOUT', 'RATE_LIMIT', 'PARSE_ERROR', 'LLM_ERROR', 'UNKNOWN');
COMMENT ON TYPE document_error_type IS 'What kind of failure it was; decides whether and when a document is tried again.';

CREATE TABLE processing_jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id text NOT NULL UNIQUE CHECK (length(batch_id) BETWEEN 1 AND 200 AND batch_id !~ '[[:cntrl:]]'),
    run_id uuid NOT NULL UNIQUE DEFAULT gen_random_uuid(),
    user_id text NOT NULL DEFAULT 'default',
    source_path text,
    zip_path text,
    total_files integer NOT NULL DEFAULT 0 CHECK (total_files >= 0),
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'processing', 'completed', 'completed_with_errors', 'failed', 'cancelled')),
    error_message text,
    correlation_id text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    sealed_at timestamptz,
    completed_at timestamptz,
    CHECK ((status IN ('completed', 'completed_with_errors', 'failed', 'cancelled')) = (completed_at IS NOT NULL))
);
COMMENT ON TABLE processing_jobs IS 'Batches: documents that were submitted together. Progress is derived from the documents (view batch_status).';
COMMENT ON COLUMN processing_jobs.id IS 'Surrogate key.';
COMMENT ON COLUMN processing_jobs.batch_id IS 'The caller''s name for the batch, or UUIDv5 of user and absolute path of the folder or zip.';
COMMENT ON COLUMN processing_jobs.run_id IS 'One run of the batch; submitting it again with changes makes a new run.';
COMMENT ON COLUMN processing_jobs.user_id IS 'Whose batch it is.';
COMMENT ON COLUMN processing_jobs.source_path IS 'The folder or zip as the submitter named it; for people, never opened.';
COMMENT ON COLUMN processing_jobs.zip_path IS 'The stored zip below the storage base path; null for a folder or a list.';
COMMENT ON COLUMN processing_jobs.total_files IS 'Files of the current run.';
COMMENT ON COLUMN processing_jobs.status IS 'pending, processing, completed, completed_with_errors, failed or cancelled.';
COMMENT ON COLUMN processing_jobs.error_message IS 'Why the batch failed, in plain words.';
COMMENT ON COLUMN processing_jobs.correlation_id IS 'Follows the batch and its documents through logs and events.';
COMMENT ON COLUMN processing_jobs.metadata IS 'The submitter''s own data.';
COMMENT ON COLUMN processing_jobs.created_at IS 'When the batch was first submitted.';
COMMENT ON COLUMN processing_jobs.updated_at IS 'When this row last changed.';
COMMENT ON COLUMN processing_jobs.sealed_at IS 'When every file of the run had been submitted; before that the batch cannot end.';
COMMENT ON COLUMN processing_jobs.completed_at IS 'When the current run ended, however it ended.';

CREATE TABLE file_extractions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    doc_id text NOT NULL UNIQUE CHECK (length(doc_id) BETWEEN 1 AND 200 AND doc_id !~ '[[:cntrl:]]'),
    batch_id text REFERENCES processing_jobs (batch_id),
    run_id uuid,
    user_id text NOT NULL DEFAULT 'default' CHECK (length(user_id) BETWEEN 1 AND 200 AND user_id !~ '[[:cntrl:]]'),
    file_name text NOT NULL,
    file_path text NOT NULL,
    source_path text,
    file_type text CHECK (file_type IN ('pdf', 'word', 'excel', 'powerpoint', 'html', 'email', 'ebook', 'text', 'zip', 'unknown')),
    mime_type text,
    file_size bigint CHECK (file_size >= 0),
    content_sha256 text CHECK (content_sha256 ~ '^[0-9a-f]{64}$'),
    version integer NOT NULL DEFAULT 1 CHECK (version >= 1),
    served_version integer CHECK (served_version BETWEEN 1 AND version),
    milestone document_milestone NOT NULL DEFAULT 'uploaded',
    state document_state NOT NULL DEFAULT 'queued',
    status text NOT NULL GENERATED ALWAYS AS (
        CASE
            WHEN state IN ('complete', 'duplicate') THEN 'completed'
            WHEN state IN ('failed', 'cancelled') THEN 'failed'
            WHEN state = 'queued' AND milestone = 'uploaded' THEN 'pending'
            ELSE 'processing'
        END
    ) STORED,
    priority integer NOT NULL DEFAULT 0,
    raw_extraction jsonb,
    page_count integer,
    chunk_count integer CHECK (chunk_count >= 0),
    duplicate_of text,
    retry_count integer NOT NULL DEFAULT 0 CHECK (retry_count >= 0),
    not_before timestamptz,
    crash_count integer NOT NULL DEFAULT 0 CHECK (crash_count >= 0),
    lone_crash_count integer NOT NULL DEFAULT 0 CHECK (lone_crash_count >= 0),
    requeue_count integer NOT NULL DEFAULT 0 CHECK (requeue_count >= 0),
    alone boolean NOT NULL DEFAULT FALSE,
    error_type document_error_type,
    error_message text,
    correlation_id text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    claim bigint NOT NULL DEFAULT 0,
    claim_job_id bigint,
    claimed_by text,
    lease_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    processing_started_at timestamptz,
    processing_completed_at timestamptz,
    processing_duration_ms bigint GENERATED ALWAYS AS (
        (extract(epoch FROM processing_completed_at - processing_started_at) * 1000)::bigint
    ) STORED,
    CHECK ((state = 'complete') = (milestone = 'complete')),
    CHECK ((state = 'working') = (lease_until IS NOT NULL)),
    CHECK (state <> 'complete' OR served_version = version),
    CHECK (state <> 'failed' OR (error_type IS NOT NULL AND error_message IS NOT NULL))
) WITH (fillfactor = 70);
COMMENT ON TABLE file_extractions IS 'Documents: one row each, with its present version, how far it has come and what was extracted from it.';
COMMENT ON COLUMN file_extractions.id IS 'Surrogate key; the lock order of documents.';
COMMENT ON COLUMN file_extractions.doc_id IS 'The caller''s name for the document, or derived from user and path, batch entry or content. Unique over the installation.';
COMMENT ON COLUMN file_extractions.batch_id IS 'The batch it was last submitted with, if any.';
COMMENT ON COLUMN file_extractions.run_id IS 'The run of the batch it was last submitted with.';
COMMENT ON COLUMN file_extractions.user_id IS 'Whose document it is.';
COMMENT ON COLUMN file_extractions.file_name IS 'The name that the submitter gave; data, never part of a path.';
COMMENT ON COLUMN file_extractions.file_path IS 'The stored upload, relative to the storage base path.';
COMMENT ON COLUMN file_extractions.source_path IS 'Where the submitter had the file (path, or entry in a zip); for people, never opened.';
COMMENT ON COLUMN file_extractions.file_type IS 'pdf, word, excel, powerpoint, html, email, ebook, text, zip or unknown, by content; set by validate.';
COMMENT ON COLUMN file_extractions.mime_type IS 'MIME type by content; set by validate.';
COMMENT ON COLUMN file_extractions.file_size IS 'Size of the stored upload in bytes.';
COMMENT ON COLUMN file_extractions.content_sha256 IS 'SHA-256 of the stored upload, lowercase hex; null until validate where the submitter did not know it.';
COMMENT ON COLUMN file_extractions.version IS 'Number of the present content, from 1.';
COMMENT ON COLUMN file_extractions.served_version IS 'The version that searches see; null until one is complete.';
COMMENT ON COLUMN file_extractions.milestone IS 'The last stage that the present version has completed; only goes forward within a version.';
COMMENT ON COLUMN file_extractions.state IS 'What is happening to it now.';
COMMENT ON COLUMN file_extractions.status IS 'The coarse word: pending, processing, completed or failed.';
COMMENT ON COLUMN file_extractions.priority IS 'Higher is worked on first.';
COMMENT ON COLUMN file_extractions.raw_extraction IS 'Structured data of the served version; docs/raw_extraction.schema.json describes it.';
COMMENT ON COLUMN file_extractions.page_count IS 'Pages, slides or sheets of the present version; null where the format has none.';
COMMENT ON COLUMN file_extractions.chunk_count IS 'Passages of the present version; null until chunk.';
COMMENT ON COLUMN file_extractions.duplicate_of IS 'doc_id of the same user''s document with the same content that was complete first.';
COMMENT ON COLUMN file_extractions.retry_count IS 'Failures that counted since the last milestone.';
COMMENT ON COLUMN file_extractions.not_before IS 'While retrying: no worker takes it up before this time.';
COMMENT ON COLUMN file_extractions.crash_count IS 'Times a worker died or hung with this document at this milestone.';
COMMENT ON COLUMN file_extractions.lone_crash_count IS 'Crashes at this milestone while the document had its worker to itself; at MAX_CRASHES it is failed.';
COMMENT ON COLUMN file_extractions.requeue_count IS 'Times at this milestone that the document had lost its job and was queued again.';
COMMENT ON COLUMN file_extractions.alone IS 'Whether the present claim has its worker to itself, as after a crash; then only this document can be to blame for the next.';
COMMENT ON COLUMN file_extractions.error_type IS 'Kind of the last failure; null once a later try succeeded.';
COMMENT ON COLUMN file_extractions.error_message IS 'The last failure in plain words.';
COMMENT ON COLUMN file_extractions.correlation_id IS 'Follows the document through logs and events.';
COMMENT ON COLUMN file_extractions.metadata IS 'The submitter''s own data; searches can filter by it.';
COMMENT ON COLUMN file_extractions.claim IS 'Fencing token: every write of a worker names the claim it was given, and a newer claim refuses it.';
COMMENT ON COLUMN file_extractions.claim_job_id IS 'procrastinate_jobs.id of the job that holds the claim.';
COMMENT ON COLUMN file_extractions.claimed_by IS 'host:pid of the worker that holds or last held the claim.';
COMMENT ON COLUMN file_extractions.lease_until IS 'Until when the claim is good without renewal, by the database''s clock.';
COMMENT ON COLUMN file_extractions.created_at IS 'When the document was first submitted.';
COMMENT ON COLUMN file_extractions.updated_at IS 'When this row last changed.';
COMMENT ON COLUMN file_extractions.processing_started_at IS 'When a worker first claimed the present version.';
COMMENT ON COLUMN file_extractions.processing_completed_at IS 'When the present version ended.';
COMMENT ON COLUMN file_extractions.processing_duration_ms IS 'From first claim to end, waiting between stages included.';

CREATE INDEX file_extractions_batch ON file_extractions (batch_id) WHERE batch_id IS NOT NULL;
CREATE INDEX file_extractions_batch_unfinished ON file_extractions (batch_id)
    WHERE batch_id IS NOT NULL AND state IN ('queued', 'working', 'retrying');
CREATE INDEX file_extractions_content ON file_extractions (user_id, content_sha256);
CREATE INDEX file_extractions_leases ON file_extractions (lease_until) WHERE state = 'working';
CREATE INDEX file_extractions_waiting ON file_extractions (id) WHERE state IN ('queued', 'retrying');

CREATE TABLE document_markdown (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    markdown text NOT NULL,
    markdown_sha256 text CHECK (markdown_sha256 ~ '^[0-9a-f]{64}$'),
    page_map jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(page_map) = 'array'),
    parser text NOT NULL,
    parse_metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (doc_id, version)
);
COMMENT ON TABLE document_markdown IS 'The parsed text of the served version and of the one in flight.';
COMMENT ON COLUMN document_markdown.doc_id IS 'The document.';
COMMENT ON COLUMN document_markdown.version IS 'The version it was parsed from.';
COMMENT ON COLUMN document_markdown.markdown IS 'The whole text as markdown.';
COMMENT ON COLUMN document_markdown.markdown_sha256 IS 'SHA-256 of the checked markdown, lowercase hex; null until check.';
COMMENT ON COLUMN document_markdown.page_map IS 'Array of {number, start, label}: where each page begins, in code points; empty where the format has no pages.';
COMMENT ON COLUMN document_markdown.parser IS 'Name and version of the parser.';
COMMENT ON COLUMN document_markdown.parse_metadata IS 'What the file says of itself and what the parser noticed.';
COMMENT ON COLUMN document_markdown.created_at IS 'When it was stored.';

CREATE TABLE document_chunks (
    id uuid PRIMARY KEY,
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    user_id text NOT NULL,
    version integer NOT NULL,
    chunk_index integer NOT NULL CHECK (chunk_index >= 0),
    content text NOT NULL CHECK (content <> ''),
    content_sha256 text NOT NULL CHECK (content_sha256 ~ '^[0-9a-f]{64}$'),
    heading_path text[] NOT NULL DEFAULT '{}',
    page_start integer,
    page_end integer CHECK (page_end >= page_start),
    char_start integer NOT NULL,
    char_end integer NOT NULL,
    language text,
    metadata jsonb NOT NULL DEFAULT '{}',
    embedding vector NOT NULL,
    embedding_model text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (doc_id, version, chunk_index)
);
COMMENT ON TABLE document_chunks IS 'The passages that readers may see, with their vectors: those of each document''s served version and nothing else.';
COMMENT ON COLUMN document_chunks.id IS 'UUIDv5 of doc_id, index and content.';
COMMENT ON COLUMN document_chunks.doc_id IS 'The document.';
COMMENT ON COLUMN document_chunks.user_id IS 'Whose passage it is; the same as the document''s.';
COMMENT ON COLUMN document_chunks.version IS 'The version it was cut from.';
COMMENT ON COLUMN document_chunks.chunk_index IS 'Position in the document, from 0 without gaps.';
COMMENT ON COLUMN document_chunks.content IS 'The passage: an exact slice of the markdown.';
COMMENT ON COLUMN document_chunks.content_sha256 IS 'SHA-256 of the content, lowercase hex.';
COMMENT ON COLUMN document_chunks.heading_path IS 'The headings above the passage, outermost first.';
COMMENT ON COLUMN document_chunks.page_start IS 'Page, slide or sheet where it begins, from 1.';
COMMENT ON COLUMN document_chunks.page_end IS 'Page, slide or sheet where it ends.';
COMMENT ON COLUMN document_chunks.char_start IS 'Where it begins in the markdown, in code points.';
COMMENT ON COLUMN document_chunks.char_end IS 'Where it ends in the markdown, exclusive.';
COMMENT ON COLUMN document_chunks.language IS 'ISO 639-1 code of the document''s language; null when unknown.';
COMMENT ON COLUMN document_chunks.metadata IS 'What the chunker noticed.';
COMMENT ON COLUMN document_chunks.embedding IS 'L2-normalised vector of the content.';
COMMENT ON COLUMN document_chunks.embedding_model IS 'Name and version of the model that made the vector.';
COMMENT ON COLUMN document_chunks.created_at IS 'When it was swapped in.';
CREATE INDEX document_chunks_known ON document_chunks (user_id, content_sha256);

CREATE TABLE chunk_buffer (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    chunk_index integer NOT NULL,
    id uuid NOT NULL,
    content text NOT NULL,
    content_sha256 text NOT NULL,
    heading_path text[] NOT NULL,
    page_start integer,
    page_end integer,
    char_start integer NOT NULL,
    char_end integer NOT NULL,
    metadata jsonb NOT NULL,
    PRIMARY KEY (doc_id, version, chunk_index)
);
COMMENT ON TABLE chunk_buffer IS 'Passages of versions in flight, until finalize moves them to document_chunks. Not for readers.';
COMMENT ON COLUMN chunk_buffer.doc_id IS 'The document.';
COMMENT ON COLUMN chunk_buffer.version IS 'The version in flight.';
COMMENT ON COLUMN chunk_buffer.chunk_index IS 'Position in the document, from 0 without gaps.';
COMMENT ON COLUMN chunk_buffer.id IS 'The id that the passage will have.';
COMMENT ON COLUMN chunk_buffer.content IS 'The passage.';
COMMENT ON COLUMN chunk_buffer.content_sha256 IS 'SHA-256 of the content.';
COMMENT ON COLUMN chunk_buffer.heading_path IS 'The headings above the passage.';
COMMENT ON COLUMN chunk_buffer.page_start IS 'Page where it begins.';
COMMENT ON COLUMN chunk_buffer.page_end IS 'Page where it ends.';
COMMENT ON COLUMN chunk_buffer.char_start IS 'Where it begins in the markdown.';
COMMENT ON COLUMN chunk_buffer.char_end IS 'Where it ends in the markdown.';
COMMENT ON COLUMN chunk_buffer.metadata IS 'What the chunker noticed.';

CREATE TABLE vector_buffer (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    chunk_index integer NOT NULL,
    embedding_model text NOT NULL,
    embedding vector NOT NULL,
    PRIMARY KEY (doc_id, version, chunk_index)
);
COMMENT ON TABLE vector_buffer IS 'Vectors of versions in flight, until finalize moves them to document_chunks. Not for readers.';
COMMENT ON COLUMN vector_buffer.doc_id IS 'The document.';
COMMENT ON COLUMN vector_buffer.version IS 'The version in flight.';
COMMENT ON COLUMN vector_buffer.chunk_index IS 'The passage that it is the vector of.';
COMMENT ON COLUMN vector_buffer.embedding_model IS 'Name and version of the model that made it.';
COMMENT ON COLUMN vector_buffer.embedding IS 'L2-normalised vector.';

CREATE TABLE extraction_buffer (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    raw_extraction jsonb NOT NULL,
    PRIMARY KEY (doc_id, version)
);
COMMENT ON TABLE extraction_buffer IS 'Extractions of versions in flight, until finalize moves them to file_extractions. Not for readers.';
COMMENT ON COLUMN extraction_buffer.doc_id IS 'The document.';
COMMENT ON COLUMN extraction_buffer.version IS 'The version in flight.';
COMMENT ON COLUMN extraction_buffer.raw_extraction IS 'What extract made of it.';

CREATE TABLE document_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    doc_id text NOT NULL,
    version integer,
    batch_id text,
    user_id text NOT NULL,
    correlation_id text NOT NULL,
    stage text,
    event text NOT NULL,
    attempt integer,
    duration_ms double precision,
    cpu_ms double precision,
    peak_memory_mb double precision,
    worker text,
    claim bigint,
    detail jsonb NOT NULL DEFAULT '{}'
);
COMMENT ON TABLE document_events IS 'Audit trail: what happened to each document, append-only; outlives the document.';
COMMENT ON COLUMN document_events.id IS 'Order of writing.';
COMMENT ON COLUMN document_events.at IS 'When it was written.';
COMMENT ON COLUMN document_events.doc_id IS 'The document.';
COMMENT ON COLUMN document_events.version IS 'Its version then.';
COMMENT ON COLUMN document_events.batch_id IS 'Its batch then.';
COMMENT ON COLUMN document_events.user_id IS 'Whose document it was.';
COMMENT ON COLUMN document_events.correlation_id IS 'The correlation id of the submission.';
COMMENT ON COLUMN document_events.stage IS 'The stage it concerns, if any.';
COMMENT ON COLUMN document_events.event IS 'submitted, resubmitted, stage_completed, completed, handed_on, retry_scheduled, failed, fenced_off, ...';
COMMENT ON COLUMN document_events.attempt IS 'Which try of the stage it was, from 0.';
COMMENT ON COLUMN document_events.duration_ms IS 'Wall-clock time of the stage in milliseconds.';
COMMENT ON COLUMN document_events.cpu_ms IS 'CPU time of the stage in milliseconds, child processes included.';
COMMENT ON COLUMN document_events.peak_memory_mb IS 'Peak resident memory of the child process that did the work; null where there was none.';
COMMENT ON COLUMN document_events.worker IS 'host:pid of the worker.';
COMMENT ON COLUMN document_events.claim IS 'The claim under which it happened.';
COMMENT ON COLUMN document_events.detail IS 'More, depending on the event.';
CREATE INDEX document_events_document ON document_events (doc_id, id);

CREATE TABLE dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    doc_id text NOT NULL,
    version integer NOT NULL,
    batch_id text,
    user_id text NOT NULL,
    correlation_id text NOT NULL,
    stage text NOT NULL,
    error_type document_error_type NOT NULL,
    error_message text NOT NULL,
    traceback text,
    context jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    resolved_at timestamptz,
    resolution text CHECK (resolution IN ('requeued', 'discarded', 'superseded', 'deleted')),
    CHECK ((resolved_at IS NULL) = (resolution IS NULL))
);
COMMENT ON TABLE dead_letters IS 'Documents that failed for good, with the reason. Open while resolved_at is null.';
COMMENT ON COLUMN dead_letters.id IS 'Number to name it by.';
COMMENT ON COLUMN dead_letters.doc_id IS 'The document.';
COMMENT ON COLUMN dead_letters.version IS 'The version that failed.';
COMMENT ON COLUMN dead_letters.batch_id IS 'Its batch.';
COMMENT ON COLUMN dead_letters.user_id IS 'Whose document it is.';
COMMENT ON COLUMN dead_letters.correlation_id IS 'The correlation id of the submission.';
COMMENT ON COLUMN dead_letters.stage IS 'The stage that failed.';
COMMENT ON COLUMN dead_letters.error_type IS 'Kind of failure.';
COMMENT ON COLUMN dead_letters.error_message IS 'The failure in plain words.';
COMMENT ON COLUMN dead_letters.traceback IS 'Where in the program it happened.';
COMMENT ON COLUMN dead_letters.context IS 'Milestone, attempts, worker and whatever else helps.';
COMMENT ON COLUMN dead_letters.created_at IS 'When it failed.';
COMMENT ON COLUMN dead_letters.resolved_at IS 'When somebody dealt with it; null while open.';
COMMENT ON COLUMN dead_letters.resolution IS 'requeued, discarded, superseded by a new version, or deleted with its document.';
CREATE UNIQUE INDEX dead_letters_open ON dead_letters (doc_id) WHERE resolved_at IS NULL;

CREATE TABLE run_summaries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id uuid NOT NULL UNIQUE,
    batch_id text NOT NULL REFERENCES processing_jobs (batch_id) ON DELETE CASCADE,
    user_id text NOT NULL,
    ui_json jsonb NOT NULL,
    nested_summary jsonb NOT NULL,
    file_count integer NOT NULL,
    success_count integer NOT NULL,
    error_count integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK (file_count >= success_count + error_count)
);
COMMENT ON TABLE run_summaries IS 'One summary for each run of a batch.';
COMMENT ON COLUMN run_summaries.id IS 'Surrogate key.';
COMMENT ON COLUMN run_summaries.run_id IS 'The run.';
COMMENT ON COLUMN run_summaries.batch_id IS 'Its batch.';
COMMENT ON COLUMN run_summaries.user_id IS 'Whose batch it is.';
COMMENT ON COLUMN run_summaries.ui_json IS 'The front end''s contract.';
COMMENT ON COLUMN run_summaries.nested_summary IS 'Folder, file, section.';
COMMENT ON COLUMN run_summaries.file_count IS 'Documents in the run.';
COMMENT ON COLUMN run_summaries.success_count IS 'Those that ended complete or duplicate.';
COMMENT ON COLUMN run_summaries.error_count IS 'Those that ended failed or cancelled.';
COMMENT ON COLUMN run_summaries.created_at IS 'When the run first ended.';
COMMENT ON COLUMN run_summaries.updated_at IS 'When a late document last changed it.';

-- The pipeline's order, as in models/stages.py; a test keeps the two equal.

CREATE FUNCTION due_stage(milestone document_milestone) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN CASE milestone
    WHEN 'uploaded' THEN 'validate'
    WHEN 'upload_validated' THEN 'parse'
    WHEN 'parse_complete' THEN 'check'
    WHEN 'parse_validated' THEN 'chunk'
    WHEN 'chunks_stored' THEN 'embed'
    WHEN 'embeddings_stored' THEN 'extract'
    WHEN 'extracted' THEN 'finalize'
END;
COMMENT ON FUNCTION due_stage IS 'The stage that is due at a milestone; null for complete.';

CREATE FUNCTION stage_queue(stage text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN CASE stage
    WHEN 'embed' THEN 'embed'
    WHEN 'extract' THEN 'extract'
    WHEN 'validate' THEN 'cpu'
    WHEN 'parse' THEN 'cpu'
    WHEN 'check' THEN 'cpu'
    WHEN 'chunk' THEN 'cpu'
    WHEN 'finalize' THEN 'cpu'
END;
COMMENT ON FUNCTION stage_queue IS 'The procrastinate queue of a stage.';

CREATE FUNCTION refuse_invalid_transition() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    allowed boolean;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.milestone <> 'uploaded' OR NEW.state <> 'queued' THEN
            RAISE EXCEPTION 'document %: a new document starts uploaded and queued, not % and %', NEW.doc_id, NEW.milestone, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END IF;
    IF NEW.version > OLD.version THEN
        allowed := NEW.milestone = 'uploaded' AND NEW.state = 'queued' AND NEW.claim > OLD.claim;
    ELSE
        allowed := NEW.version = OLD.version AND NEW.milestone >= OLD.milestone AND NEW.claim >= OLD.claim AND (
            NEW.state = OLD.state
            OR CASE OLD.state
                WHEN 'queued' THEN NEW.state IN ('working', 'failed', 'cancelled')
                WHEN 'working' THEN TRUE
                WHEN 'retrying' THEN NEW.state IN ('working', 'queued', 'failed', 'cancelled')
                WHEN 'failed' THEN NEW.state IN ('queued', 'cancelled')
                WHEN 'duplicate' THEN NEW.state = 'queued'
                WHEN 'cancelled' THEN NEW.state = 'queued'
                ELSE FALSE
            END
        );
    END IF;
    IF NOT allowed THEN
        RAISE EXCEPTION 'document %: version % % % cannot become version % % %', NEW.doc_id,
            OLD.version, OLD.milestone, OLD.state, NEW.version, NEW.milestone, NEW.state
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION refuse_invalid_transition IS 'Within a version milestones only go forward; anything else is refused.';

CREATE TRIGGER file_extractions_transition BEFORE INSERT OR UPDATE OF milestone, state, version, claim ON file_extractions
    FOR EACH ROW EXECUTE FUNCTION refuse_invalid_transition();

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END;
$$;
COMMENT ON FUNCTION refuse_change IS 'Keeps the audit trail append-only.';

CREATE TRIGGER document_events_append_only BEFORE UPDATE ON document_events
    FOR EACH ROW EXECUTE FUNCTION refuse_change();

CREATE FUNCTION defer_stage(doc_id text, stage text, priority integer, scheduled_at timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
-- A twin that already waits serves as well, if it is made to wait no longer than this one would, so the unique queueing lock is no error
-- here. The block keeps it from aborting the caller. A twin that is fetched in between makes room for a new job.
DECLARE
    twin bigint;
BEGIN
    LOOP
        BEGIN
            RETURN (procrastinate_defer_jobs_v1(ARRAY[ROW(
                stage_queue(stage), stage, priority, NULL, stage || ':' || doc_id, jsonb_build_object('doc_id', doc_id), scheduled_at
            )::procrastinate_job_to_defer_v1]))[1];
        EXCEPTION WHEN unique_violation THEN
            UPDATE procrastinate_jobs AS job
            SET scheduled_at = CASE
                WHEN defer_stage.scheduled_at IS NOT NULL AND job.scheduled_at IS NOT NULL THEN least(job.scheduled_at, defer_stage.scheduled_at)
            END
            WHERE job.status = 'todo' AND job.queueing_lock = defer_stage.stage || ':' || defer_stage.doc_id
            RETURNING job.id INTO twin;
            IF FOUND THEN
                RETURN twin;
            END IF;
        END;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION defer_stage IS 'Defers a stage''s procrastinate task for a document and returns the job''s id; an equal waiting job is taken instead.';

CREATE FUNCTION drop_waiting_jobs(doc_id text) RETURNS void LANGUAGE sql AS $$
    SELECT procrastinate_cancel_job_v1(job.id, FALSE, FALSE)
    FROM procrastinate_jobs AS job
    WHERE job.status = 'todo'
        AND job.queueing_lock IN (
            SELECT stage || ':' || drop_waiting_jobs.doc_id
            FROM unnest(ARRAY['validate', 'parse', 'check', 'chunk', 'embed', 'extract', 'finalize']) AS stage
        );
$$;
COMMENT ON FUNCTION drop_waiting_jobs IS 'Cancels the jobs of a document that nobody has fetched.';

CREATE FUNCTION accept_document(
    doc_id text, user_id text, file_name text, file_path text, source_path text, file_size bigint, content_sha256 text,
    metadata jsonb, priority integer, correlation_id text, batch_id text, run_id uuid, lock_timeout_ms integer,
    OUT outcome text, OUT version integer, OUT state document_state
) LANGUAGE plpgsql SET lock_timeout FROM CURRENT AS $$
-- The SET clause restores the caller's own lock_timeout on the way out.
#variable_conflict use_column
DECLARE
    known file_extractions;
BEGIN
    PERFORM set_config('lock_timeout', accept_document.lock_timeout_ms || 'ms', TRUE);
    IF accept_document.run_id IS NOT NULL AND NOT EXISTS (
        SELECT FROM processing_jobs AS b WHERE b.batch_id = accept_document.batch_id AND b.run_id = accept_document.run_id
    ) THEN
        RAISE EXCEPTION 'batch "%": a newer run has begun', accept_document.batch_id USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO file_extractions AS d (
        doc_id, batch_id, run_id, user_id, file_name, file_path, source_path, file_size, content_sha256, priority, correlation_id, metadata
    ) VALUES (
        accept_document.doc_id, accept_document.batch_id, accept_document.run_id, accept_document.user_id,
        accept_document.file_name, accept_document.file_path, accept_document.source_path, accept_document.file_size,
        accept_document.content_sha256, accept_document.priority, accept_document.correlation_id, accept_document.metadata
    ) ON CONFLICT (doc_id) DO NOTHING
    RETURNING d.* INTO known;
    IF FOUND THEN
        outcome := 'accepted';
    ELSE
        SELECT d.* INTO STRICT known FROM file_extractions AS d WHERE d.doc_id = accept_document.doc_id FOR UPDATE;
        IF known.user_id <> accept_document.user_id THEN
            RAISE EXCEPTION 'doc_id "%" is taken; choose another', accept_document.doc_id USING ERRCODE = 'unique_violation';
        END IF;
        IF known.content_sha256 = accept_document.content_sha256 THEN
            -- The same content again: nothing happens, except that a cancelled document is taken up where it was left.
            UPDATE file_extractions AS d SET batch_id = accept_document.batch_id, run_id = accept_document.run_id
            WHERE d.id = known.id AND d.run_id IS DISTINCT FROM accept_document.run_id AND accept_document.run_id IS NOT NULL;
            IF known.state <> 'cancelled' THEN
                outcome := 'unchanged';
                version := known.version;
                state := known.state;
                RETURN;
            END IF;
            UPDATE file_extractions AS d
            SET state = 'queued', claim = d.claim + 1, claim_job_id = NULL, retry_count = 0, crash_count = 0, lone_crash_count = 0,
                requeue_count = 0, alone = FALSE, not_before = NULL, processing_completed_at = NULL, updated_at = now()
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'resumed';
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'requeued'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        ELSE
            UPDATE file_extractions AS d
            SET version = d.version + 1, milestone = 'uploaded', state = 'queued', claim = d.claim + 1, claim_job_id = NULL,
                lease_until = NULL, batch_id = accept_document.batch_id, run_id = accept_document.run_id,
                file_name = accept_document.file_name, file_path = accept_document.file_path,
                source_path = accept_document.source_path, file_size = accept_document.file_size,
                content_sha256 = accept_document.content_sha256, file_type = NULL, mime_type = NULL, page_count = NULL,
                chunk_count = NULL, duplicate_of = NULL, priority = accept_document.priority,
                correlation_id = accept_document.correlation_id, metadata = accept_document.metadata, retry_count = 0,
                crash_count = 0, lone_crash_count = 0, requeue_count = 0, alone = FALSE, not_before = NULL,
                error_type = NULL, error_message = NULL, updated_at = now(),
                processing_started_at = NULL, processing_completed_at = NULL
            WHERE d.id = known.id RETURNING d.* INTO known;
            outcome := 'new_version';
            DELETE FROM chunk_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM vector_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM extraction_buffer AS b WHERE b.doc_id = known.doc_id;
            DELETE FROM document_markdown AS m
            WHERE m.doc_id = known.doc_id AND m.version IS DISTINCT FROM known.served_version;
            UPDATE dead_letters AS l SET resolved_at = now(), resolution = 'superseded'
            WHERE l.doc_id = known.doc_id AND l.resolved_at IS NULL;
        END IF;
        PERFORM drop_waiting_jobs(known.doc_id);
    END IF;
    PERFORM defer_stage(known.doc_id, due_stage(known.milestone), known.priority);
    INSERT INTO document_events (doc_id, version, batch_id, user_id, correlation_id, event, claim, detail)
    VALUES (known.doc_id, known.version, known.batch_id, known.user_id, known.correlation_id,
        CASE outcome WHEN 'accepted' THEN 'submitted' ELSE 'resubmitted' END, known.claim,
        jsonb_build_object('outcome', outcome, 'file_name', known.file_name, 'file_size', known.file_size));
    version := known.version;
    state := known.state;
END;
$$;
COMMENT ON FUNCTION accept_document IS
    'Takes in a stored upload. outcome: accepted, unchanged (same content: nothing happens), new_version, or resumed (was cancelled).';

CREATE FUNCTION submit_document(
    file_path text, doc_id text DEFAULT NULL, user_id text DEFAULT 'default', metadata jsonb DEFAULT '{}', priority integer DEFAULT 0,
    correlation_id text DEFAULT NULL, file_name text DEFAULT NULL, content_sha256 text DEFAULT NULL
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    id text := doc_id;
BEGIN
    IF file_path IS NULL OR file_path = '' OR file_path ~ '(^/|(^|/)\.\.(/|$)|[[:cntrl:]]|\\)' THEN
        RAISE EXCEPTION 'file_path "%" must be relative to the storage base path, without "..", backslashes or control characters',
            file_path USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF id IS NULL THEN
        -- RFC 9562 version 8: Postgres has no SHA-1, which version 5 would need.
        id := encode(substring(sha256(convert_to(user_id || chr(10) || file_path, 'UTF8')) FOR 16), 'hex');
        id := overlay(overlay(id PLACING '8' FROM 13 FOR 1) PLACING 'a' FROM 17 FOR 1)::uuid::text;
    END IF;
    PERFORM accept_document(id, user_id, coalesce(file_name, regexp_replace(file_path, '^.*/', '')), file_path, file_path, NULL,
        content_sha256, coalesce(metadata, '{}'), coalesce(priority, 0), coalesce(correlation_id, gen_random_uuid()::text), NULL, NULL, 5000);
    RETURN id;
END;
$$;
COMMENT ON FUNCTION submit_document IS
    'Submits a file that already lies in storage and returns its doc_id. Without content_sha256 a known doc_id is read again as a new version.';

CREATE FUNCTION settle_batch(batch_id text) RETURNS text LANGUAGE plpgsql AS $$
-- Called after the transaction that ended a document. The cheap look comes first, so that only the last documents lock the batch;
-- the count is a statement of its own, so that it sees what committed while this one waited for the lock.
DECLARE
    batch processing_jobs;
    failed bigint;
    ended bigint;
BEGIN
    IF EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = settle_batch.batch_id AND d.state IN ('queued', 'working', 'retrying')
    ) THEN
        RETURN NULL;
    END IF;
    -- No stronger lock: a submitter's foreign key shares this row until its transaction ends, which may be long.
    SELECT b.* INTO batch FROM processing_jobs AS b WHERE b.batch_id = settle_batch.batch_id FOR NO KEY UPDATE;
    IF NOT FOUND OR batch.sealed_at IS NULL OR batch.status = 'cancelled' THEN
        RETURN NULL;
    END IF;
    SELECT count(*) FILTER (WHERE d.state IN ('failed', 'cancelled')), count(*) INTO failed, ended
    FROM file_extractions AS d
    WHERE d.batch_id = batch.batch_id AND d.run_id = batch.run_id;
    IF EXISTS (
        SELECT FROM file_extractions AS d
        WHERE d.batch_id = batch.batch_id AND d.state IN ('queued', 'working', 'retrying')
    ) THEN
        RETURN NULL;
    END IF;
    UPDATE processing_jobs AS b
    SET status = CASE
            WHEN failed = 0 AND ended >= batch.total_files THEN 'completed' WHEN failed < ended THEN 'completed_with_errors' ELSE 'failed'
        END,
        error_message = CASE WHEN failed = ended AND ended > 0 THEN 'every document of the batch failed' END,
        completed_at = coalesce(b.completed_at, now()), updated_at = now()
    WHERE b.id = batch.id
    RETURNING b.status INTO batch.status;
    RETURN batch.status;
END;
$$;
COMMENT ON FUNCTION settle_batch IS 'Ends a sealed batch if all its documents have ended and returns its status; null while it goes on.';

CREATE FUNCTION begin_batch(
    batch_id text, user_id text, source_path text, correlation_id text, metadata jsonb DEFAULT '{}'
) RETURNS uuid LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    run uuid;
BEGIN
    INSERT INTO processing_jobs AS b (batch_id, user_id, source_path, correlation_id, metadata, status)
    VALUES (begin_batch.batch_id, begin_batch.user_id, begin_batch.source_path, begin_batch.correlation_id, begin_batch.metadata, 'pending')
    ON CONFLICT (batch_id) DO UPDATE
    SET run_id = gen_random_uuid(), status = 'pending', source_path = EXCLUDED.source_path, correlation_id = EXCLUDED.correlation_id,
        metadata = EXCLUDED.metadata, total_files = 0, error_message = NULL, sealed_at = NULL, completed_at = NULL, updated_at = now()
    WHERE b.user_id = EXCLUDED.user_id
    RETURNING b.run_id INTO run;
    IF run IS NULL THEN
        RAISE EXCEPTION 'batch_id "%" is taken; choose another', begin_batch.batch_id USING ERRCODE = 'unique_violation';
    END IF;
    RETURN run;
END;
$$;
COMMENT ON FUNCTION begin_batch IS 'Opens a run of a batch, new or known, and returns its run_id.';

CREATE FUNCTION seal_batch(batch_id text, run_id uuid, total_files integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    UPDATE processing_jobs AS b
    SET sealed_at = now(), total_files = seal_batch.total_files, status = 'processing', updated_at = now()
    WHERE b.batch_id = seal_batch.batch_id AND b.run_id = seal_batch.run_id AND b.status = 'pending';
    RETURN settle_batch(seal_batch.batch_id);
END;
$$;
COMMENT ON FUNCTION seal_batch IS 'Says that every file of the run has been submitted; before that the batch cannot end.';

CREATE VIEW document_status WITH (security_invoker = true) AS
SELECT
    d.doc_id, d.user_id, d.batch_id, d.run_id, d.file_name, d.file_type, d.file_size, d.version, d.served_version,
    CASE
        WHEN d.state IN ('complete', 'failed', 'duplicate', 'cancelled', 'retrying') THEN d.state::text
        WHEN d.milestone = 'upload_validated' THEN CASE d.state WHEN 'queued' THEN 'parse_queued' ELSE 'parsing' END
        WHEN d.milestone = 'chunks_stored' THEN CASE d.state WHEN 'queued' THEN 'embedding_queued' ELSE 'embedding_in_progress' END
        ELSE d.milestone::text
    END AS status,
    d.milestone, d.state, due_stage(d.milestone) AS stage_due, d.page_count, d.chunk_count, d.retry_count, d.crash_count,
    d.error_type, d.error_message, d.correlation_id, d.claimed_by, d.lease_until, d.created_at, d.updated_at,
    d.processing_started_at, d.processing_completed_at, d.processing_duration_ms
FROM file_extractions AS d;
COMMENT ON VIEW document_status IS 'Every document with one word for where it stands.';
COMMENT ON COLUMN document_status.status IS 'uploaded, upload_validated, parse_queued, parsing, parse_complete, parse_validated, chunks_stored, embedding_queued, embedding_in_progress, embeddings_stored, extracted, complete, retrying, failed, duplicate or cancelled.';
COMMENT ON COLUMN document_status.stage_due IS 'The stage that is due or runs; null once complete.';

CREATE VIEW batch_status WITH (security_invoker = true) AS
SELECT
    b.batch_id, b.run_id, b.user_id, b.source_path, b.status, b.total_files, b.sealed_at, b.created_at, b.completed_at,
    count(d.id) FILTER (WHERE d.status = 'pending') AS pending,
    count(d.id) FILTER (WHERE d.status = 'processing') AS processing,
    count(d.id) FILTER (WHERE d.status = 'completed') AS completed,
    count(d.id) FILTER (WHERE d.status = 'failed') AS failed,
    max(d.updated_at) AS last_progress_at
FROM processing_jobs AS b
LEFT JOIN file_extractions AS d ON d.batch_id = b.batch_id AND d.run_id = b.run_id
GROUP BY b.id;
COMMENT ON VIEW batch_status IS 'Every batch with the documents of its current run, counted.';
COMMENT ON COLUMN batch_status.last_progress_at IS 'When one of its documents last changed.';
