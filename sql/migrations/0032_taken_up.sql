-- A complete document whose extraction is tried again in a cancelled batch was cancelled as a straggler of its run: it leaves that run now, as
-- others do that somebody takes up again.

DROP TRIGGER file_extractions_taken_up ON file_extractions;
CREATE TRIGGER file_extractions_taken_up BEFORE UPDATE OF state ON file_extractions
    FOR EACH ROW WHEN (OLD.state IN ('complete', 'failed', 'cancelled', 'duplicate') AND NEW.state = 'queued' AND NEW.run_id IS NOT NULL)
    EXECUTE FUNCTION leave_cancelled_run();
