-- A service that asked for a pause (429) and is called without a limit of its own met a crowd when the pause was over: those who had waited
-- came 50 ms apart, but whoever had not asked before, and each next call of those who got through, went at once. Now all calls keep that
-- distance for the first seconds after a pause.

CREATE FUNCTION ramp_after_pause() RETURNS interval LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN interval '5 seconds';
COMMENT ON FUNCTION ramp_after_pause IS 'For how long after a pause calls to a service without a limit keep a distance from each other.';

CREATE OR REPLACE FUNCTION take_budget(
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
    ramp CONSTANT interval := ramp_after_pause();
    part float8 := budget_share(b.share, b.share_at, moment);
    requests_limit bigint := CASE WHEN requests_per_minute > 0 THEN greatest(1, floor(requests_per_minute * part))::bigint ELSE 0 END;
    tokens_limit bigint := CASE WHEN tokens_per_minute > 0 THEN greatest(1, floor(tokens_per_minute * part))::bigint ELSE 0 END;
    request_pace interval := make_interval(secs => 66.0 / nullif(requests_limit, 0));
    token_pace interval := make_interval(secs => 66.0 * tokens / nullif(tokens_limit, 0));
    send_at timestamptz := greatest(
        moment, b.last_send_at, b.paused_until, b.next_request_at - burst, b.next_token_at - burst,
        CASE WHEN b.paused_until + ramp > moment AND requests_limit = 0 THEN b.last_send_at + crowd END
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

CREATE OR REPLACE FUNCTION ask_to_call(
    service text, admitted bigint, requests_per_minute bigint, tokens_per_minute bigint, tokens bigint, patience double precision,
    OUT granted boolean, OUT wait_seconds double precision, OUT hindrance text
) LANGUAGE plpgsql AS $$
BEGIN
    IF NOT breaker_passes(ask_to_call.service, admitted) THEN
        granted := FALSE;
        hindrance := 'breaker';
        RETURN;
    END IF;
    -- Where there is no limit and no pause or its end is past, calls do not queue for the row.
    IF ask_to_call.requests_per_minute = 0 AND ask_to_call.tokens_per_minute = 0 AND EXISTS (
        SELECT FROM provider_budgets AS p
        WHERE p.service = ask_to_call.service AND p.paused_until + ramp_after_pause() <= clock_timestamp()
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

CALL pin_search_path();
