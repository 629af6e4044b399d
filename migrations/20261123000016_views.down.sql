DROP FUNCTION status;
DROP VIEW attempts_view;
DROP VIEW requests;
