-- What waits in which queue, for how long, and does anybody listen?
SELECT q.queue, q.stage, q.waiting, q.scheduled, q.running, q.oldest_age, q.listeners
FROM queue_depth AS q
WHERE q.waiting + q.scheduled + q.running > 0;
