DROP FUNCTION resume_key(text, text);
DROP FUNCTION purge_requests(uuid[]);
DROP FUNCTION resolve_request(uuid, boolean, timestamptz, interval);
DROP FUNCTION replay_request(uuid, uuid, interval);
DROP FUNCTION request_destination(text);
DROP INDEX mq_msgs_halted;
ALTER TABLE mq_payloads DROP COLUMN returns, DROP COLUMN halts;
DROP INDEX outcomes_kept_reconcile;
ALTER TABLE outcomes DROP COLUMN replayed_as, DROP COLUMN reconcile_at, DROP COLUMN reconciles;
