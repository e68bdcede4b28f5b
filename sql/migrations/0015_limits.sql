-- What may be spent on outside services, and how long a document may wait for them.
--
-- What a document and a batch have cost stands in running totals, so that a call can be refused before it is made without adding up the
-- ledger: as many as a hundred thousand calls may be one batch's. A trigger carries every change of the ledger over at the commit, whoever
-- makes it. Lock order of a call: the advisory locks of what is limited, the budget, the ledger, the totals. Nothing else takes the totals.
--
-- How long a document has waited stands beside it: when the first of its waits that count as no attempt began, at the stage that is due.

CREATE TABLE cost_totals (
    scope text NOT NULL CHECK (scope IN ('document', 'batch')),
    name text NOT NULL,
    stripe smallint NOT NULL,
    spent numeric NOT NULL,
    PRIMARY KEY (scope, name, stripe)
) WITH (fillfactor = 50);
COMMENT ON TABLE cost_totals IS 'What documents and batches have cost: the ledger (provider_usage) added up. Functions cost_of_document and cost_of_batch read it.';
COMMENT ON COLUMN cost_totals.scope IS 'document or batch.';
COMMENT ON COLUMN cost_totals.name IS 'doc_id or batch_id.';
COMMENT ON COLUMN cost_totals.stripe IS 'A batch has several rows, so that workers that pay for it at once do not wait for each other.';
COMMENT ON COLUMN cost_totals.spent IS 'Part of the sum, in the currency of the prices in the settings; one row alone can be negative.';

CREATE FUNCTION add_to_cost_totals() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    amount numeric := coalesce(NEW.cost, NEW.estimated_cost);
BEGIN
    IF TG_OP = 'UPDATE' THEN
        amount := amount - coalesce(OLD.cost, OLD.estimated_cost);
    END IF;
    -- In one order everywhere: calls that share documents end at the same time.
    INSERT INTO cost_totals AS t (scope, name, stripe, spent)
    SELECT c.scope, c.name, c.stripe, sum(amount * c.share)
    FROM (
        SELECT 'document' AS scope, d.doc_id AS name, 0 AS stripe, d.share::numeric AS share
        FROM unnest(NEW.doc_ids, NEW.shares) AS d (doc_id, share)
        UNION ALL
        SELECT 'batch', b.batch_id, pg_backend_pid() % 16, b.share::numeric
        FROM unnest(NEW.batch_ids, NEW.shares) AS b (batch_id, share)
        WHERE b.batch_id IS NOT NULL
    ) AS c
    GROUP BY c.scope, c.name, c.stripe
    ORDER BY c.scope, c.name, c.stripe
    ON CONFLICT (scope, name, stripe) DO UPDATE SET spent = t.spent + EXCLUDED.spent;
    RETURN NULL;
END;
$$;
COMMENT ON FUNCTION add_to_cost_totals IS 'Trigger: keeps cost_totals the sum of the ledger.';
-- At the commit, when all other locks have been had; until then calls do not wait for each other's totals.
CREATE CONSTRAINT TRIGGER add_new_cost AFTER INSERT ON provider_usage DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (coalesce(NEW.cost, NEW.estimated_cost) <> 0) EXECUTE FUNCTION add_to_cost_totals();
CREATE CONSTRAINT TRIGGER add_changed_cost AFTER UPDATE ON provider_usage DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (coalesce(NEW.cost, NEW.estimated_cost) <> coalesce(OLD.cost, OLD.estimated_cost))
    EXECUTE FUNCTION add_to_cost_totals();

INSERT INTO cost_totals (scope, name, stripe, spent)
SELECT c.scope, c.name, 0, sum(c.cost)
FROM (
    SELECT 'document' AS scope, d.doc_id AS name, coalesce(u.cost, u.estimated_cost) * d.share::numeric AS cost
    FROM provider_usage AS u, unnest(u.doc_ids, u.shares) AS d (doc_id, share)
    UNION ALL
    SELECT 'batch', b.batch_id, coalesce(u.cost, u.estimated_cost) * b.share::numeric
    FROM provider_usage AS u, unnest(u.batch_ids, u.shares) AS b (batch_id, share)
    WHERE b.batch_id IS NOT NULL
) AS c
WHERE c.cost <> 0
GROUP BY c.scope, c.name;

CREATE OR REPLACE FUNCTION cost_of_document(doc_id text) RETURNS numeric LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(t.spent), 0) FROM cost_totals AS t WHERE t.scope = 'document' AND t.name = cost_of_document.doc_id;
$$;
CREATE OR REPLACE FUNCTION cost_of_batch(batch_id text) RETURNS numeric LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(t.spent), 0) FROM cost_totals AS t WHERE t.scope = 'batch' AND t.name = cost_of_batch.batch_id;
$$;

CREATE VIEW cost_by_batch WITH (security_invoker = true) AS
SELECT
    s.batch_id, u.kind, u.model,
    count(DISTINCT u.id) AS calls,
    count(DISTINCT u.id) FILTER (WHERE u.outcome = 'ok') AS calls_ok,
    count(DISTINCT u.id) FILTER (WHERE u.outcome = 'unknown' AND u.give_up_at < now()) AS calls_unknown,
    count(DISTINCT s.doc_id) AS documents,
    round(sum(u.tokens_in * s.share)) AS tokens_in,
    round(sum(u.tokens_out * s.share)) AS tokens_out,
    sum(u.pages * s.share) AS pages,
    sum(coalesce(u.cost, u.estimated_cost) * s.share::numeric) AS cost,
    min(u.started_at) AS first_call_at,
    max(u.started_at) AS last_call_at
FROM provider_usage AS u, unnest(u.doc_ids, u.batch_ids, u.shares) AS s (doc_id, batch_id, share)
WHERE s.batch_id IS NOT NULL
GROUP BY s.batch_id, u.kind, u.model;
COMMENT ON VIEW cost_by_batch IS 'What the calls for each batch have cost, all runs together, by kind of service and model. One sum alone: cost_of_batch(batch_id).';
COMMENT ON COLUMN cost_by_batch.batch_id IS 'The batch that the documents belonged to then.';
COMMENT ON COLUMN cost_by_batch.kind IS 'embedding, extraction or parse.';
COMMENT ON COLUMN cost_by_batch.model IS 'The model or tier that was asked for.';
COMMENT ON COLUMN cost_by_batch.calls IS 'Calls in which a document of the batch had a share, failed ones too.';
COMMENT ON COLUMN cost_by_batch.calls_ok IS 'Calls that were answered well.';
COMMENT ON COLUMN cost_by_batch.calls_unknown IS 'Calls that were sent and whose answer never came.';
COMMENT ON COLUMN cost_by_batch.documents IS 'Documents that they were for.';
COMMENT ON COLUMN cost_by_batch.tokens_in IS 'Tokens sent; of a shared call the batch has its documents'' shares.';
COMMENT ON COLUMN cost_by_batch.tokens_out IS 'Tokens received.';
COMMENT ON COLUMN cost_by_batch.pages IS 'Pages that were paid for.';
COMMENT ON COLUMN cost_by_batch.cost IS 'Price; calls without a known outcome count with their estimate.';
COMMENT ON COLUMN cost_by_batch.first_call_at IS 'When the first was sent.';
COMMENT ON COLUMN cost_by_batch.last_call_at IS 'When the last was sent.';

CREATE FUNCTION over_cost(
    call uuid, doc_ids text[], batch_ids text[], shares double precision[], estimate numeric, per_document numeric, per_batch numeric
) RETURNS jsonb LANGUAGE plpgsql AS $$
-- Of a call that several documents share those are told, in their order, that do not fit; the others fit together. Until the commit nobody
-- else can ask for the same batch or document, so no two fit into what is left for one. Each statement here sees what has been committed.
DECLARE
    over jsonb := '[]';
    of_batches jsonb := '{}';
    lock_key bigint;
    payer record;
    spent numeric;
BEGIN
    IF estimate <= 0 OR (per_document <= 0 AND per_batch <= 0)
        -- It was entered before; the answer to that was lost.
        OR EXISTS (SELECT FROM provider_usage AS u WHERE u.id = over_cost.call)
    THEN
        RETURN NULL;
    END IF;
    FOR lock_key IN
        SELECT hashtextextended('docmill cost of document ' || d.doc_id, 0) FROM unnest(doc_ids) AS d (doc_id) WHERE per_document > 0
        UNION
        SELECT hashtextextended('docmill cost of batch ' || b.batch_id, 0) FROM unnest(batch_ids) AS b (batch_id)
        WHERE per_batch > 0 AND b.batch_id IS NOT NULL
        ORDER BY 1
    LOOP
        PERFORM pg_advisory_xact_lock(lock_key);
    END LOOP;
    FOR payer IN
        SELECT s.doc_id, s.batch_id, estimate * s.share::numeric AS cost
        FROM unnest(doc_ids, batch_ids, shares) WITH ORDINALITY AS s (doc_id, batch_id, share, place)
        ORDER BY s.place
    LOOP
        IF per_document > 0 THEN
            spent := cost_of_document(payer.doc_id);
            IF spent + payer.cost > per_document THEN
                over := over || jsonb_build_object('doc_id', payer.doc_id, 'scope', 'document', 'spent', spent, 'cost', payer.cost);
                CONTINUE;
            END IF;
        END IF;
        IF per_batch > 0 AND payer.batch_id IS NOT NULL THEN
            spent := coalesce((of_batches ->> payer.batch_id)::numeric, cost_of_batch(payer.batch_id));
            IF spent + payer.cost > per_batch THEN
                over := over || jsonb_build_object(
                    'doc_id', payer.doc_id, 'scope', 'batch', 'batch_id', payer.batch_id, 'spent', spent, 'cost', payer.cost
                );
                CONTINUE;
            END IF;
            of_batches := of_batches || jsonb_build_object(payer.batch_id, spent + payer.cost);
        END IF;
    END LOOP;
    RETURN nullif(over, '[]');
END;
$$;
COMMENT ON FUNCTION over_cost IS
    'The documents of a call for which it may not be made, because they or their batch would cost more than the limit (0 for none); null if there are none. Holds until the transaction ends.';

CREATE FUNCTION ask_to_pay(
    call uuid, doc_ids text[], batch_ids text[], shares double precision[], estimate numeric, per_document numeric, per_batch numeric,
    service text, admitted bigint, requests_per_minute bigint, tokens_per_minute bigint, tokens bigint, patience double precision,
    OUT granted boolean, OUT wait_seconds double precision, OUT hindrance text, OUT over jsonb
) LANGUAGE plpgsql AS $$
BEGIN
    over := over_cost(
        ask_to_pay.call, ask_to_pay.doc_ids, ask_to_pay.batch_ids, ask_to_pay.shares, ask_to_pay.estimate, ask_to_pay.per_document,
        ask_to_pay.per_batch
    );
    IF over IS NOT NULL THEN
        granted := FALSE;
        hindrance := 'cost';
        RETURN;
    END IF;
    SELECT a.granted, a.wait_seconds, a.hindrance INTO granted, wait_seconds, hindrance
    FROM ask_to_call(
        ask_to_pay.service, ask_to_pay.admitted, ask_to_pay.requests_per_minute, ask_to_pay.tokens_per_minute, ask_to_pay.tokens,
        ask_to_pay.patience
    ) AS a;
END;
$$;
COMMENT ON FUNCTION ask_to_pay IS
    'Asks for a call: what its documents and their batches may cost first, then breaker and budget (ask_to_call). hindrance: cost, breaker or budget; over: see over_cost.';

ALTER TABLE file_extractions ADD COLUMN waiting_since timestamptz;
COMMENT ON COLUMN file_extractions.waiting_since IS
    'When the document began to wait for an outside service (rate limit, outage) at the stage that is due; MAX_WAIT_HOURS later it is failed. Null when it does not wait.';

CREATE FUNCTION end_wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.waiting_since := NULL;
    RETURN NEW;
END;
$$;
COMMENT ON FUNCTION end_wait IS 'Trigger: a document that has got on, has a new version or has ended does not wait any more.';
CREATE TRIGGER end_wait BEFORE UPDATE ON file_extractions
    FOR EACH ROW WHEN (
        OLD.waiting_since IS NOT NULL AND NEW.waiting_since = OLD.waiting_since
        AND (NEW.version <> OLD.version OR NEW.milestone <> OLD.milestone OR NEW.state NOT IN ('queued', 'working', 'retrying'))
    )
    EXECUTE FUNCTION end_wait();

CALL pin_search_path();
