-- The queue that sqlxmq's runner drives. Names and signatures are sqlxmq 0.6's; columns and bodies are requeuest's.
--
-- Every function carries the search_path of its installation: it works from any connection, and never touches a
-- sqlxmq that lives in another schema.
--
-- Rows are looked up by `id = ANY (ARRAY[x.id])` where `id = x.id` would do, and by `state <= 0` there: a queue that is empty for a moment has
-- statistics that say so, and a plan made then may go through all of an index for each row, since there is nothing in it. In these forms
-- there is no such plan: no index is sorted for a join, and none is made for the condition. OFFSET 0 has an EXISTS
-- looked up row by row too.

-- Hot and narrow: only unfinished requests. No foreign key points here, because each delete would look for referrers.
CREATE TABLE mq_msgs (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    -- The group: `hhhh|o|key` for an ordering key, `hhhh|c|key` for one that each channel has for itself, `hhhh|d|origin` else;
    -- hhhh is a hash that spreads the groups.
    channel_args text COLLATE "C" NOT NULL,
    -- When the next attempt is due; while one is made, the end of its lease.
    attempt_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The place among the requests of an ordering key, in commit order.
    seq bigint,
    -- The instance that waits for the outcome; nil: several do.
    waiter uuid,
    -- Rises with every change of owner and is the only fence.
    claim_no int NOT NULL DEFAULT 0,
    -- Transmissions begun.
    attempts int NOT NULL DEFAULT 0,
    -- 0 waiting, 1 claimed, 2 held for the next attempt by the process that made the last one, 3 ended without success and
    -- holding up its ordering key, 4 being sent and not to be sent again.
    state smallint NOT NULL DEFAULT 0,
    -- When it is given up, whether or not anybody got round to sending it.
    deadline timestamptz,
    -- A newer request with the same one takes its place for as long as it has not been sent.
    supersede_key text COLLATE "C",
    -- Ended without success it holds up its ordering key.
    halts boolean NOT NULL DEFAULT false
) WITH (
    fillfactor = 70,
    -- The table is small and all of it changes: shares of its size say nothing.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);

-- Of those that wait: what is due, and when the next one will be.
CREATE INDEX mq_msgs_due ON mq_msgs (channel_name, attempt_at) WHERE state = 0;
-- Skipping from group to group, and what is due in one.
CREATE INDEX mq_msgs_groups ON mq_msgs (channel_name, channel_args, attempt_at) WHERE state = 0;
-- Of those that somebody has: whose lease has run out. An index of its own, because most requests are inserted with a lease and gone long
-- before its end: what they leave in an index until it is vacuumed is not to be passed by each poll.
CREATE INDEX mq_msgs_leases ON mq_msgs (channel_name, attempt_at) WHERE state IN (1, 2, 4);
-- The head of an ordering key, and whether another channel has the key.
CREATE UNIQUE INDEX mq_msgs_order ON mq_msgs (channel_args, channel_name, seq) WHERE seq IS NOT NULL;

-- What is given up by time.
CREATE INDEX mq_msgs_deadline ON mq_msgs (deadline) WHERE deadline IS NOT NULL;
-- What a newer request may take the place of.
CREATE INDEX mq_msgs_supersede ON mq_msgs (channel_name, supersede_key) WHERE supersede_key IS NOT NULL;

CREATE SEQUENCE mq_seq;

-- What is sent. Read once an attempt, so kept out of the hot table.
CREATE TABLE mq_payloads (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    head text NOT NULL,
    -- NULL: no body, which HTTP tells apart from an empty one.
    body bytea,
    -- The last response that was not final: what the caller gets if no better one comes.
    response_status smallint,
    response_head text,
    response_body bytea
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
-- Most bodies don't compress well, and an uncompressed one can be measured and cut without being read.
ALTER TABLE mq_payloads ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE mq_payloads ALTER COLUMN response_body SET STORAGE EXTERNAL;

-- Claims up to batch_size due requests. The lease is the session's `requeuest.lease`.
--
-- The cost doesn't grow with the backlog: a bounded number of due rows is read by due time; where there are more, groups
-- are skipped through from a random start, so that one destination's backlog can't hide the others. Then a session looks for leases that
-- have run out once a second at most; a runner with nothing better to do looks each time.
CREATE FUNCTION mq_poll(channel_names text[], batch_size int DEFAULT 1)
RETURNS TABLE (
    id uuid,
    is_committed boolean,
    name text,
    payload_json text,
    payload_bytes bytea,
    retry_backoff interval,
    wait_time interval
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
-- Else a look for one group may go through all that is due and sort it, where the statistics say that this is little.
SET enable_sort = off
AS $$
#variable_conflict use_column
DECLARE
    c_wait_min CONSTANT interval := '50 milliseconds';
    -- Never longer, so that a row whose notification was lost is found all the same.
    c_wait_max CONSTANT interval := '1 second';
    -- Larger bodies are fetched by the attempt, under a memory budget.
    c_inline_body CONSTANT int := 65536;
    v_now timestamptz := clock_timestamp();
    v_lease interval := coalesce(nullif(current_setting('requeuest.lease', true), ''), '15 seconds')::interval;
    v_window int := 4 * batch_size;
    v_channels text[] := channel_names;
    -- Rows by their place, which spares going through an index for each of them once more. Nothing else comes to lie there while this
    -- runs, as its snapshot is older; what is written anew in between is found by the next poll. What is locked stays where it is.
    v_candidates tid[];
    v_backlog boolean;
    v_picked tid[] := '{}';
    v_some tid[];
    -- Those that have some by their age.
    v_groups text[];
    v_served text[] := '{}';
    v_from int := 1;
    v_room int;
    v_open int;
    v_claimed int;
    v_next timestamptz;
    v_wait interval;
    v_channel text;
    v_group text;
    v_ordered boolean;
    v_start text;
    v_cursor text;
    v_wrapped boolean;
    v_share int := greatest(1, batch_size / 32);
    v_visits int := 0;
BEGIN
    IF EXISTS (SELECT FROM mq_msgs m WHERE m.deadline <= v_now) THEN
        PERFORM expire_requests(batch_size);
    END IF;

    IF v_channels IS NULL THEN
        WITH RECURSIVE waiting(channel) AS (
            (SELECT m.channel_name FROM mq_msgs m WHERE m.state = 0 ORDER BY m.channel_name LIMIT 1)
            UNION ALL
            SELECT (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state = 0 AND m.channel_name > waiting.channel ORDER BY m.channel_name LIMIT 1
            )
            FROM waiting WHERE waiting.channel IS NOT NULL
        ), leased(channel) AS (
            (SELECT m.channel_name FROM mq_msgs m WHERE m.state IN (1, 2, 4) ORDER BY m.channel_name LIMIT 1)
            UNION ALL
            SELECT (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state IN (1, 2, 4) AND m.channel_name > leased.channel ORDER BY m.channel_name LIMIT 1
            )
            FROM leased WHERE leased.channel IS NOT NULL
        )
        SELECT array_agg(present.channel) INTO v_channels
        FROM (SELECT channel FROM waiting UNION SELECT channel FROM leased) present
        WHERE present.channel IS NOT NULL;
    END IF;

    SELECT array_agg(due.ctid ORDER BY due.attempt_at) INTO v_candidates
    FROM unnest(v_channels) AS wanted(channel), LATERAL (
        SELECT m.ctid, m.attempt_at FROM mq_msgs m
        WHERE m.channel_name = wanted.channel AND m.state = 0 AND m.attempt_at <= v_now
        ORDER BY m.attempt_at LIMIT v_window
    ) due;
    v_backlog := coalesce(cardinality(v_candidates), 0) >= v_window;

    -- The session's `requeuest.looked` is when it last looked.
    IF NOT v_backlog
        OR coalesce(nullif(current_setting('requeuest.looked', true), ''), '-infinity')::timestamptz < v_now - c_wait_max
    THEN
        PERFORM set_config('requeuest.looked', v_now::text, false);
        SELECT array_agg(locked.ctid) INTO v_some FROM (
            SELECT m.ctid
            FROM unnest(v_channels) AS wanted(channel), LATERAL (
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = wanted.channel AND l.state IN (1, 2, 4) AND l.attempt_at <= v_now
                ORDER BY l.attempt_at LIMIT batch_size
            ) lapsed JOIN mq_msgs m ON m.id = ANY (ARRAY[lapsed.id])
            WHERE m.state NOT IN (0, 3) AND m.attempt_at <= v_now
            LIMIT batch_size FOR UPDATE OF m SKIP LOCKED
        ) locked;
        v_picked := coalesce(v_some, '{}');
    END IF;

    -- All go by age if there are few. Of a backlog a quarter goes group by group to those that have none by age, so that nobody waits
    -- behind all that came before for another destination. No more than that, as the oldest lie side by side, and those of a group do
    -- not. What is still open then, as there are few groups or other polls had the oldest, goes in the same order, with no share.
    FOREACH v_room IN ARRAY CASE WHEN v_backlog THEN ARRAY[batch_size - batch_size / 4, batch_size] ELSE ARRAY[batch_size] END LOOP
        -- As many at a time as there is room for. Of an ordering key only the head may go, leased or not.
        LOOP
            v_open := v_room - cardinality(v_picked);
            EXIT WHEN v_open <= 0 OR v_from > coalesce(cardinality(v_candidates), 0);
            SELECT
                array_agg(locked.ctid),
                array_agg(DISTINCT locked.channel_name || ' ' || locked.channel_args) FILTER (WHERE v_backlog)
            INTO v_some, v_groups FROM (
                SELECT m.ctid, m.channel_name, m.channel_args FROM mq_msgs m
                WHERE m.ctid = ANY (v_candidates[v_from:v_from + v_open - 1])
                    AND m.state <= 0 AND m.attempt_at <= v_now AND NOT m.ctid = ANY (v_picked)
                    AND (m.seq IS NULL OR NOT EXISTS (
                        SELECT FROM mq_msgs ahead
                        WHERE ahead.channel_name = m.channel_name AND ahead.channel_args = m.channel_args
                            AND ahead.seq < m.seq
                    ))
                FOR UPDATE OF m SKIP LOCKED
            ) locked;
            v_picked := v_picked || coalesce(v_some, '{}');
            v_served := v_served || coalesce(v_groups, '{}');
            v_from := v_from + v_open;
        END LOOP;

        IF v_backlog AND cardinality(v_picked) < batch_size THEN
            -- A share for each group that is met, until the batch is full or enough groups were looked at.
            v_start := lpad(to_hex((random() * 65535)::int), 4, '0');
            <<channels>>
            FOR v_channel IN SELECT wanted.channel FROM unnest(v_channels) AS wanted(channel) ORDER BY random() LOOP
                v_cursor := v_start;
                v_wrapped := false;
                LOOP
                    EXIT channels WHEN cardinality(v_picked) >= batch_size OR v_visits >= batch_size;
                    SELECT m.channel_args, m.seq IS NOT NULL INTO v_group, v_ordered FROM mq_msgs m
                    WHERE m.channel_name = v_channel AND m.state = 0 AND m.channel_args > v_cursor
                    ORDER BY m.channel_args LIMIT 1;
                    IF NOT FOUND THEN
                        EXIT WHEN v_wrapped;
                        v_wrapped := true;
                        v_cursor := '';
                        CONTINUE;
                    END IF;
                    EXIT WHEN v_wrapped AND v_group > v_start;
                    v_cursor := v_group;
                    v_visits := v_visits + 1;
                    CONTINUE WHEN v_share < batch_size AND v_channel || ' ' || v_group = ANY (v_served);
                    IF v_ordered THEN
                        SELECT array_agg(locked.ctid) INTO v_some FROM (
                            SELECT m.ctid FROM mq_msgs m
                            WHERE m.id = (
                                SELECT head.id FROM mq_msgs head
                                WHERE head.channel_name = v_channel AND head.channel_args = v_group
                                    AND head.seq IS NOT NULL
                                ORDER BY head.seq LIMIT 1
                            ) AND m.state <= 0 AND m.attempt_at <= v_now AND NOT m.ctid = ANY (v_picked)
                            FOR UPDATE SKIP LOCKED
                        ) locked;
                    ELSE
                        -- A range of one group, sorted by it too: planned for an equality while there was one group, this would go by the
                        -- index by due time, and through everything once there were many.
                        SELECT array_agg(locked.ctid) INTO v_some FROM (
                            SELECT m.ctid FROM mq_msgs m
                            WHERE m.channel_name = v_channel AND m.channel_args >= v_group AND m.channel_args <= v_group
                                AND m.state = 0 AND m.attempt_at <= v_now AND NOT m.ctid = ANY (v_picked)
                            ORDER BY m.channel_args, m.attempt_at LIMIT least(v_share, batch_size - cardinality(v_picked))
                            FOR UPDATE SKIP LOCKED
                        ) locked;
                    END IF;
                    v_picked := v_picked || coalesce(v_some, '{}');
                END LOOP;
            END LOOP;
            v_share := batch_size;
        END IF;
    END LOOP;
    v_claimed := cardinality(v_picked);

    IF v_claimed < batch_size THEN
        -- No further than it matters: beyond there is what will be gone by then.
        SELECT min(upcoming.attempt_at) INTO v_next
        FROM unnest(v_channels) AS wanted(channel), LATERAL (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = wanted.channel AND m.state = 0 AND m.attempt_at > v_now AND m.attempt_at < v_now + c_wait_max
            ORDER BY m.attempt_at LIMIT 1
        ) upcoming;
        v_wait := least(greatest(coalesce(v_next - v_now, c_wait_max), c_wait_min), c_wait_max);
    ELSE
        v_wait := '0';
    END IF;

    IF v_claimed = 0 THEN
        RETURN QUERY SELECT NULL::uuid, NULL::boolean, NULL::text, NULL::text, NULL::bytea, NULL::interval, v_wait;
        RETURN;
    END IF;

    RETURN QUERY
    WITH claimed AS (
        UPDATE mq_msgs m
        -- What may have been sent and must not be sent again stays so until somebody has recorded it.
        SET attempt_at = v_now + v_lease, claim_no = m.claim_no + 1, attempts = m.attempts + 1,
            state = CASE WHEN m.state = 4 THEN 4 ELSE 1 END
        WHERE m.ctid = ANY (v_picked)
        RETURNING m.id, m.claim_no, m.attempts, m.created_at, m.deadline, m.state = 4 AS lost
    )
    SELECT
        c.id,
        true,
        -- The runner loses rows without a name; one without a payload has to reach the code that ends it.
        coalesce(p.name, ''),
        concat(
            '{"claim_no":', c.claim_no,
            ',"attempts":', c.attempts,
            ',"age_ms":', (extract(epoch FROM v_now - c.created_at) * 1000)::bigint,
            ',"deadline_ms":', coalesce((extract(epoch FROM c.deadline - v_now) * 1000)::bigint::text, 'null'),
            ',"lost":', c.lost::text,
            -- Whether more are due than this poll took.
            ',"more":', (v_claimed = batch_size)::text,
            ',"fetch_body":', CASE WHEN octet_length(p.body) > c_inline_body THEN 'true' ELSE 'false' END,
            ',"head":', coalesce(p.head, 'null'),
            '}'
        ),
        CASE WHEN octet_length(p.body) <= c_inline_body THEN p.body END,
        v_lease,
        v_wait
    FROM claimed c LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[c.id]);
END;
$$;

-- sqlxmq's remaining entry points, for tools that speak its language; `mq_insert` and `mq_clear` are further on.

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
    WHERE id = ANY (ARRAY(SELECT m.id FROM mq_msgs m WHERE m.id = ANY (msg_ids) ORDER BY m.id FOR UPDATE SKIP LOCKED))
        AND attempt_at < clock_timestamp() + duration;
$$;

CREATE FUNCTION mq_checkpoint(
    msg_id uuid, duration interval, new_payload_json text, new_payload_bytes bytea, extra_retries int
) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT mq_keep_alive(ARRAY[msg_id], duration);
    UPDATE mq_payloads
    SET head = coalesce(new_payload_json, head), body = coalesce(new_payload_bytes, body)
    WHERE id = msg_id;
$$;

-- Rows are committed by their transaction; there is no second phase.
CREATE FUNCTION mq_commit(msg_ids uuid[]) RETURNS void
LANGUAGE sql
AS $$ SELECT NULL::void $$;
