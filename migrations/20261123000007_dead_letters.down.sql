DROP FUNCTION resume_key;
DROP FUNCTION purge_requests;
DROP FUNCTION resolve_request;
DROP FUNCTION replay_request;
DROP FUNCTION refuses_order;
DROP FUNCTION request_destination;
