-- Where does everything stand? Documents by state, and how long ago one of them last changed.
SELECT d.state, count(*) AS documents, date_trunc('second', now() - max(d.updated_at)) AS last_change
FROM file_extractions AS d
GROUP BY d.state
ORDER BY d.state;
