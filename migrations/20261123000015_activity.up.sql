-- How much the fleet does: what its processes have counted, by time and channel.
--
-- Approximate on purpose. A process adds its counts every ten seconds, to the minute in which it
-- adds them, and one that dies loses the last ten seconds of its counts.

CREATE TABLE activity (
    -- How many minutes a row covers: 1 or 10. A day in steps of a minute would be too many rows for
    -- one read.
    minutes smallint NOT NULL,
    began_at timestamptz NOT NULL,
    -- Empty: further channels, together. No channel has an empty name.
    channel_name text COLLATE "C" NOT NULL,
    enqueued bigint NOT NULL,
    attempts bigint NOT NULL,
    failed_attempts bigint NOT NULL,
    completed bigint NOT NULL,
    discarded bigint NOT NULL,
    cancelled bigint NOT NULL,
    ambiguous bigint NOT NULL,
    -- How many requests took up to 1 ms, 2 ms, 4 ms and so on from their enqueue to their outcome.
    -- The last number is of those that took longer than all limits.
    latency bigint[] NOT NULL,
    PRIMARY KEY (minutes, began_at, channel_name)
) WITH (
    -- The rows of the last minutes are updated again and again.
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

-- Adds what a process has counted. A number for each channel in each array, and 28 in the last one.
--
-- With the rights of the owner: processes that only enqueue count as well. Such a role can add
-- numbers that are wrong, so each is bounded, and so is the number of channels.
CREATE FUNCTION note_activity(
    p_channels text[],
    p_enqueued bigint[],
    p_attempts bigint[],
    p_failed_attempts bigint[],
    p_completed bigint[],
    p_discarded bigint[],
    p_cancelled bigint[],
    p_ambiguous bigint[],
    p_latency bigint[]
) RETURNS void
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    c_buckets CONSTANT int := 28;
    -- Of each period. Further ones are counted together.
    c_channels CONSTANT int := 100;
    c_max_channel_len CONSTANT int := 55;
    c_most CONSTANT bigint := 1000000000;
    v_now timestamptz := clock_timestamp();
BEGIN
    -- In the order of the key, so that two processes can't deadlock.
    INSERT INTO activity AS a (
        minutes, began_at, channel_name, enqueued, attempts, failed_attempts, completed, discarded,
        cancelled, ambiguous, latency
    )
    WITH input AS MATERIALIZED (
        SELECT
            p.minutes, i.name, i.number,
            date_bin(p.minutes * interval '1 minute', v_now, '2000-01-01 UTC') AS began_at
        FROM (VALUES (1::smallint), (10::smallint)) AS p(minutes),
            unnest(p_channels[:c_channels + 1]) WITH ORDINALITY AS i(name, number)
    ), known AS MATERIALIZED (
        SELECT
            i.*,
            coalesce(octet_length(i.name), 0) NOT BETWEEN 1 AND c_max_channel_len AS is_other,
            EXISTS (
                SELECT FROM activity a
                WHERE a.minutes = i.minutes AND a.began_at = i.began_at AND a.channel_name = i.name
                OFFSET 0
            ) AS is_known,
            (
                SELECT count(*) FROM activity a
                WHERE a.minutes = i.minutes AND a.began_at = i.began_at AND a.channel_name <> ''
            ) AS others
        FROM input i
    ), capped AS MATERIALIZED (
        SELECT
            k.minutes, k.began_at, k.number,
            CASE
                WHEN k.is_other THEN ''
                WHEN k.is_known OR k.others + row_number() OVER (
                    PARTITION BY k.minutes, k.is_other, k.is_known ORDER BY k.number
                ) <= c_channels THEN k.name
                ELSE ''
            END COLLATE "C" AS name
        FROM known k
    ), grouped AS MATERIALIZED (
        SELECT c.minutes, c.began_at, c.name, array_agg(c.number) AS numbers
        FROM capped c GROUP BY c.minutes, c.began_at, c.name
    )
    SELECT
        g.minutes, g.began_at, g.name, s.enqueued, s.attempts, s.failed_attempts, s.completed,
        s.discarded, s.cancelled, s.ambiguous,
        ARRAY(
            SELECT sum(least(greatest(coalesce(
                p_latency[(n.number - 1) * c_buckets + b.bucket], 0
            ), 0), c_most))::bigint
            FROM generate_series(1, c_buckets) AS b(bucket), unnest(g.numbers) AS n(number)
            GROUP BY b.bucket ORDER BY b.bucket
        )
    FROM grouped g, LATERAL (
        SELECT
            sum(least(greatest(p_enqueued[n.number], 0), c_most))::bigint AS enqueued,
            sum(least(greatest(p_attempts[n.number], 0), c_most))::bigint AS attempts,
            sum(least(greatest(p_failed_attempts[n.number], 0), c_most))::bigint AS failed_attempts,
            sum(least(greatest(p_completed[n.number], 0), c_most))::bigint AS completed,
            sum(least(greatest(p_discarded[n.number], 0), c_most))::bigint AS discarded,
            sum(least(greatest(p_cancelled[n.number], 0), c_most))::bigint AS cancelled,
            sum(least(greatest(p_ambiguous[n.number], 0), c_most))::bigint AS ambiguous
        FROM unnest(g.numbers) AS n(number)
    ) s
    ORDER BY g.minutes, g.name
    ON CONFLICT (minutes, began_at, channel_name) DO UPDATE SET
        enqueued = a.enqueued + excluded.enqueued,
        attempts = a.attempts + excluded.attempts,
        failed_attempts = a.failed_attempts + excluded.failed_attempts,
        completed = a.completed + excluded.completed,
        discarded = a.discarded + excluded.discarded,
        cancelled = a.cancelled + excluded.cancelled,
        ambiguous = a.ambiguous + excluded.ambiguous,
        latency = ARRAY(
            SELECT coalesce(a.latency[b.bucket], 0) + excluded.latency[b.bucket]
            FROM generate_series(1, c_buckets) AS b(bucket) ORDER BY b.bucket
        );
END;
$$;

-- The handle that measures the queue for the metrics of all processes.
CREATE TABLE queue_observer (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    instance uuid NOT NULL,
    expires_at timestamptz NOT NULL
);

-- How many requests there are in which state: exact up to 10,000, and no more than a few times as
-- many index entries are read. Kinds are the states of mq_state, except that waiting requests are
-- `due`, with a row for each channel, format and priority, or `scheduled`. `dead_letters` are
-- counted too, and `expired` has the age of the oldest outcome that has outlived its retention.
--
-- Statistics of an empty queue would let the planner read whole tables, or a whole index for its
-- first rows. So each count is ordered as the index that it must read, and nothing is sorted.
CREATE FUNCTION queue_depth()
RETURNS TABLE (kind text, channel text, number bigint, oldest_ms bigint)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_sort = off
AS $$
DECLARE
    c_most CONSTANT bigint := 10001;
    -- Channels with requests beyond the bound are still looked at: so many of their requests.
    c_least CONSTANT bigint := 101;
    c_combinations CONSTANT int := 300;
    v_now timestamptz := clock_timestamp();
    v_due bigint := 0;
    v_scheduled bigint := 0;
    v_number bigint;
    v_state mq_state;
    v record;
BEGIN
    SELECT '' AS channel_name, '-32768'::smallint AS format, 'high'::mq_priority AS priority,
        v_now AS attempt_at INTO v;
    FOR v_step IN 1..c_combinations LOOP
        SELECT m.channel_name, m.format, m.priority, m.attempt_at INTO v
        FROM mq_msgs m
        WHERE m.state = 'waiting'
            AND (m.channel_name, m.format, m.priority) > (v.channel_name, v.format, v.priority)
        ORDER BY m.channel_name, m.format, m.priority, m.attempt_at LIMIT 1;
        EXIT WHEN NOT FOUND;
        SELECT count(*) INTO v_number FROM (
            SELECT FROM mq_msgs m
            WHERE m.state = 'waiting' AND m.channel_name = v.channel_name
                AND m.format = v.format AND m.priority = v.priority AND m.attempt_at <= v_now
            ORDER BY m.attempt_at LIMIT greatest(c_most - v_due, c_least)
        ) due;
        IF v_number > 0 THEN
            v_due := v_due + v_number;
            RETURN QUERY SELECT 'due', v.channel_name::text, v_number, CASE
                WHEN isfinite(v.attempt_at)
                THEN (extract(epoch FROM v_now - v.attempt_at) * 1000)::bigint
            END;
        END IF;
        SELECT count(*) INTO v_number FROM (
            SELECT FROM mq_msgs m
            WHERE m.state = 'waiting' AND m.channel_name = v.channel_name
                AND m.format = v.format AND m.priority = v.priority AND m.attempt_at > v_now
            ORDER BY m.attempt_at LIMIT greatest(c_most - v_scheduled, 0)
        ) scheduled;
        v_scheduled := v_scheduled + v_number;
    END LOOP;
    RETURN QUERY SELECT 'scheduled', NULL::text, v_scheduled, NULL::bigint;
    RETURN QUERY
    SELECT o.state::text, NULL::text, count(*), NULL::bigint FROM (
        SELECT m.state FROM mq_msgs m WHERE m.state IN ('claimed', 'held', 'sending_once')
        ORDER BY m.channel_name, m.format, m.attempt_at LIMIT c_most
    ) o GROUP BY o.state;
    FOREACH v_state IN ARRAY ARRAY['behind', 'deferred', 'parked', 'halted']::mq_state[] LOOP
        SELECT count(*) INTO v_number FROM (
            SELECT FROM mq_msgs m
            WHERE m.state = v_state AND m.state IN ('behind', 'deferred', 'parked', 'halted')
            ORDER BY m.channel_name, m.format, m.attempt_at LIMIT c_most
        ) aside;
        RETURN QUERY SELECT v_state::text, NULL::text, v_number, NULL::bigint;
    END LOOP;
    SELECT count(*) INTO v_number FROM (
        SELECT FROM outcomes_kept o ORDER BY o.status, o.format, o.finished_at, o.id LIMIT c_most
    ) dead_letters;
    RETURN QUERY SELECT 'dead_letters', NULL::text, v_number, NULL::bigint;
    RETURN QUERY
    SELECT 'expired', NULL::text, 1::bigint,
        (extract(epoch FROM v_now - e.expires_at) * 1000)::bigint
    FROM (
        SELECT o.expires_at FROM outcomes o WHERE o.expires_at IS NOT NULL
        ORDER BY o.expires_at LIMIT 1
    ) e
    WHERE e.expires_at < v_now AND isfinite(e.expires_at);
END;
$$;
