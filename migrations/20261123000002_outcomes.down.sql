DROP TABLE destinations;
DROP TABLE request_keys;
DROP TABLE attempts;
DROP FUNCTION prune_outcomes(interval);
DROP FUNCTION outcome_slot(timestamptz, interval);
DROP FUNCTION take_unhandled(text);
DROP TABLE unhandled;
DROP TABLE handled_channels;
DROP TABLE outcomes;
