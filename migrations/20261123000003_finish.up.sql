-- How requests end: the outcome is stored, and the row leaves the queue or halts its ordering key.

-- The slot of an outcome that ends at p_at. Twelve slots span the retention; the remaining four
-- leave time for pruning.
--
-- This function has no search_path of its own. With one, it could not be inlined and would be
-- planned anew for each settled row, which takes longer than the rest of the settle.
CREATE FUNCTION outcome_slot(p_at timestamptz, p_retention interval) RETURNS smallint
LANGUAGE sql
STABLE
AS $$
    SELECT pg_catalog.int2(
        pg_catalog.int8(pg_catalog.floor(
            extract(epoch FROM p_at)
                OPERATOR(pg_catalog./)
                greatest(extract(epoch FROM p_retention) OPERATOR(pg_catalog./) 12, 1)
        )) OPERATOR(pg_catalog.%) 16
    );
$$;

CREATE FUNCTION tell_runners(p_channel text) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    -- No runner can listen for a longer name, and the notification of one would be an error.
    SELECT pg_notify('mq_' || p_channel, '') WHERE octet_length(p_channel) <= 60;
    SELECT pg_notify('mq', '');
    SELECT NULL::void;
$$;

-- Tells instances that these requests have ended, each about those that it waits for.
CREATE FUNCTION tell_waiters(p_ids uuid[], p_waiters uuid[]) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    -- The payload of a notification must be shorter than 8000 bytes; 200 ids take 7400.
    SELECT pg_notify(
        'requeuest_' || replace(told.waiter::text, '-', ''), string_agg(told.id::text, ',')
    )
    FROM (
        SELECT w.id, w.waiter, row_number() OVER (PARTITION BY w.waiter) / 200 AS part
        FROM unnest(p_ids, p_waiters) AS w(id, waiter) WHERE w.waiter IS NOT NULL
    ) told
    GROUP BY told.waiter, told.part;
    SELECT NULL::void;
$$;

-- Notes an outcome for the handler of its channel, if the channel has one.
CREATE FUNCTION note_unhandled(p_id uuid, p_channel text, p_slot smallint) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    INSERT INTO unhandled (id, channel_name, slot)
    SELECT p_id, p_channel, p_slot FROM handled_channels h WHERE h.channel_name = p_channel;
END;
$$;

-- Ends requests: any of them, or with p_claim_nos only those whose claim is the latest. Without
-- p_http_statuses, p_heads and p_bodies, they end without a response.
--
-- Answered requests leave the queue through a shorter form of this statement in the crate, which
-- locks no row before it deletes it. A test compares what the two do.
--
-- - Dead letters (discarded and ambiguous requests) keep their payload and don't expire.
-- - A dead letter that halts its ordering key stays in the queue, in state `halted`.
-- - A discarded request without a response ends with the last one that it ever got.
CREATE FUNCTION finish_requests(
    p_ids uuid[],
    p_claim_nos int[],
    p_statuses text[],
    p_http_statuses smallint[],
    p_heads text[],
    p_bodies bytea[],
    p_error_classes text[],
    p_errors text[],
    -- Whether the last attempt was not made, and isn't counted.
    p_unmade boolean[],
    p_retention interval
) RETURNS TABLE (
    id uuid,
    claim_no int,
    attempts int,
    waiter uuid,
    channel_name text,
    -- The next request of the ordering key may be claimed.
    frees_next boolean,
    -- The response to an earlier attempt that the request ended with.
    earlier_status smallint,
    earlier_head text,
    earlier_body bytea
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
-- A plan made for one call's arrays is not worth the time it takes.
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_slot smallint := outcome_slot(v_now, p_retention);
BEGIN
    RETURN QUERY
    WITH input AS MATERIALIZED (
        SELECT i.*, i.status IN ('discarded', 'ambiguous') AS dead
        FROM unnest(
            p_ids, p_claim_nos, p_statuses, p_http_statuses, p_heads, p_error_classes, p_errors,
            p_unmade
        ) WITH ORDINALITY
            AS i(id, claim_no, status, http_status, head, error_class, error, unmade, number)
    ), ending AS MATERIALIZED (
        SELECT
            i.*, m.claim_no AS last_claim, m.channel_name, m.channel_args, m.waiter, m.created_at,
            coalesce(
                m.destination,
                CASE WHEN substr(m.channel_args, 5, 3) = '|d|' THEN substr(m.channel_args, 8) END
            ) AS destination,
            greatest(m.attempts, coalesce(i.unmade, false)::int) - coalesce(i.unmade, false)::int
                AS attempts,
            m.seq IS NOT NULL AS ordered, i.dead AND m.halts AND m.seq IS NOT NULL AS halts
        FROM mq_msgs m JOIN input i ON m.id = ANY (ARRAY[i.id])
        WHERE m.state <> 'halted' AND (p_claim_nos IS NULL OR m.claim_no = i.claim_no)
        -- In the order of all settles, so that two of them don't deadlock.
        ORDER BY i.id FOR UPDATE OF m
    ), removed AS (
        DELETE FROM mq_msgs m USING ending e WHERE m.id = ANY (ARRAY[e.id]) AND NOT e.halts
    ), halted AS (
        UPDATE mq_msgs m
        SET state = 'halted', claim_no = next_claim_no(m.claim_no), attempt_at = '9999-12-31 UTC',
            deadline = NULL, supersede_key = NULL
        FROM ending e WHERE m.id = ANY (ARRAY[e.id]) AND e.halts
    ), dropped AS (
        DELETE FROM mq_payloads p USING ending e WHERE p.id = ANY (ARRAY[e.id]) AND NOT e.dead
    ), ended AS MATERIALIZED (
        SELECT
            e.*, p.metadata, p.response_status, p.response_head, p.response_body,
            -- A limit key says nothing of where the request went.
            CASE WHEN e.dead THEN coalesce(
                CASE WHEN strpos(e.destination, '://') > 0 THEN e.destination END,
                request_destination(p.head)
            ) END AS letter_destination,
            e.http_status IS NULL AND e.status = 'discarded' AND p.response_head IS NOT NULL
                AS earlier
        FROM ending e LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[e.id])
    ), stored AS (
        INSERT INTO outcomes (
            slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
            expires_at, http_status, head, body, error_class, error, metadata, destination
        )
        SELECT
            CASE WHEN e.dead THEN -1 ELSE v_slot END,
            e.id, e.channel_name, e.channel_args, e.status, e.attempts, e.created_at, v_now,
            CASE WHEN NOT e.dead THEN v_now + p_retention END,
            CASE WHEN e.earlier THEN e.response_status ELSE e.http_status END,
            CASE WHEN e.earlier THEN e.response_head ELSE e.head END,
            CASE WHEN e.earlier THEN e.response_body ELSE p_bodies[e.number] END,
            e.error_class, e.error, e.metadata,
            -- Not longer than an index takes.
            left(e.letter_destination, 500)
        FROM ended e
    ), to_handle AS (
        INSERT INTO unhandled (id, channel_name, slot)
        SELECT e.id, e.channel_name, CASE WHEN e.dead THEN -1 ELSE v_slot END
        FROM ending e JOIN handled_channels h ON h.channel_name = e.channel_name
    )
    SELECT
        e.id, e.last_claim, e.attempts, e.waiter, e.channel_name, e.ordered AND NOT e.halts,
        CASE WHEN e.earlier THEN e.response_status END,
        CASE WHEN e.earlier THEN e.response_head END,
        CASE WHEN e.earlier THEN e.response_body END
    FROM ended e;
END;
$$;

-- Ends unfinished requests without a response and, unless p_notify is false, notifies the instances
-- that wait for them. Returns the ids of the requests it ended.
CREATE FUNCTION end_requests(
    p_ids uuid[], p_status text, p_class text, p_error text, p_retention interval,
    p_notify boolean DEFAULT true
) RETURNS uuid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_each int[] := ARRAY[coalesce(cardinality(p_ids), 0)];
    v_ended uuid[];
    v_waiters uuid[];
    v_channels text[];
BEGIN
    SELECT
        coalesce(array_agg(e.id), '{}'), array_agg(e.waiter),
        array_agg(DISTINCT e.channel_name) FILTER (WHERE e.frees_next)
    INTO v_ended, v_waiters, v_channels
    FROM finish_requests(
        p_ids, NULL, array_fill(p_status, v_each), NULL, NULL, NULL, array_fill(p_class, v_each),
        array_fill(p_error, v_each), NULL, p_retention
    ) e;
    IF p_notify THEN
        PERFORM tell_waiters(v_ended, v_waiters);
        PERFORM tell_runners(c.name) FROM unnest(v_channels) AS c(name);
    END IF;
    RETURN v_ended;
END;
$$;

-- Gives up requests whose deadline has passed and that have no attempt under way. Left to the claim
-- that finds it out: a request that may have been sent and must not be sent again, and a request
-- that this session's process might not be able to read. A request that can't be ended, because a
-- trigger refuses it or a partition is gone, keeps none of the others. If none can, the call fails.
CREATE FUNCTION expire_requests(p_limit int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    -- None can be ended if this many in a row can't.
    c_enough CONSTANT int := 8;
    v_now timestamptz := clock_timestamp();
    v_ids uuid[];
    v_id uuid;
    v_ended int := 0;
    v_refused int := 0;
    v_code text;
    v_message text;
BEGIN
    SELECT array_agg(expired.id) INTO v_ids FROM (
        SELECT m.id FROM unnest(known_formats()) AS known(format), LATERAL (
            SELECT d.id FROM mq_msgs d
            WHERE d.format = known.format AND d.deadline <= v_now AND d.state <> 'parked'
                AND (
                    d.state IN ('waiting', 'behind', 'deferred')
                    OR d.state IN ('claimed', 'held') AND d.attempt_at <= v_now
                )
            ORDER BY d.deadline LIMIT p_limit
        ) past JOIN mq_msgs m ON m.id = ANY (ARRAY[past.id])
        WHERE m.deadline <= v_now
            AND (
                m.state IN ('waiting', 'behind', 'deferred')
                OR m.state IN ('claimed', 'held') AND m.attempt_at <= v_now
                    -- The process that looked at a parked request died before it could read it.
                    AND NOT EXISTS (
                        SELECT FROM mq_payloads p
                        WHERE p.id = m.id AND next_claim_no(p.parked_claim_no) = m.claim_no OFFSET 0
                    )
            )
        LIMIT p_limit FOR UPDATE OF m SKIP LOCKED
    ) expired;
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    BEGIN
        RETURN cardinality(
            end_requests(v_ids, 'discarded', 'deadline', 'its deadline passed', NULL)
        );
    EXCEPTION WHEN OTHERS THEN
        NULL;
    END;
    -- At random, so that those that can't be ended don't keep the others from being looked at.
    FOR v_id IN SELECT i.id FROM unnest(v_ids) AS i(id) ORDER BY random() LOOP
        BEGIN
            v_ended := v_ended + cardinality(
                end_requests(ARRAY[v_id], 'discarded', 'deadline', 'its deadline passed', NULL)
            );
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS v_code = RETURNED_SQLSTATE, v_message = MESSAGE_TEXT;
            v_refused := v_refused + 1;
        END;
        EXIT WHEN v_ended = 0 AND v_refused >= c_enough;
    END LOOP;
    IF v_ended = 0 AND v_refused > 0 THEN
        RAISE EXCEPTION USING ERRCODE = v_code, MESSAGE = v_message;
    END IF;
    RETURN v_ended;
END;
$$;

-- Whether no process begins an attempt of this channel.
CREATE FUNCTION is_paused(p_channel text) RETURNS boolean
LANGUAGE plpgsql
STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM paused_channels c WHERE c.channel_name = p_channel AND c.resumed_at IS NULL
    );
END;
$$;

-- Gives up those of these requests that are deferred, or in the queue of a paused channel: their
-- callers' time is over, and no attempt would find that out. Left alone are requests that another
-- transaction has locked, and those that this session's process might not be able to read.
CREATE FUNCTION give_up_deferred(p_ids uuid[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_ids uuid[];
    v_deferred uuid[];
BEGIN
    SELECT array_agg(found.id), array_agg(found.id) FILTER (WHERE found.state = 'deferred')
    INTO v_ids, v_deferred FROM (
        SELECT m.id, m.state FROM mq_msgs m
        WHERE m.id = ANY (p_ids) AND m.format = ANY (known_formats()) AND (
            m.state = 'deferred'
            OR m.state IN ('waiting', 'behind') AND is_paused(m.channel_name)
        )
        FOR UPDATE SKIP LOCKED
    ) found;
    IF v_deferred IS NOT NULL THEN
        PERFORM end_requests(
            v_deferred, 'discarded', 'deferred',
            'its destination took no more requests until the caller''s time was over', NULL
        );
    END IF;
    IF v_ids IS DISTINCT FROM v_deferred THEN
        PERFORM end_requests(
            ARRAY(SELECT unnest(v_ids) EXCEPT SELECT unnest(v_deferred)), 'discarded', 'deferred',
            'its channel was paused until the caller''s time was over', NULL
        );
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
    WHERE m.state = 'halted' AND (channel_names IS NULL OR m.channel_name = ANY (channel_names));
    IF channel_names IS NULL THEN
        SELECT array_agg(found.id) INTO v_ids FROM (
            SELECT m.id FROM mq_msgs m ORDER BY m.id LIMIT p_limit FOR UPDATE
        ) found;
    ELSE
        -- One part for each partial index.
        SELECT array_agg(locked.id) INTO v_ids FROM (
            SELECT m.id FROM (
                SELECT w.id FROM mq_msgs w
                WHERE w.channel_name = ANY (channel_names) AND w.state = 'waiting'
                UNION ALL
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = ANY (channel_names)
                    AND l.state IN ('claimed', 'held', 'sending_once')
                UNION ALL
                SELECT b.id FROM mq_msgs b
                WHERE b.channel_name = ANY (channel_names) AND b.state = 'behind'
                UNION ALL
                SELECT d.id FROM mq_msgs d
                WHERE d.channel_name = ANY (channel_names) AND d.state = 'deferred'
                UNION ALL
                SELECT p.id FROM mq_msgs p
                WHERE p.channel_name = ANY (channel_names) AND p.state = 'parked'
                LIMIT p_limit
            ) found JOIN mq_msgs m ON m.id = ANY (ARRAY[found.id])
            ORDER BY found.id FOR UPDATE OF m
        ) locked;
    END IF;
    RETURN end_requests(coalesce(v_ids, '{}'), 'cancelled', NULL, NULL, p_retention);
END;
$$;

-- Takes one outcome that is due: locks its row until the transaction ends. A concurrent transaction
-- takes a different outcome. The outcome itself must be read in another transaction: a lock on its
-- partition until the end of this one would delay pruning. Leaves out p_except, whose failures the
-- process is about to record. Returns the id of the transaction too.
CREATE FUNCTION take_unhandled(p_channel text, p_except uuid[] DEFAULT '{}')
RETURNS TABLE (id uuid, xact text)
LANGUAGE sql
SET search_path FROM CURRENT
-- As for enqueue, which callers' sessions call too.
SET enable_seqscan = off
AS $$
    SELECT due.id, pg_current_xact_id()::text FROM (
        SELECT u.id FROM unhandled u
        WHERE u.channel_name = p_channel AND u.due_at <= statement_timestamp()
            AND u.id <> ALL (p_except)
        ORDER BY u.due_at LIMIT 1 FOR UPDATE SKIP LOCKED
    ) due
$$;

-- Marks an outcome as handled once this transaction commits. Returns false if it is not the one
-- that took the outcome: the handler has ended that one.
CREATE FUNCTION mark_handled(p_id uuid, p_xact text) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
BEGIN
    IF pg_current_xact_id_if_assigned()::text IS DISTINCT FROM p_xact THEN
        RETURN false;
    END IF;
    DELETE FROM unhandled u WHERE u.id = p_id;
    RETURN FOUND;
END;
$$;
