DROP TRIGGER mq_msgs_free_next ON mq_msgs;
DROP FUNCTION mend_behind;
DROP FUNCTION free_noted;
DROP FUNCTION free_first;
DROP FUNCTION free_next;
DROP FUNCTION move_behind;
