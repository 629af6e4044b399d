DROP FUNCTION note_activity;
DROP TABLE activity;
