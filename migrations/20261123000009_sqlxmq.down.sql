DROP FUNCTION mq_clear_all;
DROP FUNCTION mq_clear;
DROP FUNCTION mq_insert;
DROP TYPE mq_new_t;
DROP FUNCTION mq_commit;
DROP FUNCTION mq_checkpoint;
DROP FUNCTION mq_keep_alive;
DROP FUNCTION mq_delete;
