-- Does it go as quickly as it did? Each hour of the last day.
SELECT t.hour, t.submitted, t.complete, t.failed, t.retries, t.rescues, round(t.per_second::numeric, 2) AS per_second
FROM throughput AS t
ORDER BY t.hour DESC;
