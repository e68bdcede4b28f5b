-- What grew with everything that was ever deleted or unpacked, instead of with what is asked for: who removes the files of a deleted document, or
-- the next files of all, read every note that there is; and whether a later run has unpacked an archive anew was found out by sorting all
-- archives of its batch, for each window of them. An index keeps its table from being written while it is built.

CREATE INDEX files_to_remove_in_order ON files_to_remove (noted_at);
COMMENT ON INDEX files_to_remove_in_order IS 'Which noted files come next.';
CREATE INDEX files_to_remove_document ON files_to_remove (doc_id) WHERE doc_id IS NOT NULL;
COMMENT ON INDEX files_to_remove_document IS 'The noted files of a deleted document.';

-- By the hash of the path, because the path of an archive beside a long batch_id can be more than an index takes.
CREATE INDEX batch_archives_place ON batch_archives (batch_id, md5(entry_path), state, ended_at);
COMMENT ON INDEX batch_archives_place IS 'The archives of a batch, and by hash those of one path in it that were unpacked before some time.';
-- Its place is taken. At last, because this stops readers too until the transaction ends.
DROP INDEX batch_archives_batch;

CALL pin_search_path();
