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
    -- - 5: behind, that is, waiting, and known not to be the first of its ordering key
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

-- Waiting requests: which are due, and when the next one will be. Requests behind others of their
-- ordering key are not in here, because polls would have to step over them: see `move_behind`.
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

-- Requests behind the first one of their ordering key.
CREATE INDEX mq_msgs_behind ON mq_msgs (channel_name, channel_args) WHERE state = 5;

-- Requests that are given up at a deadline.
CREATE INDEX mq_msgs_deadline ON mq_msgs (deadline) WHERE deadline IS NOT NULL;
-- Requests that a newer request may replace.
CREATE INDEX mq_msgs_supersede ON mq_msgs (channel_name, supersede_key)
    WHERE supersede_key IS NOT NULL;

CREATE SEQUENCE mq_seq;

-- Ordering keys whose first request was removed while the next one could not be looked at. Empty
-- most of the time. Without a constraint, so that an insert never waits.
CREATE TABLE mq_freed_keys (
    channel_name text COLLATE "C" NOT NULL,
    channel_args text COLLATE "C" NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX mq_freed_keys_channel ON mq_freed_keys (channel_name);

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

-- How requests leave and enter the index of what is due.
--
-- Requests are inserted as waiting. A poll that meets one behind the first request of its ordering
-- key moves it to state 5, and whatever removes the first request makes the next one waiting again.
-- No request is left in state 5 without one ahead of it, because:
--
-- - A poll moves requests only while it holds a lock on the first one of their key. A transaction
--   that removes that one waits for the poll, and then sees what the poll has moved.
-- - The next request is looked for by a statement that begins after the first one was deleted. A
--   request that is inserted too late to be found there can't be moved, because the poll can't lock
--   the deleted one.
-- - If the next request is locked, it may be about to be removed itself. Waiting for that lock
--   could take as long as a caller's transaction, so the key is noted in mq_freed_keys instead, and
--   later polls look at it until the lock is gone.

-- Moves those of these requests that wait and are not the first ones of their ordering keys to
-- state 5. Skips those that are locked. Returns how many it moved.
CREATE FUNCTION move_behind(p_rows tid[]) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_blocked tid[];
BEGIN
    SELECT array_agg(blocked.ctid) INTO v_blocked FROM (
        SELECT m.ctid
        FROM mq_msgs m, LATERAL (
            SELECT ahead.id FROM mq_msgs ahead
            WHERE ahead.channel_name = m.channel_name AND ahead.channel_args = m.channel_args
                AND ahead.seq IS NOT NULL
            ORDER BY ahead.seq LIMIT 1
        ) head JOIN mq_msgs first ON first.id = ANY (ARRAY[head.id])
        -- Not `first.seq < m.seq`, for which a plan might scan the index of all ordering keys.
        WHERE m.ctid = ANY (p_rows) AND m.state <= 0 AND first.id <> m.id
        FOR NO KEY UPDATE OF m SKIP LOCKED
        -- Conflicts with the removal of the first request, and not with its claim.
        FOR KEY SHARE OF first SKIP LOCKED
    ) blocked;
    UPDATE mq_msgs m SET state = 5 WHERE m.ctid = ANY (v_blocked);
    RETURN coalesce(cardinality(v_blocked), 0);
END;
$$;

-- Makes the request after a removed one of its ordering key claimable.
CREATE FUNCTION free_next() RETURNS trigger
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_next uuid;
    v_state smallint;
BEGIN
    -- At a higher isolation level, this statement could not see the newest requests. The setting
    -- `requeuest.free_later` keeps a caller's transaction from holding the lock of a request that
    -- the caller doesn't know of.
    IF current_setting('transaction_isolation') = 'read committed'
        AND coalesce(current_setting('requeuest.free_later', true), '') = ''
    THEN
        SELECT m.id INTO v_next FROM mq_msgs m
        WHERE m.channel_name = OLD.channel_name AND m.channel_args = OLD.channel_args
            AND m.seq > OLD.seq
        ORDER BY m.seq LIMIT 1;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
        SELECT m.state INTO v_state FROM mq_msgs m WHERE m.id = v_next
        FOR NO KEY UPDATE SKIP LOCKED;
        IF v_state <> 5 THEN
            RETURN NULL;
        END IF;
        IF v_state = 5 THEN
            UPDATE mq_msgs m SET state = 0 WHERE m.id = v_next;
            RETURN NULL;
        END IF;
    END IF;
    INSERT INTO mq_freed_keys (channel_name, channel_args)
    VALUES (OLD.channel_name, OLD.channel_args);
    RETURN NULL;
END;
$$;
CREATE TRIGGER mq_msgs_free_next AFTER DELETE ON mq_msgs
    FOR EACH ROW WHEN (OLD.seq IS NOT NULL) EXECUTE FUNCTION free_next();

-- Makes the first request of an ordering key claimable. Returns 1 if it wasn't, 0 if it was or if
-- there is none, and NULL if the request is locked.
CREATE FUNCTION free_first(p_channel text, p_group text) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_first uuid;
    v_state smallint;
BEGIN
    SELECT m.id INTO v_first FROM mq_msgs m
    WHERE m.channel_name = p_channel AND m.channel_args = p_group AND m.seq IS NOT NULL
    ORDER BY m.seq LIMIT 1;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    SELECT m.state INTO v_state FROM mq_msgs m WHERE m.id = v_first FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF v_state <> 5 THEN
        RETURN 0;
    END IF;
    UPDATE mq_msgs m SET state = 0 WHERE m.id = v_first;
    RETURN 1;
END;
$$;

-- Looks at up to p_limit of the noted keys.
CREATE FUNCTION free_noted(p_channels text[], p_limit int) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_noted record;
BEGIN
    FOR v_noted IN
        SELECT f.ctid, f.channel_name, f.channel_args FROM mq_freed_keys f
        WHERE p_channels IS NULL OR f.channel_name = ANY (p_channels)
        -- At random, so that keys whose requests stay locked don't keep the others from being
        -- looked at.
        ORDER BY random() LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        IF free_first(v_noted.channel_name, v_noted.channel_args) IS NOT NULL THEN
            DELETE FROM mq_freed_keys f WHERE f.ctid = v_noted.ctid;
        END IF;
    END LOOP;
END;
$$;

-- Looks for ordering keys whose first request is in state 5, among up to p_keys of them from a
-- random one on, and makes those requests claimable. There are none, unless rows were changed by
-- hand. Returns how many it found.
CREATE FUNCTION mend_behind(p_keys int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_start text := lpad(to_hex((random() * 65535)::int), 4, '0');
    v_left int := p_keys;
    v_looked int;
    v_channels text[];
    v_groups text[];
    v_mended int := 0;
BEGIN
    IF NOT EXISTS (SELECT FROM mq_msgs m WHERE m.state = 5) THEN
        RETURN 0;
    END IF;
    -- From the random start to the end, and then from the beginning.
    FOR pass IN 1..2 LOOP
        WITH RECURSIVE looked(number, key_group, channel, state) AS (
            SELECT 0, v_start COLLATE "C", '' COLLATE "C", 0::smallint
            UNION ALL
            SELECT l.number + 1, first.channel_args, first.channel_name, first.state
            FROM looked l, LATERAL (
                SELECT m.channel_args, m.channel_name, m.state FROM mq_msgs m
                WHERE m.seq IS NOT NULL
                    AND (m.channel_args, m.channel_name) > (l.key_group, l.channel)
                ORDER BY m.channel_args, m.channel_name, m.seq LIMIT 1
            ) first
            WHERE l.number < v_left
        )
        SELECT
            max(l.number), array_agg(l.channel) FILTER (WHERE stuck),
            array_agg(l.key_group) FILTER (WHERE stuck)
        INTO v_looked, v_channels, v_groups
        FROM looked l, LATERAL (
            SELECT l.state = 5 AND NOT EXISTS (
                SELECT FROM mq_freed_keys f
                WHERE f.channel_name = l.channel AND f.channel_args = l.key_group
            ) AS stuck
        ) checked;
        SELECT v_mended + coalesce(sum(free_first(k.channel, k.key_group)), 0) INTO v_mended
        FROM unnest(v_channels, v_groups) AS k(channel, key_group);
        v_left := v_left - v_looked;
        v_start := '';
    END LOOP;
    RETURN v_mended;
END;
$$;

-- Up to p_limit channels with waiting requests, in order: those after p_after, up to p_until or, if
-- it is NULL, to the last one.
CREATE FUNCTION waiting_channels(p_after text, p_until text, p_limit int) RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE waiting(number, channel) AS (
            SELECT 0, p_after COLLATE "C"
            UNION ALL
            SELECT w.number + 1, (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state = 0 AND m.channel_name > w.channel
                ORDER BY m.channel_name LIMIT 1
            )
            FROM waiting w
            WHERE w.number < p_limit AND w.channel IS NOT NULL
                AND (p_until IS NULL OR w.channel < p_until)
        )
        SELECT coalesce(array_agg(w.channel ORDER BY w.number), '{}')
        FROM waiting w
        WHERE w.number > 0 AND w.channel IS NOT NULL
            AND (p_until IS NULL OR w.channel <= p_until)
    );
END;
$$;

-- All channels with owned requests.
CREATE FUNCTION leased_channels() RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE leased(channel) AS (
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
        SELECT coalesce(array_agg(l.channel), '{}') FROM leased l WHERE l.channel IS NOT NULL
    );
END;
$$;

-- The requests that have been due for longest, up to p_limit of each channel. By ctid, for mq_poll.
CREATE FUNCTION due_rows(p_channels text[], p_now timestamptz, p_limit int) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN coalesce(array_agg(due.ctid ORDER BY due.attempt_at), '{}')
    FROM unnest(p_channels) AS wanted(channel), LATERAL (
        SELECT m.ctid, m.attempt_at FROM mq_msgs m
        WHERE m.channel_name = wanted.channel AND m.state = 0 AND m.attempt_at <= p_now
        ORDER BY m.attempt_at LIMIT p_limit
    ) due;
END;
$$;

-- The requests that fell due last, up to p_limit of each channel, the latest first.
CREATE FUNCTION latest_rows(p_channels text[], p_now timestamptz, p_limit int) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN coalesce(array_agg(due.ctid ORDER BY due.attempt_at DESC), '{}')
    FROM unnest(p_channels) AS wanted(channel), LATERAL (
        SELECT m.ctid, m.attempt_at FROM mq_msgs m
        WHERE m.channel_name = wanted.channel AND m.state = 0 AND m.attempt_at <= p_now
        ORDER BY m.attempt_at DESC LIMIT p_limit
    ) due;
END;
$$;

-- Claims up to batch_size due requests. The lease is the session's `requeuest.lease`.
--
-- Requests behind the first one of their ordering key are moved out of the way, a bounded number by
-- one poll: the rows it reads are then rows that it can claim.
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
    -- How many requests one poll moves out of the way at most, about 10 µs each, and how few may
    -- stay, because meeting them costs less than moving them.
    c_move_max CONSTANT int := 4096;
    v_move_min int := greatest(batch_size / 4, 16);
    v_channels text[] := channel_names;
    -- How many channels are looked at in one step, and how many rows of each.
    c_channels CONSTANT int := 64;
    v_limit int := v_window;
    v_more text[];
    v_until text;
    -- Rows by ctid, which saves another index lookup for each row. No other row can take over one
    -- of these ctids while the function runs, because its snapshot is older. A row that is updated
    -- meanwhile moves to a new ctid, and the next poll finds it there. A locked row keeps its ctid.
    v_candidates tid[] := '{}';
    v_backlog boolean;
    v_picked tid[] := '{}';
    -- Rows that were met behind the first request of their ordering key.
    v_blocked tid[] := '{}';
    v_met tid[];
    v_moving int;
    v_moved int := 0;
    v_step int;
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
    IF EXISTS (SELECT FROM mq_freed_keys) THEN
        PERFORM free_noted(channel_names, batch_size);
    END IF;

    IF channel_names IS NULL THEN
        -- Goes through the channels until the window is full, from where this session's last poll
        -- left off. Each channel has an equal share of the window, and more if others need less.
        v_start := coalesce(current_setting('requeuest.polled', true), '');
        v_cursor := v_start;
        v_channels := '{}';
        LOOP
            v_more := waiting_channels(v_cursor, v_until, c_channels);
            v_limit := ceil(v_window::float8 / greatest(cardinality(v_more), 1));
            LOOP
                v_met := due_rows(v_more, v_now, v_limit);
                EXIT WHEN cardinality(v_candidates) + cardinality(v_met) >= v_window
                    OR cardinality(v_met) < v_limit OR v_limit >= v_window;
                v_limit := least(4 * v_limit, v_window);
            END LOOP;
            v_channels := v_channels || v_more;
            v_candidates := v_candidates || v_met;
            EXIT WHEN cardinality(v_candidates) >= v_window;
            IF cardinality(v_more) = c_channels THEN
                v_cursor := v_more[c_channels];
            ELSE
                EXIT WHEN v_start = '' OR v_until IS NOT NULL;
                v_cursor := '';
                v_until := v_start;
            END IF;
        END LOOP;
        PERFORM set_config(
            'requeuest.polled', coalesce(v_channels[cardinality(v_channels)], ''), false
        );
    ELSE
        v_candidates := due_rows(v_channels, v_now, v_limit);
    END IF;
    v_backlog := cardinality(v_candidates) >= v_window;

    -- The session setting `requeuest.looked` holds the time of the last look for expired leases.
    IF NOT v_backlog
        OR coalesce(nullif(current_setting('requeuest.looked', true), ''), '-infinity')::timestamptz
            < v_now - c_wait_max
    THEN
        PERFORM set_config('requeuest.looked', v_now::text, false);
        SELECT array_agg(locked.ctid) INTO v_some FROM (
            SELECT m.ctid
            FROM unnest(coalesce(channel_names, leased_channels())) AS wanted(channel), LATERAL (
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = wanted.channel AND l.state IN (1, 2, 4)
                    AND l.attempt_at <= v_now
                ORDER BY l.attempt_at LIMIT batch_size
            ) lapsed JOIN mq_msgs m ON m.id = ANY (ARRAY[lapsed.id])
            WHERE m.state NOT IN (0, 3, 5) AND m.attempt_at <= v_now
            LIMIT batch_size FOR NO KEY UPDATE OF m SKIP LOCKED
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
            EXIT WHEN v_open <= 0;
            IF v_from > cardinality(v_candidates) THEN
                -- Moves what blocks the view, and looks at what comes after. If that is too much
                -- for one poll, looks at what came last, so that new requests don't wait for the
                -- rest.
                EXIT WHEN NOT v_backlog OR v_moved >= c_move_max OR cardinality(v_blocked) = 0;
                v_moving := move_behind(v_blocked);
                EXIT WHEN v_moving = 0;
                v_moved := v_moved + v_moving;
                v_blocked := '{}';
                IF v_moved < c_move_max THEN
                    v_candidates := due_rows(v_channels, v_now, v_limit);
                    v_backlog := cardinality(v_candidates) >= v_window;
                ELSE
                    v_candidates := latest_rows(v_channels, v_now, batch_size);
                END IF;
                v_from := 1;
                CONTINUE;
            END IF;
            -- Fewer and larger steps where rows are blocked, or the last ones would be single rows.
            v_step := CASE WHEN v_blocked = '{}' THEN v_open ELSE greatest(v_open, 64) END;
            v_met := v_candidates[v_from:v_from + v_step - 1];
            SELECT
                array_agg(locked.ctid),
                array_agg(DISTINCT locked.channel_name || ' ' || locked.channel_args)
                    FILTER (WHERE v_backlog)
            INTO v_some, v_groups FROM (
                SELECT m.ctid, m.channel_name, m.channel_args FROM mq_msgs m
                WHERE m.ctid = ANY (v_met)
                    AND m.state <= 0 AND m.attempt_at <= v_now AND NOT m.ctid = ANY (v_picked)
                    AND (m.seq IS NULL OR NOT EXISTS (
                        SELECT FROM mq_msgs ahead
                        WHERE ahead.channel_name = m.channel_name
                            AND ahead.channel_args = m.channel_args AND ahead.seq < m.seq
                    ))
                FOR NO KEY UPDATE OF m SKIP LOCKED
            ) locked;
            v_picked := v_picked || coalesce(v_some[1:v_open], '{}');
            v_served := v_served || coalesce(v_groups, '{}');
            v_from := v_from + v_step;
            -- Notes which of the others are behind the first one of their key, without a lock.
            -- Written so that no plan scans the index of all ordering keys.
            CONTINUE WHEN cardinality(v_some) = cardinality(v_met);
            SELECT v_blocked || coalesce(array_agg(m.ctid), '{}') INTO v_blocked FROM mq_msgs m
            WHERE m.ctid = ANY (v_met) AND m.state <= 0 AND coalesce(m.seq, 0) > 0
                AND NOT m.ctid = ANY (v_picked)
                AND EXISTS (
                    SELECT FROM mq_msgs ahead
                    WHERE ahead.channel_name = m.channel_name
                        AND ahead.channel_args = m.channel_args AND ahead.seq < m.seq
                    OFFSET 0
                );
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
                            FOR NO KEY UPDATE SKIP LOCKED
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
                            FOR NO KEY UPDATE SKIP LOCKED
                        ) locked;
                    END IF;
                    v_picked := v_picked || coalesce(v_some, '{}');
                END LOOP;
            END LOOP;
            v_share := batch_size;
        END IF;
    END LOOP;
    v_claimed := cardinality(v_picked);
    IF cardinality(v_blocked) >= v_move_min THEN
        v_moved := v_moved + move_behind(v_blocked);
    END IF;

    IF v_claimed = batch_size THEN
        v_wait := '0';
    ELSIF v_moved >= c_move_max THEN
        v_wait := c_wait_min;
    ELSE
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
            ',"more":', (v_claimed = batch_size OR v_moved >= c_move_max)::text,
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
