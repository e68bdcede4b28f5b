-- Who removes a worker's row, be it the worker that signs off or another one for which it is dead, has the foreign key look for the jobs that
-- name it. Procrastinate indexes those in work alone, so that was a scan of all jobs, and a rewrite of each that the worker had ever finished.
-- Docmill's own statements have a finished job name nobody.

CREATE INDEX procrastinate_jobs_docmill_worker ON procrastinate_jobs (worker_id) WHERE worker_id IS NOT NULL;
COMMENT ON INDEX procrastinate_jobs_docmill_worker IS 'The jobs that name a worker, for the foreign key when its row is removed.';
