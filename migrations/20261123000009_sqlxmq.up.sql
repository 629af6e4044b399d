-- sqlxmq's other entry points, for tools that call its functions.

CREATE FUNCTION mq_delete(msg_ids uuid[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    DELETE FROM mq_msgs WHERE id = ANY (msg_ids);
    DELETE FROM mq_payloads WHERE id = ANY (msg_ids);
END;
$$;

CREATE FUNCTION mq_keep_alive(msg_ids uuid[], duration interval) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    UPDATE mq_msgs SET attempt_at = clock_timestamp() + duration
    WHERE id = ANY (ARRAY(
        SELECT m.id FROM mq_msgs m
        WHERE m.id = ANY (msg_ids) ORDER BY m.id FOR UPDATE SKIP LOCKED
    )) AND attempt_at < clock_timestamp() + duration;
$$;

CREATE FUNCTION mq_checkpoint(
    msg_id uuid,
    duration interval,
    new_payload_json text,
    new_payload_bytes bytea,
    extra_retries int
) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT mq_keep_alive(ARRAY[msg_id], duration);
    UPDATE mq_payloads
    SET head = coalesce(new_payload_json, head), body = coalesce(new_payload_bytes, body)
    WHERE id = msg_id;
$$;

-- Each row is committed by its own transaction; there is no second phase.
CREATE FUNCTION mq_commit(msg_ids uuid[]) RETURNS void
LANGUAGE sql
AS $$ SELECT NULL::void $$;
CREATE TYPE mq_new_t AS (
    id uuid,
    delay interval,
    retries int,
    retry_backoff interval,
    channel_name text,
    channel_args text,
    commit_interval interval,
    ordered boolean,
    name text,
    payload_json text,
    payload_bytes bytea
);

CREATE FUNCTION mq_insert(new_messages mq_new_t[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    m mq_new_t;
BEGIN
    FOREACH m IN ARRAY new_messages LOOP
        PERFORM FROM enqueue(
            m.id, m.channel_name, m.channel_args, coalesce(m.ordered, false), false,
            coalesce(m.delay, '0'), NULL, m.name, m.payload_json, m.payload_bytes, NULL,
            'waiting', NULL, NULL, NULL, NULL, NULL, true, true, false
        ) AS e WHERE e.verdict = 'elsewhere';
        IF FOUND THEN
            RAISE EXCEPTION 'unfinished requests of another channel have the ordering key'
                USING ERRCODE = 'object_in_use';
        END IF;
    END LOOP;
END;
$$;

CREATE FUNCTION mq_clear(channel_names text[]) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$ SELECT cancel_channels(coalesce(channel_names, '{}'), '1 day', NULL); SELECT NULL::void $$;

CREATE FUNCTION mq_clear_all() RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$ SELECT cancel_channels(NULL, '1 day', NULL); SELECT NULL::void $$;
