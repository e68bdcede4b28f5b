-- What the column that 0049_borders.sql has added is to hold for documents of before, and how often: without statistics the planner takes
-- nearly all documents for such whose served version is of another type. Apart from 0049, which locks everybody out for as long as it takes.

UPDATE file_extractions AS d
SET served_file_type = s.file_type
FROM (
    SELECT f.id, f.served_version, (
        SELECT e.detail ->> 'file_type'
        FROM document_events AS e
        WHERE e.doc_id = f.doc_id AND e.version = f.served_version AND e.stage = 'validate' AND e.event = 'stage_completed'
        ORDER BY e.id DESC
        LIMIT 1
    ) AS file_type
    FROM file_extractions AS f
    WHERE f.served_version < f.version
) AS s
WHERE d.id = s.id AND d.served_version = s.served_version AND d.served_file_type IS NULL AND d.file_type <> s.file_type;

DO $$
BEGIN
    -- Of an empty table the planner would learn that it is empty, and go on reading it from end to end while it fills.
    IF EXISTS (SELECT FROM file_extractions) THEN
        ANALYZE file_extractions (served_file_type);
    END IF;
END;
$$;
