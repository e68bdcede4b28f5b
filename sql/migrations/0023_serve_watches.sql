-- Says that docmill serve looks at the alert rules too, so that the end of the last worker is told.

COMMENT ON COLUMN alert_rules.evaluated_at IS 'When a worker or docmill serve last looked. Far back: neither runs.';
