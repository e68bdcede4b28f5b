-- What `docmill serve` asks, each question within SERVE_QUERY_SECONDS and in a read-only transaction.

-- name: limit_look
SELECT set_config('transaction_read_only', 'on', TRUE), set_config('statement_timeout', %(statement_ms)s, TRUE),
    set_config('idle_in_transaction_session_timeout', '30000', TRUE);

-- name: limit_action
SELECT set_config('statement_timeout', %(statement_ms)s, TRUE), set_config('lock_timeout', '3000', TRUE),
    set_config('idle_in_transaction_session_timeout', '30000', TRUE);
