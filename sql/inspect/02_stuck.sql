-- What is stuck, why, since when, and what to do about it? One line a cause; the view stuck_documents has the documents.
SELECT min(s.reason) AS reason, count(*) AS documents, date_trunc('second', min(s.since)) AS since, min(s.doc_id) AS for_example,
    min(s.what_to_do) AS what_to_do
FROM stuck_documents AS s
GROUP BY s.cause, s.queue
ORDER BY count(*) DESC;
