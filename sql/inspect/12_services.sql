-- Are the outside services up, how do they answer, and what to do where they are not?
SELECT p.service, p.health, p.since, p.next_try_at, p.calls_last_hour AS calls, p.failed_last_hour AS failed, p.limited_last_hour AS limited,
    round(p.p95_ms::numeric) AS p95_ms, coalesce(p.reason, p.last_error) AS last_trouble, p.what_to_do
FROM provider_health AS p;
