-- Which documents are not whole, why, and how much of them is there?
SELECT i.doc_id, i.file_name, i.version, i.is_served, i.reason, i.pages_kept, i.pages_of, i.failed_pages, i.parsed_at
FROM incomplete_documents AS i
ORDER BY i.parsed_at DESC
LIMIT 50;
