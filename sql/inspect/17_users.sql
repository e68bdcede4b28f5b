-- Whose documents wait, and who is being served?
SELECT j.docmill_user AS user_id, count(*) FILTER (WHERE j.status = 'todo') AS waiting, count(*) FILTER (WHERE j.status = 'doing') AS in_work
FROM procrastinate_jobs AS j
WHERE j.status IN ('todo', 'doing') AND j.docmill_user <> ''
GROUP BY j.docmill_user
ORDER BY count(*) DESC
LIMIT 50;
