DROP FUNCTION queue_depth;
DROP TABLE queue_observer;
DROP FUNCTION note_activity;
DROP TABLE activity;
