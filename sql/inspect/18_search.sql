-- Do searches find everything, and quickly? Vectors that lack, and the indexes that are not as they should be.
SELECT c.embedding_model AS what, concat_ws(', ', c.role, c.percent || ' % of ' || c.passages || ' passages have vectors', 'index: ' || c.vector_index) AS how,
    c.error_message AS trouble
FROM embedding_coverage AS c
UNION ALL
SELECT i.index_name, i.health, i.what_to_do
FROM index_health AS i
WHERE i.health <> 'ok';
