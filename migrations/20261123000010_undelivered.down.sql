DROP FUNCTION sweep_channel;
DROP FUNCTION note_requests;
DROP FUNCTION note_channels;
DROP FUNCTION has_due;
DROP FUNCTION due_requests;
DROP FUNCTION queued_channels;
DROP FUNCTION waits_at_most;
DROP FUNCTION is_delivered;
