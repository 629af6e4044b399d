DROP FUNCTION mq_commit(uuid[]);
DROP FUNCTION mq_checkpoint(uuid, interval, text, bytea, int);
DROP FUNCTION mq_keep_alive(uuid[], interval);
DROP FUNCTION mq_delete(uuid[]);
DROP FUNCTION mq_poll(text[], int);
DROP TABLE mq_payloads;
DROP SEQUENCE mq_seq;
DROP TABLE mq_msgs;
