-- What keeps its cost however much waits.
--
-- Whether a run goes on is asked after each document that ends. Asked of the table as a whole, a planner that expects most documents to wait
-- reads it from the beginning until it meets one, past all that have ended: a batch of a million costs more with every document. So it is
-- asked of an index that has the newest document of a run first, which is the last to be worked on, and by a function that uses no other way.
--
-- A lease that is renewed changed an indexed column, and so wrote a new entry into every index of the table. What is being worked on is
-- a few rows for each worker: they are found by their state, and a renewal is a HOT update.
--
-- Rows of a queue change three times and lie still afterwards. Vacuum by a fifth of the table comes too late for a large one: each fetch, and
-- each end of a document, walks past the index entries of what was there before.
--
-- Compressing a document's markdown as Postgres does by default took a fifth of what its last checkpoint costs the server. Where the server
-- knows lz4 it takes that, which is much less work; elsewhere the text is stored as it is. Rows that are there stay as they are.

CREATE INDEX file_extractions_unfinished ON file_extractions (batch_id, run_id, id DESC)
    WHERE batch_id IS NOT NULL AND state IN ('queued', 'working', 'retrying');
COMMENT ON INDEX file_extractions_unfinished IS 'Whether a batch goes on, the newest document first, and which batches do.';
CREATE INDEX file_extractions_working ON file_extractions (id) WHERE state = 'working';
COMMENT ON INDEX file_extractions_working IS 'What is being worked on; without the lease, so that renewing one is a HOT update.';

CREATE OR REPLACE FUNCTION run_is_open(batch_id text, run_id uuid) RETURNS boolean LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
BEGIN
    -- By ranges and in that order, which no other index has: one over all documents of the batch would be walked past those that have ended.
    PERFORM FROM file_extractions AS d
    WHERE d.batch_id BETWEEN run_is_open.batch_id AND run_is_open.batch_id AND d.run_id BETWEEN run_is_open.run_id AND run_is_open.run_id
        AND d.state IN ('queued', 'working', 'retrying')
    ORDER BY d.batch_id, d.run_id, d.id DESC
    LIMIT 1;
    RETURN FOUND OR EXISTS (
        SELECT FROM batch_archives AS a WHERE a.run_id = run_is_open.run_id AND a.state IN ('waiting', 'unpacking')
    );
END;
$$;

ALTER TABLE file_extractions SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000);
ALTER TABLE procrastinate_jobs SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000);

DO $$
BEGIN
    ALTER TABLE document_markdown ALTER COLUMN markdown SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    ALTER TABLE document_markdown ALTER COLUMN markdown SET STORAGE EXTERNAL;
END;
$$;

-- At last, because this stops readers too until the transaction ends.
DROP INDEX file_extractions_batch_unfinished;
DROP INDEX file_extractions_leases;

CALL pin_search_path();
