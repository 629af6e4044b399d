DROP FUNCTION park_request;
