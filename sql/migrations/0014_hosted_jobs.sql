-- Jobs at outside services that are paid for when they start and are asked for their result later, perhaps by another worker.

CREATE TABLE hosted_jobs (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    part text NOT NULL CHECK (part IN ('file', 'failed_pages')),
    job_id text NOT NULL,
    service text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (doc_id, version, part)
);
COMMENT ON TABLE hosted_jobs IS 'Parsing jobs at an outside service for versions in flight. Not for readers.';
COMMENT ON COLUMN hosted_jobs.doc_id IS 'The document.';
COMMENT ON COLUMN hosted_jobs.version IS 'The version in flight.';
COMMENT ON COLUMN hosted_jobs.part IS 'file for the whole, failed_pages for those that had failed, again.';
COMMENT ON COLUMN hosted_jobs.job_id IS 'The service''s name for the job.';
COMMENT ON COLUMN hosted_jobs.service IS 'Address, tier and version that it was started with; a job of another one is not asked for.';
COMMENT ON COLUMN hosted_jobs.started_at IS 'When its id was stored.';

CREATE FUNCTION drop_hosted_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM hosted_jobs AS h WHERE h.doc_id = NEW.doc_id AND h.version <> NEW.version;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION drop_hosted_jobs IS 'Trigger: the jobs of a version that has been superseded are of no use.';
CREATE TRIGGER drop_hosted_jobs AFTER UPDATE OF version ON file_extractions
    FOR EACH ROW WHEN (NEW.version <> OLD.version) EXECUTE FUNCTION drop_hosted_jobs();

CALL pin_search_path();
