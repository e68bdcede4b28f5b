-- Which alerts are open, since when, and where does it say what to do? alert_findings has what is so at this moment, told or not.
SELECT a.severity, a.rule, a.subject, a.message, a.opened_at, a.lasts, a.what_to_do
FROM open_alerts AS a;
