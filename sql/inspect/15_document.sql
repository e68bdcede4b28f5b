-- What happened to one document, where does it stand, and what comes next? Name it first: SET docmill.doc_id = 'invoice-7';
-- without a name it is the document that was submitted last.
SELECT e.tense, date_trunc('second', e.at) AS at, e.what, round(e.took_ms) AS ms, e.worker
FROM (
    SELECT coalesce(nullif(current_setting('docmill.doc_id', TRUE), ''), (SELECT d.doc_id FROM file_extractions AS d ORDER BY d.id DESC LIMIT 1)) AS doc_id
) AS c
CROSS JOIN LATERAL explain_document(c.doc_id) AS e
WHERE c.doc_id IS NOT NULL;
