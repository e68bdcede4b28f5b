-- Which workers are there, are they well, and what do they use?
SELECT w.worker, w.health, w.silent_for, w.jobs || ' of ' || w.concurrency AS jobs, coalesce(array_to_string(w.queues, ','), 'all') AS queues,
    round(w.memory_mb::numeric) AS memory_mb, round(w.cpu_share::numeric, 2) AS cores, w.connections, w.version
FROM worker_health AS w
ORDER BY w.health = 'alive', w.worker;
