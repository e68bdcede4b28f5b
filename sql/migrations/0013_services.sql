-- What all workers must know together of the outside services that they call: whether a service is up (circuit_breakers), how much of its
-- budget is left (provider_budgets), and what every call was for and cost (provider_usage).
--
-- A service is its kind, its address and a fingerprint of its key, as one text. A call takes two statements: one that looks at the breaker,
-- takes the budget and writes the intent, and one that writes what became of it. When a breaker opens and closes is decided by jobs/breaker.py,
-- which compares and swaps by `revision`; nothing here decides it but reset_breaker. A document that waits for a breaker says so in its row:
-- it keeps its place when it asks again, and is brought forward once the service is up.

CREATE TABLE circuit_breakers (
    service text PRIMARY KEY CHECK (length(service) BETWEEN 1 AND 500 AND service !~ '[[:cntrl:]]'),
    state text NOT NULL DEFAULT 'closed' CHECK (state IN ('closed', 'open', 'half_open')),
    reason text,
    refused boolean NOT NULL DEFAULT FALSE,
    passes_from timestamptz,
    try_at timestamptz,
    open_seconds double precision NOT NULL DEFAULT 0 CHECK (open_seconds >= 0),
    probe_by uuid,
    closed_at timestamptz,
    waiting bigint NOT NULL DEFAULT 0 CHECK (waiting >= 0),
    opened_count bigint NOT NULL DEFAULT 0 CHECK (opened_count >= 0),
    revision bigint NOT NULL DEFAULT 0,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((state = 'closed') = (try_at IS NULL)),
    CHECK ((state = 'half_open') = (probe_by IS NOT NULL)),
    CHECK (state = 'closed' OR (passes_from IS NULL AND reason IS NOT NULL))
);
COMMENT ON TABLE circuit_breakers IS 'Which outside services are up, as all workers see it: one row a service. SELECT reset_breaker(service) closes one by hand.';
COMMENT ON COLUMN circuit_breakers.service IS 'Kind, address and a fingerprint of the key.';
COMMENT ON COLUMN circuit_breakers.state IS 'closed: calls pass. open: none does. half_open: one call probes whether the service is back.';
COMMENT ON COLUMN circuit_breakers.reason IS 'Why it is not closed, or was not the last time, in plain words.';
COMMENT ON COLUMN circuit_breakers.refused IS 'Whether the service refused the key or the quota is used up: somebody must do something.';
COMMENT ON COLUMN circuit_breakers.passes_from IS 'closed: from then on calls pass unasked; until then they ask one by one. Null where there is no such time.';
COMMENT ON COLUMN circuit_breakers.try_at IS 'open: when the next call may probe. half_open: when the probe counts as lost with its worker.';
COMMENT ON COLUMN circuit_breakers.open_seconds IS 'How long it was last opened for; doubles with each probe that fails.';
COMMENT ON COLUMN circuit_breakers.probe_by IS 'The call that probes; null unless half_open.';
COMMENT ON COLUMN circuit_breakers.closed_at IS 'When it was last closed; failures before that do not count.';
COMMENT ON COLUMN circuit_breakers.waiting IS 'Documents that have been told to wait since the state last changed; each is given its place behind the ones before it.';
COMMENT ON COLUMN circuit_breakers.opened_count IS 'Times it went from closed to open.';
COMMENT ON COLUMN circuit_breakers.revision IS 'Goes up with each change of state.';
COMMENT ON COLUMN circuit_breakers.changed_at IS 'When the state last changed.';

ALTER TABLE file_extractions ADD COLUMN waiting_for text, ADD COLUMN waiting_revision bigint, ADD COLUMN waiting_place bigint;
COMMENT ON COLUMN file_extractions.waiting_for IS 'While retrying: the outside service, as circuit_breakers names it, whose breaker or budget it waits for; null where it waits for neither.';
COMMENT ON COLUMN file_extractions.waiting_revision IS 'circuit_breakers.revision at which it was given its place; null where it waits for the budget.';
COMMENT ON COLUMN file_extractions.waiting_place IS 'Its place among those that wait for the breaker. Once the service is up, the document is brought forward; null where it is not to be.';
CREATE INDEX file_extractions_waiting_for ON file_extractions (waiting_for, not_before) WHERE waiting_place IS NOT NULL;
COMMENT ON INDEX file_extractions_waiting_for IS 'Who waits for the breaker of a service.';

CREATE TABLE provider_budgets (
    service text PRIMARY KEY REFERENCES circuit_breakers (service) ON DELETE CASCADE,
    requests_per_minute bigint NOT NULL DEFAULT 0 CHECK (requests_per_minute >= 0),
    tokens_per_minute bigint NOT NULL DEFAULT 0 CHECK (tokens_per_minute >= 0),
    share double precision NOT NULL DEFAULT 1 CHECK (share BETWEEN 0.01 AND 1),
    share_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    limited_count bigint NOT NULL DEFAULT 0 CHECK (limited_count >= 0),
    limited_at timestamptz,
    strikes integer NOT NULL DEFAULT 0 CHECK (strikes >= 0),
    paused_until timestamptz NOT NULL DEFAULT 'epoch',
    slot bigint NOT NULL DEFAULT 0,
    request_slots bigint[] NOT NULL DEFAULT array_fill(0::bigint, ARRAY[66]),
    token_slots bigint[] NOT NULL DEFAULT array_fill(0::bigint, ARRAY[66]),
    last_send_at timestamptz NOT NULL DEFAULT 'epoch',
    next_request_at timestamptz NOT NULL DEFAULT 'epoch',
    next_token_at timestamptz NOT NULL DEFAULT 'epoch',
    overflow_at timestamptz NOT NULL DEFAULT 'epoch',
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 30);
COMMENT ON TABLE provider_budgets IS 'How much of each service''s rate limit is left, shared by all workers: one row a service. View provider_budget_use is for people.';
COMMENT ON COLUMN provider_budgets.service IS 'Kind, address and a fingerprint of the key.';
COMMENT ON COLUMN provider_budgets.requests_per_minute IS 'Most requests in any 60 s, as the worker that called last was told; 0 for no limit.';
COMMENT ON COLUMN provider_budgets.tokens_per_minute IS 'Most tokens in any 60 s; 0 for no limit.';
COMMENT ON COLUMN provider_budgets.share IS 'Part of the limits that was used at share_at: lowered when the service answers 429, and growing back since.';
COMMENT ON COLUMN provider_budgets.share_at IS 'When share was written; budget_share() says what it has become.';
COMMENT ON COLUMN provider_budgets.limited_count IS 'Times that the service answered 429.';
COMMENT ON COLUMN provider_budgets.limited_at IS 'When it last did.';
COMMENT ON COLUMN provider_budgets.strikes IS 'Times in a row that it did without saying how long to wait; each doubles the pause.';
COMMENT ON COLUMN provider_budgets.paused_until IS 'Nothing is sent before: the service said so.';
COMMENT ON COLUMN provider_budgets.slot IS 'The second, since 1970, that the last slot counts; it can lie ahead, where a call has been given a time to come.';
COMMENT ON COLUMN provider_budgets.request_slots IS 'Requests in each of the 66 seconds up to slot.';
COMMENT ON COLUMN provider_budgets.token_slots IS 'Tokens in each of the 66 seconds up to slot.';
COMMENT ON COLUMN provider_budgets.last_send_at IS 'The time given to the last call; none is given an earlier one.';
COMMENT ON COLUMN provider_budgets.next_request_at IS 'Until when the requests so far use up the even rate; a burst of 3 s may run ahead of it.';
COMMENT ON COLUMN provider_budgets.next_token_at IS 'The same for the tokens.';
COMMENT ON COLUMN provider_budgets.overflow_at IS 'The time given to the last call that was sent back to the queue.';
COMMENT ON COLUMN provider_budgets.updated_at IS 'When this row last changed.';

CREATE TABLE provider_usage (
    id uuid PRIMARY KEY,
    service text NOT NULL,
    kind text NOT NULL,
    model text,
    stage text,
    doc_ids text[] NOT NULL DEFAULT '{}',
    batch_ids text[] NOT NULL DEFAULT '{}',
    user_ids text[] NOT NULL DEFAULT '{}',
    shares double precision[] NOT NULL DEFAULT '{}',
    doc_id text GENERATED ALWAYS AS (doc_ids[1]) STORED,
    batch_id text GENERATED ALWAYS AS (batch_ids[1]) STORED,
    user_id text GENERATED ALWAYS AS (user_ids[1]) STORED,
    correlation_id text,
    worker text,
    outcome text NOT NULL DEFAULT 'unknown'
        CHECK (outcome IN ('unknown', 'ok', 'failed', 'timeout', 'bad_answer', 'rate_limited', 'refused', 'rejected', 'not_sent')),
    http_status integer,
    request_id text,
    error_type document_error_type,
    error_message text,
    estimated_tokens bigint NOT NULL DEFAULT 0 CHECK (estimated_tokens >= 0),
    tokens_in bigint CHECK (tokens_in >= 0),
    tokens_out bigint CHECK (tokens_out >= 0),
    pages integer CHECK (pages >= 0),
    estimated_cost numeric(18, 8) NOT NULL DEFAULT 0 CHECK (estimated_cost >= 0),
    cost numeric(18, 8) CHECK (cost >= 0),
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    give_up_at timestamptz NOT NULL,
    finished_at timestamptz,
    latency_ms double precision CHECK (latency_ms >= 0),
    CHECK (cardinality(doc_ids) = cardinality(batch_ids) AND cardinality(doc_ids) = cardinality(user_ids)
        AND cardinality(doc_ids) = cardinality(shares)),
    CHECK ((outcome = 'unknown') = (finished_at IS NULL))
) WITH (fillfactor = 80);
COMMENT ON TABLE provider_usage IS 'The ledger of paid calls: one row a call, written before it is sent. What was sent and never answered stays unknown and counts with its estimate.';
COMMENT ON COLUMN provider_usage.id IS 'The call.';
COMMENT ON COLUMN provider_usage.service IS 'Kind, address and a fingerprint of the key.';
COMMENT ON COLUMN provider_usage.kind IS 'embedding, extraction or parse.';
COMMENT ON COLUMN provider_usage.model IS 'The model or tier that was asked for.';
COMMENT ON COLUMN provider_usage.stage IS 'The stage that called.';
COMMENT ON COLUMN provider_usage.doc_ids IS 'The documents that shared the call.';
COMMENT ON COLUMN provider_usage.batch_ids IS 'The batch of each of them then; null entries for none.';
COMMENT ON COLUMN provider_usage.user_ids IS 'Whose each of them is.';
COMMENT ON COLUMN provider_usage.shares IS 'What part of the call each of them was; together 1.';
COMMENT ON COLUMN provider_usage.doc_id IS 'The first, usually the only, document.';
COMMENT ON COLUMN provider_usage.batch_id IS 'The batch of the first document.';
COMMENT ON COLUMN provider_usage.user_id IS 'Whose the first document is.';
COMMENT ON COLUMN provider_usage.correlation_id IS 'Follows the first document through logs and events.';
COMMENT ON COLUMN provider_usage.worker IS 'host:pid of the worker that called.';
COMMENT ON COLUMN provider_usage.outcome IS 'unknown: on its way until give_up_at, after that nobody knows whether it was paid for. ok; failed (5xx, connection), timeout, bad_answer: the service''s fault; rate_limited; refused: key or quota; rejected: the request''s own fault; not_sent.';
COMMENT ON COLUMN provider_usage.http_status IS 'Status of the answer; null when there was none.';
COMMENT ON COLUMN provider_usage.request_id IS 'The service''s own name for the call, for its support.';
COMMENT ON COLUMN provider_usage.error_type IS 'What kind of failure it was.';
COMMENT ON COLUMN provider_usage.error_message IS 'The failure in plain words.';
COMMENT ON COLUMN provider_usage.estimated_tokens IS 'Tokens that the budget was asked for.';
COMMENT ON COLUMN provider_usage.tokens_in IS 'Tokens sent, as the service counted them.';
COMMENT ON COLUMN provider_usage.tokens_out IS 'Tokens received, as the service counted them.';
COMMENT ON COLUMN provider_usage.pages IS 'Pages that were paid for.';
COMMENT ON COLUMN provider_usage.estimated_cost IS 'Price of the estimate.';
COMMENT ON COLUMN provider_usage.cost IS 'Price by the settings of that day; null until the call has ended.';
COMMENT ON COLUMN provider_usage.started_at IS 'When it was to be sent.';
COMMENT ON COLUMN provider_usage.give_up_at IS 'When its worker, if it lives, has stopped waiting for an answer.';
COMMENT ON COLUMN provider_usage.finished_at IS 'When its outcome was known.';
COMMENT ON COLUMN provider_usage.latency_ms IS 'From sending to the whole answer.';
CREATE INDEX provider_usage_recent ON provider_usage (service, started_at);
CREATE INDEX provider_usage_documents ON provider_usage USING gin (doc_ids);
CREATE INDEX provider_usage_batches ON provider_usage USING gin (batch_ids);

CREATE FUNCTION shift_slots(slots bigint[], by bigint) RETURNS bigint[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN by <= 0 THEN slots
    WHEN by >= 66 THEN array_fill(0::bigint, ARRAY[66])
    ELSE slots[by + 1:66] || array_fill(0::bigint, ARRAY[by::integer])
END;
COMMENT ON FUNCTION shift_slots IS 'The 66 slots as they are so many seconds later.';

CREATE FUNCTION seconds_until_room(slots bigint[], cost bigint, most bigint) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE WHEN most = 0 OR (SELECT sum(s) FROM unnest(slots) AS s) + cost <= most THEN 0 ELSE (
    SELECT coalesce(min(w.second) FILTER (WHERE w.total - w.gone + cost <= most), 66)
    FROM (
        SELECT s.second::integer, sum(s.used) OVER (ORDER BY s.second) AS gone, sum(s.used) OVER () AS total
        FROM unnest(slots) WITH ORDINALITY AS s (used, second)
    ) AS w
) END;
COMMENT ON FUNCTION seconds_until_room IS 'Seconds until enough of the slots have passed for a cost to fit under the limit (0 for none); 66 is when all have.';

CREATE FUNCTION budget_share(share double precision, share_at timestamptz, at timestamptz) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN least(1, share + 0.05 / 60 * greatest(0, extract(epoch FROM at - share_at))::float8);
COMMENT ON FUNCTION budget_share IS 'What part of its limits a service''s budget uses at a time: it grows by a twentieth a minute.';

CREATE FUNCTION lock_budget(service text) RETURNS provider_budgets LANGUAGE plpgsql AS $$
DECLARE
    b provider_budgets;
BEGIN
    SELECT p.* INTO b FROM provider_budgets AS p WHERE p.service = lock_budget.service FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        INSERT INTO circuit_breakers (service) VALUES (lock_budget.service) ON CONFLICT DO NOTHING;
        INSERT INTO provider_budgets (service) VALUES (lock_budget.service) ON CONFLICT DO NOTHING;
        SELECT p.* INTO b FROM provider_budgets AS p WHERE p.service = lock_budget.service FOR NO KEY UPDATE;
    END IF;
    RETURN b;
END;
$$;
COMMENT ON FUNCTION lock_budget IS 'Locks a service''s budget and returns it; a service that is new begins unused, with a closed breaker.';

CREATE FUNCTION take_budget(
    service text, requests_per_minute bigint, tokens_per_minute bigint, tokens bigint, patience double precision,
    at timestamptz DEFAULT NULL, OUT granted boolean, OUT wait_seconds double precision
) LANGUAGE plpgsql AS $$
-- Gives the call a time to be sent at: now, or so soon that the caller can wait for it with the document in hand (`patience`; longer for a
-- call that needs much of a minute's tokens, which would otherwise never find room). Times are given in order, so nobody is overtaken and
-- everybody asks once. No 60 s window holds more than the limit: the slots count at least the 61 s before each time that is given, and what
-- has been given later lies ahead of it. The even rate (a minute's limit in 66 s, with 3 s of burst) keeps the minute from being used up at once.
-- Who cannot wait that long is told when to come back, behind all who were told so before.
DECLARE
    b provider_budgets := lock_budget(take_budget.service);
    moment timestamptz := coalesce(take_budget.at, clock_timestamp());  -- after the lock has been had
    burst CONSTANT interval := interval '3 seconds';
    crowd CONSTANT interval := interval '50 milliseconds';  -- between two calls after a pause, where there is no limit to pace them
    part float8 := budget_share(b.share, b.share_at, moment);
    requests_limit bigint := CASE WHEN requests_per_minute > 0 THEN greatest(1, floor(requests_per_minute * part))::bigint ELSE 0 END;
    tokens_limit bigint := CASE WHEN tokens_per_minute > 0 THEN greatest(1, floor(tokens_per_minute * part))::bigint ELSE 0 END;
    request_pace interval := make_interval(secs => 66.0 / nullif(requests_limit, 0));
    token_pace interval := make_interval(secs => 66.0 * tokens / nullif(tokens_limit, 0));
    send_at timestamptz := greatest(
        moment, b.last_send_at, b.paused_until, b.next_request_at - burst, b.next_token_at - burst,
        CASE WHEN b.paused_until > moment AND requests_limit = 0 THEN b.last_send_at + crowd END
    );
    send_slot bigint := greatest(b.slot, floor(extract(epoch FROM send_at))::bigint);
    used_requests bigint[] := shift_slots(b.request_slots, send_slot - b.slot);
    used_tokens bigint[] := shift_slots(b.token_slots, send_slot - b.slot);
    later integer := greatest(
        seconds_until_room(used_requests, 1, requests_limit), seconds_until_room(used_tokens, tokens, tokens_limit)
    );
BEGIN
    IF later > 0 THEN
        send_slot := send_slot + later;
        send_at := to_timestamp(send_slot);
        used_requests := shift_slots(used_requests, later);
        used_tokens := shift_slots(used_tokens, later);
    END IF;
    wait_seconds := extract(epoch FROM send_at - moment);
    granted := wait_seconds <= patience + CASE WHEN tokens_limit > 0 THEN 66 * least(1, 2.0 * tokens / tokens_limit) ELSE 0 END;
    IF NOT granted THEN
        send_at := greatest(send_at, b.overflow_at);
        wait_seconds := extract(epoch FROM send_at - moment);
        UPDATE provider_budgets AS p
        SET overflow_at = send_at + greatest(request_pace, token_pace, crowd), updated_at = moment
        WHERE p.service = take_budget.service;
        RETURN;
    END IF;
    used_requests[66] := used_requests[66] + 1;
    used_tokens[66] := used_tokens[66] + tokens;
    UPDATE provider_budgets AS p
    SET requests_per_minute = take_budget.requests_per_minute, tokens_per_minute = take_budget.tokens_per_minute, slot = send_slot,
        request_slots = used_requests, token_slots = used_tokens, last_send_at = send_at,
        next_request_at = coalesce(greatest(b.next_request_at, send_at) + request_pace, 'epoch'),
        next_token_at = coalesce(greatest(b.next_token_at, send_at) + token_pace, 'epoch'), updated_at = moment
    WHERE p.service = take_budget.service;
END;
$$;
COMMENT ON FUNCTION take_budget IS
    'Takes one request and so many tokens out of a service''s budget. granted: send it in wait_seconds; otherwise nothing was taken: ask again in wait_seconds. `at` is for tests; null is now.';

CREATE FUNCTION breaker_passes(service text, admitted bigint) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT NOT EXISTS (
        SELECT FROM circuit_breakers AS c
        WHERE c.service = breaker_passes.service AND c.revision IS DISTINCT FROM admitted
            AND (c.state <> 'closed' OR c.passes_from > clock_timestamp())
    );
$$;
COMMENT ON FUNCTION breaker_passes IS
    'Whether a call to a service passes: its breaker is closed and its ramp over, or `admitted` is the revision at which this call was let through.';

CREATE FUNCTION ask_to_call(
    service text, admitted bigint, requests_per_minute bigint, tokens_per_minute bigint, tokens bigint, patience double precision,
    OUT granted boolean, OUT wait_seconds double precision, OUT hindrance text
) LANGUAGE plpgsql AS $$
BEGIN
    IF NOT breaker_passes(ask_to_call.service, admitted) THEN
        granted := FALSE;
        hindrance := 'breaker';
        RETURN;
    END IF;
    -- Where there is no limit and no pause, calls do not queue for the row.
    IF ask_to_call.requests_per_minute = 0 AND ask_to_call.tokens_per_minute = 0 AND EXISTS (
        SELECT FROM provider_budgets AS p
        WHERE p.service = ask_to_call.service AND p.paused_until <= clock_timestamp()
            AND p.requests_per_minute = 0 AND p.tokens_per_minute = 0
    ) THEN
        granted := TRUE;
        wait_seconds := 0;
        RETURN;
    END IF;
    SELECT t.granted, t.wait_seconds INTO granted, wait_seconds
    FROM take_budget(ask_to_call.service, ask_to_call.requests_per_minute, ask_to_call.tokens_per_minute, tokens, patience) AS t;
    hindrance := CASE WHEN NOT granted THEN 'budget' END;
END;
$$;
COMMENT ON FUNCTION ask_to_call IS
    'Looks at the breaker and takes the budget for a call. hindrance: breaker or budget. `admitted` is the revision of the breaker at which this call has been let through.';

CREATE FUNCTION settle_tokens(service text, sent_at timestamptz, difference bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    b provider_budgets := lock_budget(settle_tokens.service);
    place bigint := 66 - (b.slot - floor(extract(epoch FROM sent_at))::bigint);
BEGIN
    IF place NOT BETWEEN 1 AND 66 OR b.tokens_per_minute = 0 THEN
        RETURN;
    END IF;
    b.token_slots[place] := greatest(0, b.token_slots[place] + difference);
    UPDATE provider_budgets AS p
    SET token_slots = b.token_slots,
        next_token_at = b.next_token_at + make_interval(secs => 66.0 * difference / (
            p.tokens_per_minute * budget_share(p.share, p.share_at, clock_timestamp())
        )),
        updated_at = clock_timestamp()
    WHERE p.service = settle_tokens.service;
END;
$$;
COMMENT ON FUNCTION settle_tokens IS 'Puts the tokens that a call has really used in the place of its estimate.';

CREATE FUNCTION pause_budget(service text, seconds double precision) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lock_budget(pause_budget.service);
    UPDATE provider_budgets AS p
    SET paused_until = greatest(p.paused_until, clock_timestamp() + make_interval(secs => seconds)), updated_at = clock_timestamp()
    WHERE p.service = pause_budget.service;
END;
$$;
COMMENT ON FUNCTION pause_budget IS 'Has nothing sent to a service for so many seconds.';

CREATE FUNCTION limit_budget(service text, told_seconds double precision) RETURNS double precision LANGUAGE plpgsql AS $$
-- Several answers of 429 to one overrun lower the share once: those within 5 s count as one.
DECLARE
    b provider_budgets := lock_budget(limit_budget.service);
    moment timestamptz := clock_timestamp();
    fresh boolean := coalesce(b.limited_at < moment - interval '5 seconds', TRUE);
    again boolean := coalesce(b.limited_at > moment - interval '2 minutes', FALSE);
    strike integer := CASE WHEN told_seconds IS NOT NULL THEN 0 WHEN NOT again THEN 1 WHEN fresh THEN b.strikes + 1 ELSE greatest(1, b.strikes) END;
    pause float8 := coalesce(told_seconds, least(60, 2.0 ^ (least(strike, 7) - 1)));
BEGIN
    UPDATE provider_budgets AS p
    SET limited_count = p.limited_count + 1,
        limited_at = CASE WHEN fresh THEN moment ELSE p.limited_at END,
        strikes = strike,
        share = greatest(0.1, budget_share(p.share, p.share_at, moment) * CASE WHEN fresh THEN 0.7 ELSE 1 END),
        share_at = moment,
        paused_until = greatest(p.paused_until, moment + make_interval(secs => pause)),
        updated_at = moment
    WHERE p.service = limit_budget.service;
    RETURN pause;
END;
$$;
COMMENT ON FUNCTION limit_budget IS
    'A service answered 429: has nothing sent for as long as it told (null: 1 s, doubling each time, at most 60), uses 0.7 of what was used of its limits, and returns the pause in seconds.';

CREATE FUNCTION bring_forward(service text, at_most integer, seconds double precision) RETURNS integer LANGUAGE sql AS $$
    WITH chosen AS MATERIALIZED (
        SELECT d.id
        FROM file_extractions AS d
        WHERE d.waiting_for = bring_forward.service AND d.waiting_place IS NOT NULL AND d.state = 'retrying'
            AND d.not_before > now() + make_interval(secs => seconds)
        ORDER BY d.not_before
        LIMIT at_most
    ), free AS MATERIALIZED (
        SELECT d.id, d.doc_id, d.milestone, d.not_before
        FROM file_extractions AS d
        WHERE d.id IN (SELECT c.id FROM chosen AS c) AND d.waiting_for = bring_forward.service AND d.state = 'retrying'
            AND d.not_before > now() + make_interval(secs => seconds)
        ORDER BY d.id
        FOR NO KEY UPDATE SKIP LOCKED
    ), spread AS MATERIALIZED (
        SELECT f.id, due_stage(f.milestone) || ':' || f.doc_id AS queueing_lock,
            now() + make_interval(secs => seconds * (row_number() OVER (ORDER BY f.not_before, f.id) - 1) / at_most) AS at
        FROM free AS f
    ), jobs AS (
        UPDATE procrastinate_jobs AS j SET scheduled_at = s.at
        FROM spread AS s
        WHERE j.status = 'todo' AND j.queueing_lock = s.queueing_lock AND j.scheduled_at > s.at
    ), brought AS (
        UPDATE file_extractions AS d SET not_before = s.at
        FROM spread AS s
        WHERE d.id = s.id
        RETURNING d.id
    )
    SELECT count(*)::integer FROM brought AS b;
$$;
COMMENT ON FUNCTION bring_forward IS
    'Has at most so many documents that wait for a service''s breaker for longer than `seconds` start within them, evenly spread, and returns how many. Every worker does so every few seconds while the service is up.';

CREATE FUNCTION reset_breaker(service text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    known boolean;
BEGIN
    -- Those that wait for the budget are brought forward like those that wait for the breaker.
    UPDATE file_extractions AS d SET waiting_place = 0
    FROM (
        SELECT f.id FROM file_extractions AS f
        WHERE f.waiting_for = reset_breaker.service AND f.waiting_place IS NULL AND f.state = 'retrying'
        ORDER BY f.id
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS free
    WHERE d.id = free.id;
    UPDATE circuit_breakers AS c
    SET state = 'closed', refused = FALSE, passes_from = NULL, try_at = NULL, open_seconds = 0, probe_by = NULL,
        closed_at = clock_timestamp(), waiting = 0, revision = c.revision + 1, changed_at = clock_timestamp()
    WHERE c.service = reset_breaker.service;
    known := FOUND;
    UPDATE provider_budgets AS p
    SET share = 1, share_at = clock_timestamp(), strikes = 0, paused_until = 'epoch', overflow_at = 'epoch',
        updated_at = clock_timestamp()
    WHERE p.service = reset_breaker.service;
    -- Times that lie so far ahead were given before the server's clock was put back.
    UPDATE provider_budgets AS p
    SET slot = 0, last_send_at = 'epoch', next_request_at = 'epoch', next_token_at = 'epoch'
    WHERE p.service = reset_breaker.service AND p.last_send_at > clock_timestamp() + interval '10 minutes';
    RETURN known;
END;
$$;
COMMENT ON FUNCTION reset_breaker IS
    'Closes a service''s breaker at once and forgets what slowed its budget down; false if there is no such service. Documents that wait for it are brought forward by the workers within seconds, 20 a second for each worker.';

CREATE FUNCTION cost_of_document(doc_id text) RETURNS numeric LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric), 0)
    FROM provider_usage AS u, unnest(u.doc_ids, u.shares) AS s (doc_id, share)
    WHERE u.doc_ids @> ARRAY[cost_of_document.doc_id] AND s.doc_id = cost_of_document.doc_id;
$$;
COMMENT ON FUNCTION cost_of_document IS 'What a document''s calls have cost, all versions together; calls without a known outcome count with their estimate.';

CREATE FUNCTION cost_of_batch(batch_id text) RETURNS numeric LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric), 0)
    FROM provider_usage AS u, unnest(u.batch_ids, u.shares) AS s (batch_id, share)
    WHERE u.batch_ids @> ARRAY[cost_of_batch.batch_id] AND s.batch_id = cost_of_batch.batch_id;
$$;
COMMENT ON FUNCTION cost_of_batch IS 'What the calls for a batch''s documents have cost, all runs together; calls without a known outcome count with their estimate.';

CREATE VIEW cost_by_document WITH (security_invoker = true) AS
SELECT
    s.doc_id, s.batch_id, s.user_id, u.kind,
    count(*) AS calls,
    count(*) FILTER (WHERE u.outcome = 'ok') AS calls_ok,
    count(*) FILTER (WHERE u.outcome = 'unknown' AND u.give_up_at < now()) AS calls_unknown,
    round(sum(u.tokens_in * s.share)) AS tokens_in,
    round(sum(u.tokens_out * s.share)) AS tokens_out,
    sum(u.pages * s.share) AS pages,
    sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric) AS cost,
    min(u.started_at) AS first_call_at,
    max(u.started_at) AS last_call_at
FROM provider_usage AS u, unnest(u.doc_ids, u.batch_ids, u.user_ids, u.shares) AS s (doc_id, batch_id, user_id, share)
GROUP BY s.doc_id, s.batch_id, s.user_id, u.kind;
COMMENT ON VIEW cost_by_document IS 'What each document''s calls to outside services have cost, by kind of service. Of a shared call each document has its share.';
COMMENT ON COLUMN cost_by_document.doc_id IS 'The document, also where it has been deleted since.';
COMMENT ON COLUMN cost_by_document.batch_id IS 'The batch that it belonged to then.';
COMMENT ON COLUMN cost_by_document.user_id IS 'Whose it is.';
COMMENT ON COLUMN cost_by_document.kind IS 'embedding, extraction or parse.';
COMMENT ON COLUMN cost_by_document.calls IS 'Calls, failed ones too.';
COMMENT ON COLUMN cost_by_document.calls_ok IS 'Calls that were answered well.';
COMMENT ON COLUMN cost_by_document.calls_unknown IS 'Calls that were sent and whose answer never came.';
COMMENT ON COLUMN cost_by_document.tokens_in IS 'Tokens sent.';
COMMENT ON COLUMN cost_by_document.tokens_out IS 'Tokens received.';
COMMENT ON COLUMN cost_by_document.pages IS 'Pages that were paid for.';
COMMENT ON COLUMN cost_by_document.cost IS 'Price; calls without a known outcome count with their estimate.';
COMMENT ON COLUMN cost_by_document.first_call_at IS 'When the first was sent.';
COMMENT ON COLUMN cost_by_document.last_call_at IS 'When the last was sent.';

CREATE VIEW provider_budget_use WITH (security_invoker = true) AS
SELECT
    b.service, b.requests_per_minute, b.tokens_per_minute,
    budget_share(b.share, b.share_at, now()) AS share,
    (SELECT sum(s) FROM unnest(shift_slots(b.request_slots, floor(extract(epoch FROM now()))::bigint - b.slot)) AS s) AS requests_last_minute,
    (SELECT sum(s) FROM unnest(shift_slots(b.token_slots, floor(extract(epoch FROM now()))::bigint - b.slot)) AS s) AS tokens_last_minute,
    CASE WHEN b.paused_until > now() THEN b.paused_until END AS paused_until,
    b.limited_count, b.limited_at
FROM provider_budgets AS b;
COMMENT ON VIEW provider_budget_use IS 'How much of each service''s rate limit is used now. Calls to a service without limits are not counted here.';
COMMENT ON COLUMN provider_budget_use.service IS 'Kind, address and a fingerprint of the key.';
COMMENT ON COLUMN provider_budget_use.requests_per_minute IS 'Most requests in any 60 s; 0 for no limit.';
COMMENT ON COLUMN provider_budget_use.tokens_per_minute IS 'Most tokens in any 60 s; 0 for no limit.';
COMMENT ON COLUMN provider_budget_use.share IS 'Part of the limits that is used now: below 1 after the service has answered 429.';
COMMENT ON COLUMN provider_budget_use.requests_last_minute IS 'Requests of the last 65 to 66 s, and those that have been given a time to come.';
COMMENT ON COLUMN provider_budget_use.tokens_last_minute IS 'Tokens of the same.';
COMMENT ON COLUMN provider_budget_use.paused_until IS 'Nothing is sent before, because the service said so; null when it is not paused.';
COMMENT ON COLUMN provider_budget_use.limited_count IS 'Times that the service answered 429.';
COMMENT ON COLUMN provider_budget_use.limited_at IS 'When it last did.';

CALL pin_search_path();
