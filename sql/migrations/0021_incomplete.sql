-- Documents of which a part is missing: a limit cut the parsing off, or some pages could not be read. A text that was cut in silence would
-- be worse than none, so there is one place to look at. The index holds those few, so that counting them costs nothing.

CREATE INDEX document_markdown_incomplete ON document_markdown (doc_id)
    WHERE parse_metadata ?| ARRAY['cut_by', 'failed_pages', 'pages_failed'];

CREATE VIEW incomplete_documents WITH (security_invoker = true) AS
SELECT d.doc_id, d.batch_id, d.user_id, d.file_name, d.state, m.version, m.parser,
    coalesce(m.parse_metadata ->> 'cut_by', 'some pages could not be read') AS reason,
    (m.parse_metadata ->> 'pages_kept')::integer AS pages_kept,
    (m.parse_metadata ->> 'pages_of')::integer AS pages_of,
    coalesce(m.parse_metadata -> 'failed_pages', m.parse_metadata -> 'pages_failed') AS failed_pages,
    m.created_at AS parsed_at
FROM document_markdown AS m
JOIN file_extractions AS d ON d.doc_id = m.doc_id AND d.version = m.version
WHERE m.parse_metadata ?| ARRAY['cut_by', 'failed_pages', 'pages_failed'];
COMMENT ON VIEW incomplete_documents IS 'Documents whose text is not whole: a limit cut it off (PARTIAL_PARSE=keep), or pages could not be read.';
COMMENT ON COLUMN incomplete_documents.doc_id IS 'The document.';
COMMENT ON COLUMN incomplete_documents.batch_id IS 'Its batch, if any.';
COMMENT ON COLUMN incomplete_documents.user_id IS 'Whose document it is.';
COMMENT ON COLUMN incomplete_documents.file_name IS 'The submitter''s name for the file.';
COMMENT ON COLUMN incomplete_documents.state IS 'Where it stands.';
COMMENT ON COLUMN incomplete_documents.version IS 'The version that was parsed.';
COMMENT ON COLUMN incomplete_documents.parser IS 'Name and version of the parser.';
COMMENT ON COLUMN incomplete_documents.reason IS 'Which limit cut it, and the setting behind it.';
COMMENT ON COLUMN incomplete_documents.pages_kept IS 'Pages that are there; null where none are missing at the end.';
COMMENT ON COLUMN incomplete_documents.pages_of IS 'Pages that the file has; null where that is not known.';
COMMENT ON COLUMN incomplete_documents.failed_pages IS 'The pages that could not be read, as the parser tells it; null where a limit cut the text.';
COMMENT ON COLUMN incomplete_documents.parsed_at IS 'When it was parsed.';

INSERT INTO relation_rights (relation, rows_of_user, reader, app) VALUES ('incomplete_documents', NULL, 'SELECT', 'SELECT');
