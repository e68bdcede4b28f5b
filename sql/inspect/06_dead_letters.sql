-- What has failed for good lately, why, and what to do about it?
SELECT l.id, coalesce(l.file_name, l.doc_id) AS file, l.stage, l.error_type, l.error_message, l.age, l.what_to_do
FROM dead_letter_queue AS l
LIMIT 20;
