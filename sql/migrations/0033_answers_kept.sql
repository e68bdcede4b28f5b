-- A document that a language model reads in several requests keeps each answer until all are there: a limit, an outage or a crash at a later
-- part does not have the earlier ones paid for again.

CREATE TABLE extraction_answers (
    doc_id text NOT NULL REFERENCES file_extractions (doc_id) ON DELETE CASCADE,
    version integer NOT NULL,
    part integer NOT NULL,
    asked_sha256 text NOT NULL,
    data jsonb NOT NULL,
    model text NOT NULL,
    repairs integer NOT NULL,
    tokens_in bigint NOT NULL,
    tokens_out bigint NOT NULL,
    PRIMARY KEY (doc_id, version, part)
);
COMMENT ON TABLE extraction_answers IS 'A language model''s answers for the parts of versions in flight, until extract has them all. Not for readers.';
COMMENT ON COLUMN extraction_answers.doc_id IS 'The document.';
COMMENT ON COLUMN extraction_answers.version IS 'The version in flight.';
COMMENT ON COLUMN extraction_answers.part IS 'Which part of the document was asked about, from 1.';
COMMENT ON COLUMN extraction_answers.asked_sha256 IS 'SHA-256 of what was asked: service, model, wording, schema, number of parts and text. Another question is asked anew.';
COMMENT ON COLUMN extraction_answers.data IS 'The answer, which fits the schema.';
COMMENT ON COLUMN extraction_answers.model IS 'The model that answered, as the service names it.';
COMMENT ON COLUMN extraction_answers.repairs IS 'How many answers did not fit before this one.';
COMMENT ON COLUMN extraction_answers.tokens_in IS 'Tokens sent, repairs included.';
COMMENT ON COLUMN extraction_answers.tokens_out IS 'Tokens answered, repairs included.';

INSERT INTO relation_rights (relation, rows_of_user, reader, app) VALUES
    ('extraction_answers', 'EXISTS (SELECT FROM file_extractions AS d WHERE d.doc_id = extraction_answers.doc_id AND d.user_id = (SELECT acting_user()))', '', 'SELECT, DELETE');

ALTER FUNCTION drop_hosted_jobs() RENAME TO drop_superseded_work;
ALTER TRIGGER drop_hosted_jobs ON file_extractions RENAME TO drop_superseded_work;
CREATE OR REPLACE FUNCTION drop_superseded_work() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM hosted_jobs AS h WHERE h.doc_id = NEW.doc_id AND h.version <> NEW.version;
    DELETE FROM extraction_answers AS a WHERE a.doc_id = NEW.doc_id AND a.version <> NEW.version;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION drop_superseded_work IS 'Trigger: jobs and answers of a version that has been superseded are of no use.';

CALL pin_search_path();
