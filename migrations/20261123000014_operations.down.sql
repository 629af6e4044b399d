DROP FUNCTION prune_operations;
DROP FUNCTION resume_channel;
DROP FUNCTION pause_channel;
DROP TABLE operations;
DROP TABLE changes;
