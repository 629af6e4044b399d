-- How requests enter the queue, and how they leave it without a response.

-- Locks a caller's key until the end of the transaction. Returns false if another transaction holds
-- the lock and p_wait is not set.
CREATE FUNCTION lock_key(p_kind text, p_channel text, p_key text, p_wait boolean) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock bigint := hashtextextended(
        concat_ws('/', 'requeuest', current_schema(), p_kind, p_channel, p_key), 0
    );
BEGIN
    IF p_wait THEN
        PERFORM pg_advisory_xact_lock(v_lock);
        RETURN true;
    END IF;
    RETURN pg_try_advisory_xact_lock(v_lock);
END;
$$;

CREATE FUNCTION tell_runners(p_channel text) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT pg_notify('mq_' || p_channel, ''), pg_notify('mq', '');
    SELECT NULL::void;
$$;

-- Whether a group is an ordering key: one that all channels share, or one within a channel.
CREATE FUNCTION is_ordered(p_group text) RETURNS boolean
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$ SELECT substr(p_group, 5, 3) IN ('|o|', '|c|') $$;

-- Locks an ordering key, in the same way as lock_key.
CREATE FUNCTION lock_order(p_channel text, p_group text, p_wait boolean) RETURNS boolean
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT lock_key(
        'order', CASE WHEN substr(p_group, 5, 3) = '|o|' THEN '' ELSE p_channel END, p_group, p_wait
    )
$$;

-- Another channel that has unfinished requests with this ordering key, or NULL. Call it while
-- holding the key's lock, in a later statement than the one that took the lock.
CREATE FUNCTION ordered_elsewhere(p_channel text, p_group text) RETURNS text
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    -- Two ranges of the index: a single condition `<>` would read the key's own backlog.
    SELECT CASE WHEN substr(p_group, 5, 3) = '|o|' THEN coalesce(
        (
            SELECT m.channel_name FROM mq_msgs m
            WHERE m.channel_args = p_group AND m.channel_name < p_channel AND m.seq IS NOT NULL
            LIMIT 1
        ),
        (
            SELECT m.channel_name FROM mq_msgs m
            WHERE m.channel_args = p_group AND m.channel_name > p_channel AND m.seq IS NOT NULL
            LIMIT 1
        )
    ) END;
$$;

-- Ends unfinished requests without a response and notifies the instances that wait for them.
-- Returns the ids of the requests it ended.
CREATE FUNCTION end_requests(
    p_ids uuid[], p_status text, p_class text, p_error text, p_retention interval
) RETURNS uuid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_kept boolean := p_status IN ('discarded', 'ambiguous');
    v_now timestamptz := clock_timestamp();
    v_ended uuid[];
    v_waiters uuid[];
    v_channels text[];
BEGIN
    WITH locked AS MATERIALIZED (
        SELECT
            m.id, m.channel_name, m.channel_args, m.attempts, m.created_at, m.waiter,
            m.seq IS NOT NULL AS ordered,
            v_kept AND m.halts AND m.seq IS NOT NULL AS halts
        FROM mq_msgs m WHERE m.id = ANY (p_ids) AND m.state <> 3
        ORDER BY m.id FOR UPDATE
    ), removed AS (
        DELETE FROM mq_msgs m USING locked l WHERE m.id = ANY (ARRAY[l.id]) AND NOT l.halts
    ), halted AS (
        UPDATE mq_msgs m
        SET state = 3, claim_no = m.claim_no + 1, attempt_at = '9999-12-31 UTC', deadline = NULL,
            supersede_key = NULL
        FROM locked l WHERE m.id = ANY (ARRAY[l.id]) AND l.halts
    ), dropped AS (
        DELETE FROM mq_payloads p USING locked l WHERE p.id = ANY (ARRAY[l.id]) AND NOT v_kept
    ), stored AS (
        INSERT INTO outcomes (
            slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
            expires_at, http_status, head, body, error_class, error, metadata
        )
        SELECT
            CASE WHEN v_kept THEN -1 ELSE outcome_slot(v_now, p_retention) END,
            l.id, l.channel_name, l.channel_args, p_status, l.attempts, l.created_at, v_now,
            CASE WHEN NOT v_kept THEN v_now + p_retention END,
            CASE WHEN v_kept THEN p.response_status END,
            CASE WHEN v_kept THEN p.response_head END,
            CASE WHEN v_kept THEN p.response_body END,
            p_class, p_error, p.metadata
        FROM locked l LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[l.id])
    ), to_handle AS (
        INSERT INTO unhandled (id, channel_name)
        SELECT l.id, l.channel_name
        FROM locked l JOIN handled_channels h ON h.channel_name = l.channel_name
    )
    SELECT
        coalesce(array_agg(l.id), '{}'), array_agg(l.waiter),
        array_agg(DISTINCT l.channel_name) FILTER (WHERE l.ordered AND NOT l.halts)
    INTO v_ended, v_waiters, v_channels
    FROM locked l;

    -- The payload of a notification must be shorter than 8000 bytes; 200 ids take 7400.
    PERFORM pg_notify(
        'requeuest_' || replace(told.waiter::text, '-', ''), string_agg(told.id::text, ',')
    )
    FROM (
        SELECT w.id, w.waiter, row_number() OVER (PARTITION BY w.waiter) / 200 AS part
        FROM unnest(v_ended, v_waiters) AS w(id, waiter) WHERE w.waiter IS NOT NULL
    ) told
    GROUP BY told.waiter, told.part;
    -- Later requests with the same ordering keys may be sent now.
    IF v_channels IS NOT NULL THEN
        PERFORM pg_notify('mq_' || c.name, '') FROM unnest(v_channels) AS c(name);
        PERFORM pg_notify('mq', '');
    END IF;
    RETURN v_ended;
END;
$$;

-- Gives up requests whose deadline has passed and that have no attempt under way. A request that
-- may have been sent and must not be sent again (state 4) is left to the claim that finds this out.
CREATE FUNCTION expire_requests(p_limit int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_ids uuid[];
BEGIN
    SELECT array_agg(due.id) INTO v_ids FROM (
        SELECT m.id FROM mq_msgs m
        WHERE m.deadline <= v_now AND (m.state = 0 OR m.state IN (1, 2) AND m.attempt_at <= v_now)
        ORDER BY m.deadline LIMIT p_limit FOR UPDATE SKIP LOCKED
    ) due;
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    RETURN cardinality(end_requests(v_ids, 'discarded', 'deadline', 'its deadline passed', NULL));
END;
$$;

-- Persists one request in the caller's transaction: a commit sends it, a rollback never does.
--
-- Verdicts:
--
-- - `inserted`
-- - `attached`: the key belongs to an earlier request with the same fingerprint, whose id is
--   returned.
-- - `conflict`: the key belongs to an earlier request that differs, whose id is returned.
-- - `busy`: nothing was done, because another transaction has one of the keys and p_wait is not
--   set.
-- - `elsewhere`: nothing was done, because another channel, which is returned, has unfinished
--   requests with the ordering key.
CREATE FUNCTION enqueue(
    p_id uuid,
    p_channel text,
    p_group text,
    p_ordered boolean,
    p_halts boolean,
    p_delay interval,
    p_deadline interval,
    p_name text,
    p_head text,
    p_body bytea,
    p_waiter uuid,
    -- 0, or the state of a row that is inserted already claimed, with this lease.
    p_state smallint,
    p_lease interval,
    p_key text,
    p_fingerprint bytea,
    p_supersede text,
    p_retention interval,
    p_notify boolean,
    p_wait boolean,
    -- Set after a commit whose outcome is unknown. A request that is in the queue or has already
    -- ended is then left alone.
    p_again boolean,
    p_metadata json DEFAULT NULL
) RETURNS TABLE (verdict text, request_id uuid, elsewhere text)
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_first record;
    v_elsewhere text;
    v_older uuid[];
    v_seq bigint;
    v_now timestamptz;
BEGIN
    -- Take all locks first, always in this order: if a later lock is not available, nothing may
    -- have been done yet.
    IF p_key IS NOT NULL AND NOT lock_key('key', p_channel, p_key, p_wait)
        OR p_supersede IS NOT NULL AND NOT lock_key('supersede', p_channel, p_supersede, p_wait)
        OR p_ordered AND NOT lock_order(p_channel, p_group, p_wait)
    THEN
        RETURN QUERY SELECT 'busy', NULL::uuid, NULL;
        RETURN;
    END IF;
    -- From here on, all reads are in later statements than the locks. The snapshot of a single
    -- statement that did both could be older than the wait for the lock.
    IF p_again AND (
        EXISTS (SELECT FROM mq_payloads p WHERE p.id = p_id)
        OR EXISTS (SELECT FROM outcomes o WHERE o.id = p_id)
    ) THEN
        RETURN QUERY SELECT 'inserted', p_id, NULL;
        RETURN;
    END IF;
    IF p_key IS NOT NULL THEN
        SELECT k.id, k.fingerprint = p_fingerprint AS same INTO v_first
        FROM request_keys k
        WHERE k.channel_name = p_channel AND k.key = p_key
            -- Both lookups are in one statement: a request that ends between two statements would
            -- look as if it had never existed.
            AND (
                EXISTS (SELECT FROM mq_msgs m WHERE m.id = k.id OFFSET 0)
                OR EXISTS (SELECT FROM outcomes o WHERE o.id = k.id OFFSET 0)
            );
        IF FOUND THEN
            RETURN QUERY SELECT
                CASE WHEN v_first.same THEN 'attached' ELSE 'conflict' END, v_first.id, NULL;
            RETURN;
        END IF;
    END IF;
    IF p_ordered THEN
        v_elsewhere := ordered_elsewhere(p_channel, p_group);
        IF v_elsewhere IS NOT NULL THEN
            RETURN QUERY SELECT 'elsewhere', NULL::uuid, v_elsewhere;
            RETURN;
        END IF;
    END IF;
    IF p_key IS NOT NULL THEN
        INSERT INTO request_keys AS k (channel_name, key, id, fingerprint)
        VALUES (p_channel, p_key, p_id, p_fingerprint)
        ON CONFLICT (channel_name, key) DO UPDATE
        SET id = excluded.id, fingerprint = excluded.fingerprint, created_at = excluded.created_at;
    END IF;
    IF p_supersede IS NOT NULL THEN
        -- Skips a row that a runner is claiming right now, because that request is being sent.
        SELECT array_agg(older.id) INTO v_older FROM (
            SELECT m.id FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.supersede_key = p_supersede
                AND m.attempts = 0 AND m.state <= 0
            FOR UPDATE SKIP LOCKED
        ) older;
        IF v_older IS NOT NULL THEN
            PERFORM end_requests(
                v_older, 'cancelled', 'superseded', 'a newer request took its place', p_retention
            );
        END IF;
    END IF;
    IF p_ordered THEN
        v_seq := nextval('mq_seq');
    END IF;
    INSERT INTO mq_payloads (id, name, head, body, metadata)
    VALUES (p_id, p_name, p_head, p_body, p_metadata);
    v_now := clock_timestamp();
    INSERT INTO mq_msgs (
        id, channel_name, channel_args, attempt_at, seq, waiter, claim_no, attempts, state,
        deadline, supersede_key, halts
    )
    VALUES (
        p_id, p_channel, p_group, v_now + CASE WHEN p_state = 0 THEN p_delay ELSE p_lease END,
        v_seq, p_waiter, (p_state > 0)::int, (p_state > 0)::int, p_state,
        v_now + p_deadline, p_supersede, p_halts
    );
    IF p_notify THEN
        PERFORM pg_notify('mq_' || p_channel, ''), pg_notify('mq', '');
    END IF;
    RETURN QUERY SELECT 'inserted', p_id, NULL;
END;
$$;

-- Persists many requests that have no caller's key, in the caller's transaction and in their order.
-- Returns no row on success. If another channel has unfinished requests with the ordering key of
-- one of them, does nothing and returns the id of that one and the channel.
CREATE FUNCTION enqueue_many(
    p_ids uuid[],
    p_channels text[],
    p_groups text[],
    p_delays_ms bigint[],
    p_deadlines_ms bigint[],
    p_heads text[],
    p_bodies bytea[],
    p_ordered boolean[],
    p_halts boolean[],
    p_name text,
    p_notify boolean,
    p_metadata text[] DEFAULT NULL
) RETURNS TABLE (request_id uuid, elsewhere text)
LANGUAGE plpgsql
SET search_path FROM CURRENT
-- A plan made for one call's arrays is not worth the time it takes.
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_id uuid;
    v_elsewhere text;
    v_now timestamptz;
BEGIN
    IF true = ANY (p_ordered) THEN
        -- The keys are locked in sorted order, so that two such calls don't deadlock, and before
        -- the statement that takes the sequence numbers.
        PERFORM lock_order(k.channel, k.key_group, true)
        FROM (
            SELECT DISTINCT i.channel, i.key_group
            FROM unnest(p_channels, p_groups, p_ordered) AS i(channel, key_group, ordered)
            WHERE i.ordered ORDER BY i.key_group, i.channel
        ) k;
        SELECT c.id, c.holder INTO v_id, v_elsewhere
        FROM (
            SELECT i.id, coalesce(ordered_elsewhere(i.channel, i.key_group), (
                SELECT o.channel
                FROM unnest(p_channels, p_groups, p_ordered) AS o(channel, key_group, ordered)
                WHERE o.ordered AND o.key_group = i.key_group AND o.channel <> i.channel
                    AND substr(i.key_group, 5, 3) = '|o|'
                LIMIT 1
            )) AS holder
            FROM unnest(p_ids, p_channels, p_groups, p_ordered)
                AS i(id, channel, key_group, ordered)
            WHERE i.ordered
        ) c
        WHERE c.holder IS NOT NULL LIMIT 1;
        IF FOUND THEN
            RETURN QUERY SELECT v_id, v_elsewhere;
            RETURN;
        END IF;
    END IF;
    v_now := clock_timestamp();
    INSERT INTO mq_payloads (id, name, head, body, metadata)
    SELECT i.id, p_name, i.head, i.body, i.metadata::json
    FROM unnest(p_ids, p_heads, p_bodies, p_metadata) AS i(id, head, body, metadata);
    INSERT INTO mq_msgs (
        id, channel_name, channel_args, attempt_at, created_at, seq, deadline, halts
    )
    SELECT
        i.id, i.channel, i.key_group, v_now + i.delay_ms * interval '1 millisecond', v_now,
        -- unnest returns rows in the order of the arrays.
        CASE WHEN i.ordered THEN nextval('mq_seq') END,
        v_now + i.deadline_ms * interval '1 millisecond', i.halts
    FROM unnest(p_ids, p_channels, p_groups, p_ordered, p_halts, p_delays_ms, p_deadlines_ms)
        AS i(id, channel, key_group, ordered, halts, delay_ms, deadline_ms);
    IF p_notify THEN
        PERFORM tell_runners(told.channel)
        FROM (SELECT DISTINCT i.channel FROM unnest(p_channels) AS i(channel)) told;
    END IF;
END;
$$;

-- Cancels an unfinished request. Returns `cancelled`; `ended` if the request had already ended;
-- NULL if there is no such request.
CREATE FUNCTION cancel_request(p_id uuid, p_retention interval) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    -- Waits for a settle that is about to end the request.
    IF cardinality(end_requests(ARRAY[p_id], 'cancelled', NULL, NULL, p_retention)) > 0 THEN
        RETURN 'cancelled';
    END IF;
    IF EXISTS (SELECT FROM outcomes o WHERE o.id = p_id) THEN
        RETURN 'ended';
    END IF;
    RETURN NULL;
END;
$$;

-- Cancels up to p_limit (NULL: all) unfinished requests of the given channels (NULL: all) and
-- releases their halted ordering keys. Returns the ids of the requests it ended.
CREATE FUNCTION cancel_channels(channel_names text[], p_retention interval, p_limit int)
RETURNS uuid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_ids uuid[];
BEGIN
    DELETE FROM mq_msgs m
    WHERE m.state = 3 AND (channel_names IS NULL OR m.channel_name = ANY (channel_names));
    IF channel_names IS NULL THEN
        SELECT array_agg(found.id) INTO v_ids FROM (
            SELECT m.id FROM mq_msgs m ORDER BY m.id LIMIT p_limit FOR UPDATE
        ) found;
    ELSE
        -- Uses the indexes of waiting rows and of owned rows.
        SELECT array_agg(locked.id) INTO v_ids FROM (
            SELECT m.id FROM (
                SELECT w.id FROM mq_msgs w
                WHERE w.channel_name = ANY (channel_names) AND w.state = 0
                UNION ALL
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = ANY (channel_names) AND l.state IN (1, 2, 4)
                LIMIT p_limit
            ) found JOIN mq_msgs m ON m.id = ANY (ARRAY[found.id])
            ORDER BY found.id FOR UPDATE OF m
        ) locked;
    END IF;
    RETURN end_requests(coalesce(v_ids, '{}'), 'cancelled', NULL, NULL, p_retention);
END;
$$;

-- sqlxmq's entry points that insert and clear, for tools that call its functions.

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
            0::smallint, NULL, NULL, NULL, NULL, NULL, true, true, false
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
