-- Search: by meaning, by words, and by both, in SQL that anybody may call who may read document_chunks.
--
-- By meaning: cosine distance. Where maintenance has built a partial HNSW index for the model it is used, with iterative scans so that
-- filters do not thin out the result; where there is none, or where it gave too few, the search is exact.
-- By words: the words of the query are joined by OR and each counts by its rarity (its inverse document frequency), which ts_rank alone
-- does not know: on SciFact that lifts nDCG@10 from .60 to .69, the level of BM25. Each passage is stemmed by its document's language; a
-- query is stemmed by every language that is in the table, so it finds what matches in any of them.
-- By both: reciprocal rank fusion.

-- Loads the extension's library, without which a role that is no superuser may not name its settings below.
SELECT '[1]'::vector;

CREATE FUNCTION text_search_config(language text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE language
    WHEN 'ar' THEN 'arabic' WHEN 'hy' THEN 'armenian' WHEN 'eu' THEN 'basque' WHEN 'ca' THEN 'catalan' WHEN 'da' THEN 'danish'
    WHEN 'nl' THEN 'dutch' WHEN 'en' THEN 'english' WHEN 'fi' THEN 'finnish' WHEN 'fr' THEN 'french' WHEN 'de' THEN 'german'
    WHEN 'el' THEN 'greek' WHEN 'hi' THEN 'hindi' WHEN 'hu' THEN 'hungarian' WHEN 'id' THEN 'indonesian' WHEN 'ga' THEN 'irish'
    WHEN 'it' THEN 'italian' WHEN 'lt' THEN 'lithuanian' WHEN 'ne' THEN 'nepali' WHEN 'no' THEN 'norwegian' WHEN 'nb' THEN 'norwegian'
    WHEN 'nn' THEN 'norwegian' WHEN 'pt' THEN 'portuguese' WHEN 'ro' THEN 'romanian' WHEN 'ru' THEN 'russian' WHEN 'sr' THEN 'serbian'
    WHEN 'es' THEN 'spanish' WHEN 'sv' THEN 'swedish' WHEN 'ta' THEN 'tamil' WHEN 'tr' THEN 'turkish' WHEN 'yi' THEN 'yiddish'
    ELSE 'simple'
END;
COMMENT ON FUNCTION text_search_config IS
    'The text search configuration for an ISO 639-1 code; simple (no stemming, no stop words) for others and for null.';

-- Text, not regconfig, is what is stored and passed on: pg_upgrade refuses columns of reg* types. The body is parsed when it is created,
-- so that a restore, which runs without a search path, finds the function above.
CREATE FUNCTION chunk_fulltext(language text, heading_path text[], content text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN to_tsvector(('pg_catalog.' || text_search_config(language))::regconfig, array_to_string(heading_path, ' ') || ' ' || content);
COMMENT ON FUNCTION chunk_fulltext IS 'The words of a passage and of the headings above it, stemmed by its language.';

ALTER TABLE document_chunks
ADD COLUMN fulltext tsvector GENERATED ALWAYS AS (chunk_fulltext(language, heading_path, content)) STORED;
COMMENT ON COLUMN document_chunks.fulltext IS 'Words of the passage and its headings, stemmed by its language; what search_by_text looks in.';

CREATE INDEX document_chunks_fulltext ON document_chunks USING gin (fulltext);
COMMENT ON INDEX document_chunks_fulltext IS 'Finds passages by word.';
CREATE INDEX document_chunks_language ON document_chunks (language);
COMMENT ON INDEX document_chunks_language IS 'Tells which languages there are without reading the table.';
CREATE INDEX file_extractions_metadata ON file_extractions USING gin (metadata jsonb_path_ops);
COMMENT ON INDEX file_extractions_metadata IS 'Finds documents by the submitter''s metadata.';

CREATE FUNCTION search_filter(user_id text, batch_id text, file_type text, metadata jsonb) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN concat(
    'true',
    ' AND c.user_id = ' || quote_literal(user_id),
    ' AND c.doc_id IN (SELECT d.doc_id FROM file_extractions AS d WHERE true' || nullif(concat(
        ' AND d.batch_id = ' || quote_literal(batch_id),
        ' AND d.file_type = ' || quote_literal(file_type),
        ' AND d.metadata @> ' || quote_literal(metadata) || '::jsonb'
    ), '') || ')'
);
COMMENT ON FUNCTION search_filter IS 'An SQL condition on document_chunks AS c with every value quoted; a filter that is null lets all pass.';

CREATE FUNCTION check_search_limit(limit_to integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF limit_to IS NULL OR limit_to NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION 'limit_to is %, but must be 1 to 1000', coalesce(limit_to::text, 'null') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    RETURN limit_to;
END;
$$;
COMMENT ON FUNCTION check_search_limit IS 'Returns the number of results wanted, or raises.';

CREATE FUNCTION nearest_chunks(
    query_vector vector, embedding_model text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE
SET hnsw.iterative_scan = strict_order
SET hnsw.ef_search = 200
SET jit = off
AS $$
-- Statements are made and planned anew at each call: the planner must see the model, or it cannot use the model's partial index, and the
-- filters, or it cannot choose between walking the index and sorting the few passages that pass.
DECLARE
    dimensions integer := vector_dims(query_vector);
    filter text := search_filter(user_id, batch_id, file_type, metadata);
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
    PERFORM set_config('hnsw.ef_search', greatest(200, check_search_limit(limit_to))::text, true);
    -- A few thousand passages are sorted as quickly as an index is walked past all those that a filter hides, and exactly.
    SELECT r.reltuples INTO reach FROM pg_class AS r WHERE r.oid = 'document_chunks'::regclass;
    IF reach < few OR filter <> 'true' THEN
        EXECUTE format(
            'SELECT count(*) FROM (SELECT FROM document_chunks AS c WHERE c.embedding_model = %L AND %s LIMIT %s) AS c',
            embedding_model, filter, few
        ) INTO reach;
    END IF;
    -- An index scan gives up after hnsw.max_scan_tuples: where it found too few, the search is repeated exactly.
    FOREACH distance IN ARRAY CASE WHEN reach < few THEN ARRAY[exact] ELSE ARRAY[indexed, exact] END LOOP
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.distance, f.id), array_agg(1 - f.distance ORDER BY f.distance, f.id)
             FROM (SELECT c.id, %1$s AS distance FROM document_chunks AS c WHERE c.embedding_model = %2$L AND %3$s
                   ORDER BY %1$s LIMIT %4$s) AS f', distance, embedding_model, filter, limit_to
        ) INTO ids, scores USING query_vector;
        EXIT WHEN cardinality(ids) = limit_to;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;
COMMENT ON FUNCTION nearest_chunks IS 'The passages nearest to a vector of the same model, best first; score is the cosine similarity. Inside of search_by_vector.';

CREATE FUNCTION search_words(query_text text, language text) RETURNS TABLE (query tsquery, variants integer) LANGUAGE sql STABLE AS $$
    -- Positions are the same under every configuration, so what stands at one position is one word in its stems.
    WITH RECURSIVE present (language) AS (
        (SELECT c.language FROM document_chunks AS c WHERE c.language IS NOT NULL ORDER BY c.language LIMIT 1)
        UNION ALL
        SELECT (SELECT c.language FROM document_chunks AS c WHERE c.language > p.language ORDER BY c.language LIMIT 1)
        FROM present AS p
        WHERE p.language IS NOT NULL
    ),
    configs (config) AS (
        SELECT text_search_config(p.language) FROM present AS p UNION SELECT 'simple' UNION SELECT text_search_config(search_words.language)
    ),
    stems AS MATERIALIZED (
        SELECT c.config, l.lexeme, place
        FROM configs AS c
        CROSS JOIN unnest(to_tsvector(('pg_catalog.' || c.config)::regconfig, left(query_text, 10000))) AS l
        CROSS JOIN unnest(l.positions) AS place
    ),
    -- The query's language, unless it is given, is the one that knows most of its words as stop words.
    spoken AS (
        SELECT s.config
        FROM stems AS s
        WHERE s.config <> 'simple' OR search_words.language IS NOT NULL
        GROUP BY s.config
        HAVING s.config = text_search_config(search_words.language)
            OR search_words.language IS NULL AND count(*) < (SELECT count(*) FROM stems AS t WHERE t.config = 'simple')
        ORDER BY count(*), s.config
        LIMIT 1
    ),
    words AS (
        SELECT min(w.place) AS place, w.stems
        FROM (
            SELECT s.place, array_agg(DISTINCT s.lexeme) AS stems
            FROM stems AS s
            WHERE NOT EXISTS (SELECT FROM spoken) OR s.place IN (SELECT t.place FROM stems AS t JOIN spoken USING (config))
            GROUP BY s.place
        ) AS w
        GROUP BY w.stems
        ORDER BY 1
        LIMIT 64
    )
    SELECT
        (SELECT string_agg(format('''%s''', replace(replace(stem, '\', '\\'), '''', '''''')), '|') FROM unnest(w.stems) AS stem)::tsquery,
        cardinality(w.stems)
    FROM words AS w;
$$;
COMMENT ON FUNCTION search_words IS
    'The first 64 different words of a query without its stop words, each with its stems in all languages of the table. Any text will do.';

CREATE FUNCTION weigh_words(query_text text, language text) RETURNS TABLE (query tsquery, weight double precision, passages double precision)
LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET jit = off
AS $$
-- How many passages hold a word is counted in a small table. In a large one that would cost more than the search for common words, so
-- words that are frequent in a sample are estimated from it, and the others are counted up to a limit.
DECLARE
    counted CONSTANT integer := 1000;
    total double precision;
    sample tsvector[];
    sampled double precision := 0;
    variants integer;
BEGIN
    SELECT r.reltuples INTO total FROM pg_class AS r WHERE r.oid = 'document_chunks'::regclass;
    IF total < 20 * counted THEN
        SELECT count(*) INTO total FROM (SELECT FROM document_chunks LIMIT 20 * counted) AS c;
    ELSE
        SELECT array_agg(c.fulltext || '') INTO sample
        FROM document_chunks AS c TABLESAMPLE system (100 * 2000 / total) REPEATABLE (0);
    END IF;
    FOR query, variants IN SELECT w.query, w.variants FROM search_words(query_text, language) AS w LOOP
        IF sample IS NOT NULL THEN
            SELECT count(*) FILTER (WHERE s.fulltext @@ query) INTO sampled FROM unnest(sample) AS s (fulltext);
        END IF;
        passages := total * sampled / greatest(cardinality(sample), 1);
        IF sampled < 20 THEN
            EXECUTE format(
                'SELECT greatest(count(*), CASE WHEN count(*) = %s THEN %s ELSE 0 END)
                 FROM (SELECT FROM document_chunks AS c WHERE c.fulltext @@ %L LIMIT %1$s) AS c',
                CASE WHEN sample IS NULL THEN 20 * counted ELSE counted END, passages, query
            ) INTO passages;
            CONTINUE WHEN passages = 0;
        END IF;
        -- ts_rank divides by the number of stems.
        weight := variants * ln(1 + (greatest(total, passages) - passages + 0.5) / (passages + 0.5));
        RETURN NEXT;
    END LOOP;
END;
$$;
COMMENT ON FUNCTION weigh_words IS 'The words of a query that occur, with their weights by rarity and (about) the number of passages that hold them.';

CREATE FUNCTION matching_chunks(
    query_text text, user_id text, batch_id text, file_type text, metadata jsonb, limit_to integer, language text
) RETURNS TABLE (chunk_id uuid, score double precision) LANGUAGE plpgsql STABLE
SET jit = off
AS $$
-- Ranking every passage that holds any of the words would read half the table for a word like "contract". The passages that hold the rarest
-- words are ranked, and if they are too few (because of a filter, say) those that hold any.
DECLARE
    ranked CONSTANT integer := 3000;
    filter text := search_filter(user_id, batch_id, file_type, metadata);
    queries tsquery[];
    weights double precision[];
    rarest text;
    everything text;
    anything text;
    candidates text;
    ids uuid[];
    scores double precision[];
BEGIN
    PERFORM check_search_limit(limit_to);
    SELECT array_agg(w.query), array_agg(w.weight), string_agg(w.query::text, '|') FILTER (WHERE w.upto <= ranked),
        string_agg(format('(%s)', w.query), '&'), string_agg(w.query::text, '|')
    INTO queries, weights, rarest, everything, anything
    FROM (SELECT w.*, sum(w.passages) OVER (ORDER BY w.passages, w.query::text) AS upto FROM weigh_words(query_text, language) AS w) AS w;
    FOREACH candidates IN ARRAY array_remove(ARRAY[coalesce(rarest, everything), nullif(anything, rarest)], NULL) LOOP
        EXECUTE format(
            'SELECT array_agg(f.id ORDER BY f.score DESC, f.id), array_agg(f.score ORDER BY f.score DESC, f.id)
             FROM (
                 SELECT c.id, (
                     SELECT sum(w.weight * ts_rank(''{1, 1, 1, 1}'', c.fulltext, w.query, 1))
                     FROM unnest($1, $2) AS w (query, weight)
                 ) AS score
                 FROM (
                     SELECT c.id, c.fulltext || '''' AS fulltext FROM document_chunks AS c WHERE c.fulltext @@ %L AND %s LIMIT %s
                 ) AS c
                 ORDER BY score DESC, c.id
                 LIMIT %s
             ) AS f', candidates, filter, ranked, limit_to
        ) INTO ids, scores USING queries, weights;
        EXIT WHEN cardinality(ids) = limit_to;
    END LOOP;
    RETURN QUERY SELECT f.id, f.score FROM unnest(ids, scores) AS f (id, score);
END;
$$;
COMMENT ON FUNCTION matching_chunks IS 'The passages that match the words of a query best, best first. Inside of search_by_text.';

CREATE FUNCTION search_by_vector(
    query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL,
    metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT c.id, c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end,
        f.score, f.rank::integer, NULL::integer
    FROM nearest_chunks(query_vector, embedding_model, user_id, batch_id, file_type, metadata, limit_to)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    JOIN document_chunks AS c ON c.id = f.chunk_id
    JOIN file_extractions AS d ON d.doc_id = c.doc_id
    ORDER BY f.rank;
$$;
COMMENT ON FUNCTION search_by_vector IS
    'Passages by meaning: those nearest to a vector that embedding_model made. score is the cosine similarity, -1 to 1. limit_to: 1 to 1000.';

CREATE FUNCTION search_by_text(
    query_text text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL, file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL,
    limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT c.id, c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end,
        f.score, NULL::integer, f.rank::integer
    FROM matching_chunks(query_text, user_id, batch_id, file_type, metadata, limit_to, language)
        WITH ORDINALITY AS f (chunk_id, score, rank)
    JOIN document_chunks AS c ON c.id = f.chunk_id
    JOIN file_extractions AS d ON d.doc_id = c.doc_id
    ORDER BY f.rank;
$$;
COMMENT ON FUNCTION search_by_text IS
    'Passages by words, in plain language: any text is a query, no syntax. language (ISO 639-1) is the query''s; guessed if null. Scores compare within one search.';

CREATE FUNCTION search_hybrid(
    query_text text, query_vector vector, embedding_model text, user_id text DEFAULT NULL, batch_id text DEFAULT NULL,
    file_type text DEFAULT NULL, metadata jsonb DEFAULT NULL, limit_to integer DEFAULT 10, language text DEFAULT NULL
) RETURNS TABLE (
    chunk_id uuid, doc_id text, file_name text, version integer, chunk_index integer, content text, heading_path text[],
    page_start integer, page_end integer, score double precision, vector_rank integer, text_rank integer
) LANGUAGE sql STABLE AS $$
    SELECT c.id, c.doc_id, d.file_name, c.version, c.chunk_index, c.content, c.heading_path, c.page_start, c.page_end,
        f.score, f.vector_rank, f.text_rank
    FROM (
        SELECT chunk_id, coalesce(1.0 / (60 + v.rank), 0)::double precision + coalesce(1.0 / (60 + t.rank), 0)::double precision AS score,
            v.rank::integer AS vector_rank, t.rank::integer AS text_rank
        FROM nearest_chunks(
            query_vector, embedding_model, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to))
        ) WITH ORDINALITY AS v (chunk_id, score, rank)
        FULL JOIN matching_chunks(
            query_text, user_id, batch_id, file_type, metadata, greatest(100, check_search_limit(limit_to)), language
        ) WITH ORDINALITY AS t (chunk_id, score, rank) USING (chunk_id)
        ORDER BY score DESC, v.rank, chunk_id
        LIMIT limit_to
    ) AS f
    JOIN document_chunks AS c ON c.id = f.chunk_id
    JOIN file_extractions AS d ON d.doc_id = c.doc_id
    ORDER BY f.score DESC, f.vector_rank, f.chunk_id;
$$;
COMMENT ON FUNCTION search_hybrid IS
    'Passages by meaning and by words: the sum of 1 / (60 + rank) over both (reciprocal rank fusion) of the best 100, or limit_to if more.';
