-- A document's name is a name, whoever submits it.
--
-- Python has always kept the last part of what a submitter calls a file, without control and direction characters and at most 255
-- characters of it. The SQL functions took any text: a name with a line break or a terminal escape stood in every view as it came, and
-- psql shows direction characters as they are. Now the table sees to it, whichever way a row comes. Rows that are there keep their names
-- until they are submitted again; the command and the pages have always shown them escaped.

CREATE FUNCTION display_name(name text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT CASE WHEN part IN ('', '.', '..') THEN 'unnamed' ELSE part END
    FROM regexp_replace(name, '[\u0001-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]', '', 'g') AS shown,
        left(btrim(regexp_replace(rtrim(shown, ' /\'), '^.*[/\\]', '')), 255) AS part;
END;

COMMENT ON FUNCTION display_name(text) IS
    'The last part of a file''s name, fit to be stored and shown: without control and direction characters, at most 255 characters.';

CREATE FUNCTION keep_display_name() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.file_name := display_name(NEW.file_name);
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION keep_display_name() IS 'Stores the display_name of what a document is to be called.';

CREATE TRIGGER keep_display_name BEFORE INSERT OR UPDATE OF file_name ON file_extractions FOR EACH ROW
    WHEN (NEW.file_name IS DISTINCT FROM display_name(NEW.file_name)) EXECUTE FUNCTION keep_display_name();

CALL pin_search_path();
