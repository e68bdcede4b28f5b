-- Searches by vector find more of what is nearest. With 100,000 passages and a filter that let 5 % of them pass, recall@10 was .88: a scan in
-- strict order drops what it comes upon late, and 200 candidates are few where most of them are hidden. Candidates come as the index finds
-- them now, more of them, most under a filter; the function puts them in order itself, as it always has. See docs/performance.md.

CREATE OR REPLACE FUNCTION nearest_chunks(
    query_vector vector, embedding_model text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE
SET hnsw.iterative_scan = relaxed_order
SET hnsw.ef_search = 400
SET jit = off
AS $$
-- Statements are made and planned anew at each call: the planner must see the model, or it cannot use the model's partial index, and the
-- filters, or it cannot choose between walking the index and sorting the few passages that pass. All of a call's statements see one snapshot,
-- so it does not matter when searches go over to another table.
DECLARE
    dimensions integer := vector_dims(query_vector);
    filter text := search_filter(user_id, batch_id, file_type, metadata);
    place CONSTANT text := embedding_table(embedding_model);
    key CONSTANT text := CASE place WHEN 'document_chunks' THEN 'c.id' ELSE 'c.chunk_id' END;
    exact CONSTANT text := 'c.embedding <=> $1';
    indexed CONSTANT text := format('c.embedding::vector(%1$s) <=> $1::vector(%1$s)', dimensions);
    few CONSTANT integer := 3000;
    reach bigint;
    distance text;
    ids uuid[];
    scores double precision[];
BEGIN
    IF query_vector IS NULL OR vector_norm(query_vector) = 0 THEN
        RETURN;
    END IF;
    PERFORM set_config('hnsw.ef_search', greatest(CASE filter WHEN 'true' THEN 400 ELSE 800 END, check_search_limit(limit_to))::text, true);
    -- A few thousand passages are sorted as quickly as an index is walked past all those that a filter hides, and exactly.
    SELECT r.reltuples INTO reach FROM pg_class AS r WHERE r.oid = place::regclass;
    IF reach < few OR filter <> 'true' THEN
        EXECUTE format(
            'SELECT count(*) FROM (SELECT FROM %I AS c WHERE c.embedding_model = %L AND %s LIMIT %s) AS c',
            place, embedding_model, filter, few
        ) INTO reach;
    END IF;
    -- An index scan gives up after hnsw.max_scan_tuples: where it found too few, the search is repeated exactly.
    FOREACH distance IN ARRAY CASE WHEN reach < few THEN ARRAY[exact] ELSE ARRAY[indexed, exact] END LOOP
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.distance, f.id), array_agg(1 - f.distance ORDER BY f.distance, f.id)
             FROM (SELECT %5$s AS id, %1$s AS distance FROM %6$I AS c WHERE c.embedding_model = %2$L AND %3$s
                   ORDER BY %1$s LIMIT %4$s) AS f', distance, embedding_model, filter, limit_to, key, place
        ) INTO ids, scores USING query_vector;
        EXIT WHEN cardinality(ids) = limit_to;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;

CALL pin_search_path();
