-- Texts in service, for the copies that people read. See jobs/copies.py.

-- name: count_served_texts
SELECT count(*) AS documents FROM file_extractions AS d WHERE d.served_version IS NOT NULL;

-- name: served_texts_of_folders
-- A folder of copies is named by the first byte of the SHA-256 of a doc_id. The size is known without reading the text.
SELECT m.doc_id, m.markdown_sha256, octet_length(m.markdown) AS size
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.served_version
WHERE get_byte(sha256(convert_to(d.doc_id, 'UTF8')), 0) = ANY(%(folders)s::integer[]) AND m.markdown_sha256 IS NOT NULL;

-- name: served_texts_of_documents
SELECT m.doc_id, m.markdown_sha256, octet_length(m.markdown) AS size
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.served_version
WHERE d.doc_id = ANY(%(doc_ids)s::text[]) AND m.markdown_sha256 IS NOT NULL;

-- name: load_served_text
SELECT m.markdown
FROM file_extractions AS d
JOIN document_markdown AS m ON m.doc_id = d.doc_id AND m.version = d.served_version
WHERE d.doc_id = %(doc_id)s AND m.markdown_sha256 = %(markdown_sha256)s;
