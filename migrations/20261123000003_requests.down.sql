DROP FUNCTION mq_clear_all();
DROP FUNCTION mq_clear(text[]);
DROP FUNCTION mq_insert(mq_new_t[]);
DROP TYPE mq_new_t;
DROP FUNCTION cancel_channels(text[], interval, int);
DROP FUNCTION cancel_request(uuid, interval);
DROP FUNCTION enqueue_many(
    uuid[], text[], text[], bigint[], bigint[], text[], bytea[], boolean[], boolean[], text,
    boolean, text[], text[], bytea[]
);
DROP FUNCTION take_keys(uuid[], text[], text[], bytea[]);
DROP FUNCTION enqueue(
    uuid, text, text, boolean, boolean, interval, interval, text, text, bytea, uuid, smallint,
    interval, text, bytea, text, interval, boolean, boolean, boolean,
    json
);
DROP FUNCTION expire_requests(int);
DROP FUNCTION end_requests(uuid[], text, text, text, interval);
DROP FUNCTION ordered_elsewhere(text, text);
DROP FUNCTION tell_runners(text);
DROP FUNCTION is_known(uuid);
DROP FUNCTION lock_orders(text[], text[], boolean[]);
DROP FUNCTION lock_order(text, text, boolean);
DROP FUNCTION order_scope(text, text);
DROP FUNCTION is_ordered(text);
DROP FUNCTION lock_key(text, text, text, boolean);
DROP FUNCTION key_locks_left();
DROP FUNCTION try_claim_key(bigint);
DROP FUNCTION claim_keys(bigint[]);
DROP FUNCTION key_lock(text, text, text);
DROP FUNCTION bulk_lock();
