-- What submitters say about a document or batch can be read by every program that asks for it.
--
-- jsonb holds numbers of a hundred thousand digits and thousands of levels, at which readers of JSON give up: a worker could not read the
-- document that it had claimed. Rows that are there keep what they have until they are submitted again.

CREATE FUNCTION refuse_unreadable_metadata() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF jsonb_path_exists(NEW.metadata, 'strict $.**{101 to last}') THEN
        RAISE EXCEPTION 'metadata must not be nested more than 100 levels deep' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF jsonb_path_exists(NEW.metadata, 'strict $.** ? (@ > 1e308 || @ < -1e308)') THEN
        RAISE EXCEPTION 'metadata must not hold numbers beyond 1e308' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION refuse_unreadable_metadata IS 'Trigger: keeps metadata of more than 100 levels or with numbers beyond 1e308 out.';

CREATE TRIGGER file_extractions_metadata BEFORE INSERT OR UPDATE OF metadata ON file_extractions
    FOR EACH ROW WHEN (NEW.metadata <> '{}') EXECUTE FUNCTION refuse_unreadable_metadata();
CREATE TRIGGER processing_jobs_metadata BEFORE INSERT OR UPDATE OF metadata ON processing_jobs
    FOR EACH ROW WHEN (NEW.metadata <> '{}') EXECUTE FUNCTION refuse_unreadable_metadata();

CALL pin_search_path();
