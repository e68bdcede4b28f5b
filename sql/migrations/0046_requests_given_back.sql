-- A call that was let through and is not sent after all, because the service asked for a pause meanwhile or nobody waits for it any more,
-- gave its tokens back but not its request: where services pause often, most of a minute's requests were taken by calls that nobody made. And
-- both are given back for the second that they were counted in: the call's own clock could be in the next one.

CREATE FUNCTION give_back_request(service text, sent_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    b provider_budgets := lock_budget(give_back_request.service);
    place bigint := 66 - (b.slot - floor(extract(epoch FROM sent_at))::bigint);
BEGIN
    IF place NOT BETWEEN 1 AND 66 OR b.requests_per_minute = 0 THEN
        RETURN;
    END IF;
    b.request_slots[place] := greatest(0, b.request_slots[place] - 1);
    UPDATE provider_budgets AS p
    SET request_slots = b.request_slots,
        -- At least as much the call had moved it on: the share of then is not known, and it is at most all.
        next_request_at = b.next_request_at - make_interval(secs => 66.0 / p.requests_per_minute),
        updated_at = clock_timestamp()
    WHERE p.service = give_back_request.service;
END;
$$;
COMMENT ON FUNCTION give_back_request IS 'Gives the request back that a call took out of a service''s budget for a time at which it was not sent.';

CREATE FUNCTION last_send_at_of(service text) RETURNS timestamptz LANGUAGE plpgsql AS $$
-- Sees what the statement that asks has done before, as a look at the table in that statement does not.
BEGIN
    RETURN (SELECT p.last_send_at FROM provider_budgets AS p WHERE p.service = last_send_at_of.service);
END;
$$;
COMMENT ON FUNCTION last_send_at_of IS 'The time that the budget of a service gave to the last call, as of this transaction.';

CALL pin_search_path();
