-- The queue that sqlxmq's runner drives. Names and signatures are sqlxmq 0.6's; columns and bodies
-- are requeuest's.
--
-- Functions carry the search_path of their installation, so they work from any connection and never
-- touch a sqlxmq that lives in another schema.
--
-- Lookups are written `id = ANY (ARRAY[x.id])` rather than `id = x.id`, with `state <= 0` rather
-- than `state = 0` beside them. Statistics taken while the queue is empty make the planner expect
-- no rows, and a cached plan may then scan a whole index per row. These forms allow no such plan:
-- `= ANY` can't merge-join two sorted indexes, and no partial index has the condition `state <= 0`.
-- For the same reason, OFFSET 0 makes an EXISTS look up its rows one by one.

-- Hot and narrow: only unfinished requests. No foreign key points here, because each delete would
-- have to look for referrers.
CREATE TABLE mq_msgs (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    -- The group: `hhhh|o|key` for an ordering key that all channels share, `hhhh|c|key` for an
    -- ordering key within one channel, `hhhh|d|origin` otherwise. hhhh is a hash that spreads the
    -- groups.
    channel_args text COLLATE "C" NOT NULL,
    -- When the next attempt is due; while an attempt is under way, the end of its lease.
    attempt_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Position among the requests of an ordering key, in commit order.
    seq bigint,
    -- The instance that waits for the outcome; nil if several instances wait.
    waiter uuid,
    -- The only fence: rises with every change of owner.
    claim_no int NOT NULL DEFAULT 0,
    -- Transmissions begun.
    attempts int NOT NULL DEFAULT 0,
    -- - 0: waiting
    -- - 1: claimed
    -- - 2: held for the next attempt by the process that made the last one
    -- - 3: halted, that is, ended without success and holding up its ordering key
    -- - 4: being sent, and not to be sent again
    state smallint NOT NULL DEFAULT 0,
    -- When the request is given up, whether or not it has been sent.
    deadline timestamptz,
    -- A newer request with the same supersede key replaces this request if this one is still
    -- unsent.
    supersede_key text COLLATE "C",
    -- If the request ends without success, it halts its ordering key.
    halts boolean NOT NULL DEFAULT false
) WITH (
    fillfactor = 70,
    -- The table is small and all of its rows change, so thresholds relative to its size mean
    -- nothing.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);

-- Waiting requests: which are due, and when the next one will be.
CREATE INDEX mq_msgs_due ON mq_msgs (channel_name, attempt_at) WHERE state = 0;
-- For skipping from group to group, and for finding the due requests of one group.
CREATE INDEX mq_msgs_groups ON mq_msgs (channel_name, channel_args, attempt_at) WHERE state = 0;
-- Owned requests whose lease has run out. This index is separate because most requests are inserted
-- with a lease and are gone long before it ends. Polls for waiting requests must not step over the
-- entries that such requests leave behind until the next vacuum.
CREATE INDEX mq_msgs_leases ON mq_msgs (channel_name, attempt_at) WHERE state IN (1, 2, 4);
-- The head of an ordering key, and whether another channel has the key.
CREATE UNIQUE INDEX mq_msgs_order ON mq_msgs (channel_args, channel_name, seq)
    WHERE seq IS NOT NULL;

-- Requests that are given up at a deadline.
CREATE INDEX mq_msgs_deadline ON mq_msgs (deadline) WHERE deadline IS NOT NULL;
-- Requests that a newer request may replace.
CREATE INDEX mq_msgs_supersede ON mq_msgs (channel_name, supersede_key)
    WHERE supersede_key IS NOT NULL;

CREATE SEQUENCE mq_seq;

-- The content of requests. Read once per attempt, so it is kept out of the hot table.
CREATE TABLE mq_payloads (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    head text NOT NULL,
    -- NULL means no body, which HTTP distinguishes from an empty body.
    body bytea,
    -- What the application attached to the request.
    metadata json,
    -- The last response that was not final. The caller gets it if no better response arrives.
    response_status smallint,
    response_head text,
    response_body bytea
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
-- Most bodies don't compress well. An uncompressed body can be measured and cut without being read.
ALTER TABLE mq_payloads ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE mq_payloads ALTER COLUMN response_body SET STORAGE EXTERNAL;

-- Claims up to batch_size due requests. The lease is the session's `requeuest.lease`.
--
-- The cost doesn't grow with the backlog. A poll reads a bounded number of due rows by due time. If
-- more are due, it also skips from group to group from a random start, so that one destination's
-- backlog can't hide the others. During a backlog, a session looks for expired leases at most once
-- a second; without a backlog, every poll looks.
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
-- Without this, a search within one group may read and sort everything that is due, if the
-- statistics say that little is due.
SET enable_sort = off
AS $$
#variable_conflict use_column
DECLARE
    c_wait_min CONSTANT interval := '50 milliseconds';
    -- An upper bound, so that a row whose notification was lost is still found.
    c_wait_max CONSTANT interval := '1 second';
    -- Attempts fetch larger bodies themselves, under a memory budget.
    c_inline_body CONSTANT int := 65536;
    v_now timestamptz := clock_timestamp();
    v_lease interval :=
        coalesce(nullif(current_setting('requeuest.lease', true), ''), '15 seconds')::interval;
    v_window int := 4 * batch_size;
    v_channels text[] := channel_names;
    -- Rows by ctid, which saves another index lookup for each row. No other row can take over one
    -- of these ctids while the function runs, because its snapshot is older. A row that is updated
    -- meanwhile moves to a new ctid, and the next poll finds it there. A locked row keeps its ctid.
    v_candidates tid[];
    v_backlog boolean;
    v_picked tid[] := '{}';
    v_some tid[];
    -- Groups with rows picked by age: in one step, and in all steps so far.
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
                WHERE m.state = 0 AND m.channel_name > waiting.channel
                ORDER BY m.channel_name LIMIT 1
            )
            FROM waiting WHERE waiting.channel IS NOT NULL
        ), leased(channel) AS (
            (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state IN (1, 2, 4) ORDER BY m.channel_name LIMIT 1
            )
            UNION ALL
            SELECT (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state IN (1, 2, 4) AND m.channel_name > leased.channel
                ORDER BY m.channel_name LIMIT 1
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

    -- The session setting `requeuest.looked` holds the time of the last look for expired leases.
    IF NOT v_backlog
        OR coalesce(nullif(current_setting('requeuest.looked', true), ''), '-infinity')::timestamptz
            < v_now - c_wait_max
    THEN
        PERFORM set_config('requeuest.looked', v_now::text, false);
        SELECT array_agg(locked.ctid) INTO v_some FROM (
            SELECT m.ctid
            FROM unnest(v_channels) AS wanted(channel), LATERAL (
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = wanted.channel AND l.state IN (1, 2, 4)
                    AND l.attempt_at <= v_now
                ORDER BY l.attempt_at LIMIT batch_size
            ) lapsed JOIN mq_msgs m ON m.id = ANY (ARRAY[lapsed.id])
            WHERE m.state NOT IN (0, 3) AND m.attempt_at <= v_now
            LIMIT batch_size FOR UPDATE OF m SKIP LOCKED
        ) locked;
        v_picked := coalesce(v_some, '{}');
    END IF;

    -- If few are due, all are picked by age. During a backlog, a quarter of the batch goes group by
    -- group to groups with no row picked by age, so that no destination waits behind everything
    -- that came earlier for another destination. The share is no larger because the oldest rows lie
    -- side by side on disk, and the rows of one group don't. There may still be room after that,
    -- because there are few groups or because other polls took the oldest rows. A second pass fills
    -- it in the same order, without the limit per group.
    FOREACH v_room IN ARRAY CASE
        WHEN v_backlog THEN ARRAY[batch_size - batch_size / 4, batch_size]
        ELSE ARRAY[batch_size]
    END LOOP
        -- Each step takes as many rows as there is room for. Only the head of an ordering key may
        -- go; a leased head still holds back the rest.
        LOOP
            v_open := v_room - cardinality(v_picked);
            EXIT WHEN v_open <= 0 OR v_from > coalesce(cardinality(v_candidates), 0);
            SELECT
                array_agg(locked.ctid),
                array_agg(DISTINCT locked.channel_name || ' ' || locked.channel_args)
                    FILTER (WHERE v_backlog)
            INTO v_some, v_groups FROM (
                SELECT m.ctid, m.channel_name, m.channel_args FROM mq_msgs m
                WHERE m.ctid = ANY (v_candidates[v_from:v_from + v_open - 1])
                    AND m.state <= 0 AND m.attempt_at <= v_now AND NOT m.ctid = ANY (v_picked)
                    AND (m.seq IS NULL OR NOT EXISTS (
                        SELECT FROM mq_msgs ahead
                        WHERE ahead.channel_name = m.channel_name
                            AND ahead.channel_args = m.channel_args AND ahead.seq < m.seq
                    ))
                FOR UPDATE OF m SKIP LOCKED
            ) locked;
            v_picked := v_picked || coalesce(v_some, '{}');
            v_served := v_served || coalesce(v_groups, '{}');
            v_from := v_from + v_open;
        END LOOP;

        IF v_backlog AND cardinality(v_picked) < batch_size THEN
            -- A share for each group found, until the batch is full or enough groups were visited.
            v_start := lpad(to_hex((random() * 65535)::int), 4, '0');
            <<channels>>
            FOR v_channel IN
                SELECT wanted.channel FROM unnest(v_channels) AS wanted(channel) ORDER BY random()
            LOOP
                v_cursor := v_start;
                v_wrapped := false;
                LOOP
                    EXIT channels
                        WHEN cardinality(v_picked) >= batch_size OR v_visits >= batch_size;
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
                    CONTINUE
                        WHEN v_share < batch_size AND v_channel || ' ' || v_group = ANY (v_served);
                    IF v_ordered THEN
                        SELECT array_agg(locked.ctid) INTO v_some FROM (
                            SELECT m.ctid FROM mq_msgs m
                            WHERE m.id = (
                                SELECT head.id FROM mq_msgs head
                                WHERE head.channel_name = v_channel AND head.channel_args = v_group
                                    AND head.seq IS NOT NULL
                                ORDER BY head.seq LIMIT 1
                            ) AND m.state <= 0 AND m.attempt_at <= v_now
                                AND NOT m.ctid = ANY (v_picked)
                            FOR UPDATE SKIP LOCKED
                        ) locked;
                    ELSE
                        -- A range over a single group, sorted by the group as well. With an
                        -- equality, a plan made while there was one group would use the index by
                        -- due time, and would read all of it once there are many groups.
                        SELECT array_agg(locked.ctid) INTO v_some FROM (
                            SELECT m.ctid FROM mq_msgs m
                            WHERE m.channel_name = v_channel
                                AND m.channel_args >= v_group AND m.channel_args <= v_group
                                AND m.state = 0 AND m.attempt_at <= v_now
                                AND NOT m.ctid = ANY (v_picked)
                            ORDER BY m.channel_args, m.attempt_at
                            LIMIT least(v_share, batch_size - cardinality(v_picked))
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
        -- Looks no further ahead than the longest wait. A later row doesn't change the wait, and
        -- may be gone by the time it is due.
        SELECT min(upcoming.attempt_at) INTO v_next
        FROM unnest(v_channels) AS wanted(channel), LATERAL (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = wanted.channel AND m.state = 0
                AND m.attempt_at > v_now AND m.attempt_at < v_now + c_wait_max
            ORDER BY m.attempt_at LIMIT 1
        ) upcoming;
        v_wait := least(greatest(coalesce(v_next - v_now, c_wait_max), c_wait_min), c_wait_max);
    ELSE
        v_wait := '0';
    END IF;

    IF v_claimed = 0 THEN
        RETURN QUERY SELECT
            NULL::uuid, NULL::boolean, NULL::text, NULL::text, NULL::bytea, NULL::interval, v_wait;
        RETURN;
    END IF;

    RETURN QUERY
    WITH claimed AS (
        UPDATE mq_msgs m
        -- A request that may have been sent and must not be sent again keeps state 4 until its
        -- outcome is recorded.
        SET attempt_at = v_now + v_lease, claim_no = m.claim_no + 1, attempts = m.attempts + 1,
            state = CASE WHEN m.state = 4 THEN 4 ELSE 1 END
        WHERE m.ctid = ANY (v_picked)
        RETURNING
            m.id, m.channel_name, m.claim_no, m.attempts, m.created_at, m.deadline,
            m.state = 4 AS lost
    )
    SELECT
        c.id,
        true,
        -- sqlxmq's runner drops rows without a name. A row without a payload must reach the code
        -- that ends it.
        coalesce(p.name, ''),
        concat(
            '{"claim_no":', c.claim_no,
            ',"attempts":', c.attempts,
            ',"age_ms":', (extract(epoch FROM v_now - c.created_at) * 1000)::bigint,
            ',"deadline_ms":',
            coalesce((extract(epoch FROM c.deadline - v_now) * 1000)::bigint::text, 'null'),
            ',"lost":', c.lost::text,
            -- Whether more requests may be due than this poll took.
            ',"more":', (v_claimed = batch_size)::text,
            ',"fetch_body":',
            CASE WHEN octet_length(p.body) > c_inline_body THEN 'true' ELSE 'false' END,
            ',"channel":', to_json(c.channel_name),
            ',"head":', coalesce(p.head, 'null'),
            ',"metadata":' || p.metadata::text,
            '}'
        ),
        CASE WHEN octet_length(p.body) <= c_inline_body THEN p.body END,
        v_lease,
        v_wait
    FROM claimed c LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[c.id]);
END;
$$;

-- sqlxmq's remaining entry points, for tools that call its functions. `mq_insert` and `mq_clear`
-- come in a later migration.

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
