-- What a sweep does: pruning of outcomes, and requests that no runner delivers.
--
-- A slot is truncated once all of its rows have expired. Rows that wait for a handler are
-- moved out first. Where a slot can't be truncated, its expired rows are deleted: because of rows
-- of a longer retention, or a transaction that has read the slot and doesn't end, or a role without
-- the right to truncate. Each step is a statement of its own, and holds locks for a short time.
--
-- Statements get the time as a parameter. With clock_timestamp(), which is volatile, they would
-- read whole indexes.

-- The slots of the ring that have expired rows. `live`: the slot has other rows too. `overdue`: a
-- row should have gone by now, because its slot of the ring was full long ago.
CREATE FUNCTION expired_slots() RETURNS TABLE (slot int, live boolean, overdue boolean)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_expired timestamptz;
    v_retention interval;
BEGIN
    FOR v_slot IN 0..15 LOOP
        EXECUTE format(
            'SELECT
                o.expires_at,
                CASE WHEN isfinite(o.expires_at) AND isfinite(o.finished_at)
                    THEN o.expires_at - o.finished_at ELSE ''0'' END
             FROM outcomes_%s o
             WHERE o.expires_at <= $1 ORDER BY o.expires_at LIMIT 1', v_slot
        ) INTO v_expired, v_retention USING v_now;
        CONTINUE WHEN v_expired IS NULL;
        slot := v_slot;
        overdue := v_expired + v_retention / 10 < v_now;
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM outcomes_%s WHERE expires_at > $1)', v_slot
        ) INTO live USING v_now;
        RETURN NEXT;
    END LOOP;
END;
$$;

-- Moves expired outcomes that wait for a handler out of a slot. Those of channels that have no
-- handler any more don't wait. Returns how many it moved, up to p_limit.
CREATE FUNCTION move_unhandled(p_slot int, p_limit int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_ids uuid[];
    v_outcome outcomes%ROWTYPE;
BEGIN
    -- A settle that raced with the end of a subscription left these.
    DELETE FROM unhandled d WHERE d.id = ANY (ARRAY(
        SELECT u.id FROM unhandled u
        WHERE u.slot = p_slot AND NOT EXISTS (
            SELECT FROM handled_channels h WHERE h.channel_name = u.channel_name
        )
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    ));
    EXECUTE format(
        'SELECT array_agg(late.id) FROM (
            SELECT u.id FROM unhandled u
            WHERE u.slot = $1 AND EXISTS (
                SELECT FROM outcomes_%s o
                WHERE o.id = u.id AND o.expires_at <= statement_timestamp() OFFSET 0
            )
            LIMIT $2
         ) late', p_slot
    ) INTO v_ids USING p_slot, p_limit;
    FOR v_outcome IN EXECUTE format(
        'DELETE FROM outcomes_%s o WHERE o.id = ANY ($1) RETURNING o.*', p_slot
    ) USING v_ids LOOP
        v_outcome.slot := -2;
        INSERT INTO outcomes_late SELECT v_outcome.*;
    END LOOP;
    -- A row that a handler has at this moment is left alone; only its outcome is moved.
    UPDATE unhandled u SET slot = -2 WHERE u.id = ANY (ARRAY(
        SELECT w.id FROM unhandled w WHERE w.id = ANY (v_ids) FOR UPDATE SKIP LOCKED
    ));
    RETURN coalesce(cardinality(v_ids), 0);
END;
$$;

-- Truncates a slot whose rows have all expired. Returns:
--
-- - `emptied`
-- - `live`: nothing was done, because a row has not expired or waits for a handler.
-- - `locked`: nothing was done, because a transaction has used the slot and has not ended.
-- - `denied`: nothing was done, because the role may not truncate the slot.
CREATE FUNCTION empty_slot(p_slot int) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- While this waits for a lock, every session that needs the slot waits behind it.
SET lock_timeout = '50ms'
AS $$
DECLARE
    v_live boolean;
BEGIN
    IF NOT has_table_privilege(format('outcomes_%s', p_slot)::regclass, 'TRUNCATE') THEN
        RETURN 'denied';
    END IF;
    -- One process at a time; the others need not wait.
    IF NOT pg_try_advisory_xact_lock(
        hashtextextended(concat_ws('/', 'requeuest', current_schema(), 'prune'), 0)
    ) THEN
        RETURN 'locked';
    END IF;
    BEGIN
        EXECUTE format('LOCK TABLE outcomes_%s IN ACCESS EXCLUSIVE MODE', p_slot);
    EXCEPTION WHEN lock_not_available THEN
        RETURN 'locked';
    END;
    -- Rows may have come before the lock was taken. Both checks read indexes only.
    EXECUTE format(
        'SELECT EXISTS (SELECT FROM outcomes_%1$s WHERE expires_at > $2)
            OR EXISTS (
                SELECT FROM unhandled u
                WHERE u.slot = $1
                    AND EXISTS (SELECT FROM outcomes_%1$s o WHERE o.id = u.id OFFSET 0)
            )', p_slot
    ) INTO v_live USING p_slot, clock_timestamp();
    IF v_live THEN
        RETURN 'live';
    END IF;
    EXECUTE format('TRUNCATE outcomes_%s', p_slot);
    RETURN 'emptied';
END;
$$;

-- Deletes up to p_limit expired rows of a slot, the oldest first. Returns how many it deleted.
CREATE FUNCTION delete_expired(p_slot int, p_limit int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_deleted int;
BEGIN
    EXECUTE format(
        'DELETE FROM outcomes_%1$s d WHERE d.ctid = ANY (ARRAY(
            SELECT o.ctid FROM outcomes_%1$s o
            WHERE o.expires_at <= $2
                AND NOT EXISTS (SELECT FROM unhandled u WHERE u.id = o.id OFFSET 0)
            ORDER BY o.expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
         ))', p_slot
    ) USING p_limit, clock_timestamp();
    GET DIAGNOSTICS v_deleted = ROW_COUNT;
    RETURN v_deleted;
END;
$$;

-- Looks at p_limit outcomes that waited for a handler beyond the retention, those after the id
-- p_after, and deletes those that have been handled. Returns the last id, or NULL at the end, and
-- how many of them still wait.
CREATE FUNCTION delete_handled(p_after uuid, p_limit int)
RETURNS TABLE (last uuid, waiting bigint)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_ids uuid[] := ARRAY(
        SELECT o.id FROM outcomes_late o
        WHERE o.id > coalesce(p_after, '00000000-0000-0000-0000-000000000000')
            -- Not those that were replayed while a handler had them.
            AND o.expires_at <= v_now
        ORDER BY o.id LIMIT p_limit
    );
BEGIN
    waiting := 0;
    IF cardinality(v_ids) > 0 THEN
        SELECT count(*) INTO waiting FROM unhandled u WHERE u.id = ANY (v_ids);
        DELETE FROM outcomes_late o
        WHERE o.id = ANY (v_ids)
            AND NOT EXISTS (SELECT FROM unhandled u WHERE u.id = o.id OFFSET 0);
    END IF;
    last := CASE WHEN cardinality(v_ids) = p_limit THEN v_ids[p_limit] END;
    RETURN NEXT;
END;
$$;

-- Requests in channels without a runner.
--
-- The time that a request may take counts although no process delivers it. That time is in its
-- head, and no index has it: a sweep finds the channels without a runner, reads each of their due
-- requests once, and notes when to give it up. Channels that have a runner cost one look at the
-- queue's index each.

-- Whether a runner delivers the requests of a channel that have this format.
CREATE FUNCTION is_delivered(p_channel text, p_format smallint) RETURNS boolean
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$
    SELECT EXISTS (
        SELECT FROM runners r
        WHERE r.expires_at > clock_timestamp() AND p_format = ANY (r.formats)
            AND (r.channels IS NULL OR p_channel = ANY (r.channels))
    )
$$;

-- How long a request waits for a runner, by the retry policy in its head: its maximal age, or a day
-- if only its attempts are limited. NULL: for ever. So does a request that can't be read.
CREATE FUNCTION waits_at_most(p_head text) RETURNS interval
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    SELECT CASE
        WHEN p_head IS NULL THEN interval '1 day'
        WHEN age.ms > 0 THEN age.ms * interval '1 millisecond'
        -- Within a string, a quote would be escaped.
        WHEN p_head ~ '"max_(age_ms|attempts)":'
            OR p_head ~ '"delays":({)?"(none|schedule_ms|from_fn)"'
            THEN interval '1 day'
    END
    FROM (
        SELECT substring(p_head FROM '"max_age_ms":([0-9]{1,13})[,}]')::bigint AS ms
    ) age
$$;

-- Up to p_limit channels with requests that a runner could claim, in order: those after p_after.
CREATE FUNCTION queued_channels(p_after text, p_limit int) RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- Without this, a plan made for an empty queue may read and sort all of it.
SET enable_sort = off
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE queued(number, channel) AS (
            SELECT 0, p_after COLLATE "C"
            UNION ALL
            SELECT q.number + 1, least(
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state = 'waiting' AND m.channel_name > q.channel
                    ORDER BY m.channel_name LIMIT 1
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state IN ('claimed', 'held', 'sending_once')
                        AND m.channel_name > q.channel
                    ORDER BY m.channel_name LIMIT 1
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state = 'behind' AND m.channel_name > q.channel
                    ORDER BY m.channel_name LIMIT 1
                )
            )
            FROM queued q WHERE q.number < p_limit AND q.channel IS NOT NULL
        )
        SELECT coalesce(array_agg(q.channel ORDER BY q.number), '{}')
        FROM queued q WHERE q.number > 0 AND q.channel IS NOT NULL
    );
END;
$$;

-- Requests of a channel that are due and that no process has: those that are due after p_after, the
-- oldest first. Up to p_limit of them, and all that are due at the same time as the last. The time
-- without a runner counts from `since`: as in mq_poll, that of a retry counts from when it was due,
-- unless a caller waits.
CREATE FUNCTION due_requests(
    p_channel text, p_format smallint, p_after timestamptz, p_until timestamptz, p_limit int
) RETURNS TABLE (id uuid, due timestamptz, since timestamptz)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- As for queued_channels.
SET enable_sort = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        first.id, first.attempt_at,
        CASE
            WHEN first.attempts > 0 AND first.waiter IS NOT NULL THEN first.began_at
            ELSE first.attempt_at
        END
    FROM (
        (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'waiting'
                AND m.attempt_at > p_after AND m.attempt_at <= p_until
            ORDER BY m.attempt_at FETCH FIRST p_limit ROWS WITH TIES
        )
        UNION ALL
        -- Their leases have run out.
        (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format
                AND m.state IN ('claimed', 'held', 'sending_once')
                AND m.attempt_at > p_after AND m.attempt_at <= p_until
            ORDER BY m.attempt_at FETCH FIRST p_limit ROWS WITH TIES
        )
        UNION ALL
        (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'behind'
                AND m.attempt_at > p_after AND m.attempt_at <= p_until
            ORDER BY m.attempt_at FETCH FIRST p_limit ROWS WITH TIES
        )
    ) first
    ORDER BY first.attempt_at FETCH FIRST p_limit ROWS WITH TIES;
END;
$$;

-- Whether due_requests would return any.
CREATE FUNCTION has_due(p_channel text, p_format smallint, p_until timestamptz) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_sort = off
AS $$
BEGIN
    RETURN coalesce(p_until >= least(
        (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'waiting'
            ORDER BY m.attempt_at LIMIT 1
        ),
        (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format
                AND m.state IN ('claimed', 'held', 'sending_once')
            ORDER BY m.attempt_at LIMIT 1
        ),
        (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'behind'
            ORDER BY m.attempt_at LIMIT 1
        )
    ), false);
END;
$$;

-- Looks at up to p_limit channels with requests, those after p_after, and notes those that no
-- runner delivers. Returns the last one that it looked at, or NULL at the end.
CREATE FUNCTION note_channels(p_after text, p_limit int) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_channels text[] := queued_channels(p_after, p_limit);
BEGIN
    -- Not one that renews its row at this moment.
    DELETE FROM runners r WHERE r.id = ANY (ARRAY(
        SELECT x.id FROM runners x WHERE x.expires_at <= v_now FOR UPDATE SKIP LOCKED
    ));
    INSERT INTO undelivered_channels (channel_name, format)
    SELECT c.name, known.format
    FROM unnest(v_channels) AS c(name), unnest(known_formats()) AS known(format)
    WHERE NOT is_delivered(c.name, known.format)
        AND has_due(c.name, known.format, v_now)
    ON CONFLICT DO NOTHING;
    RETURN CASE WHEN cardinality(v_channels) >= p_limit THEN v_channels[p_limit] END;
END;
$$;

-- Notes when the due requests of a channel without a runner are given up: up to p_limit of those
-- that are due after p_after (NULL: all). Returns whether there may be more.
CREATE FUNCTION note_requests(
    p_channel text, p_format smallint, p_after timestamptz, p_limit int
) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    -- Requests are looked for again after these times, because they may be committed late.
    c_late CONSTANT interval := '1 minute';
    c_very_late CONSTANT interval := '10 minutes';
    v_now timestamptz := clock_timestamp();
    v_ids uuid[];
    v_since timestamptz[];
    v_until timestamptz;
BEGIN
    SELECT array_agg(d.id), array_agg(d.since), max(d.due) INTO v_ids, v_since, v_until
    FROM due_requests(p_channel, p_format, coalesce(p_after, '-infinity'), v_now, p_limit) d;
    INSERT INTO undelivered (id, channel_name, format, give_up_at)
    SELECT
        d.id, p_channel, p_format,
        coalesce(d.since + waits_at_most(p.head), 'infinity')
    FROM unnest(v_ids, v_since) AS d(id, since)
    LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[d.id])
    WHERE NOT EXISTS (SELECT FROM undelivered u WHERE u.id = d.id OFFSET 0)
    ON CONFLICT DO NOTHING;
    IF cardinality(v_ids) >= p_limit THEN
        UPDATE undelivered_channels u SET noted_until = v_until
        WHERE u.channel_name = p_channel AND u.format = p_format;
        RETURN true;
    END IF;
    UPDATE undelivered_channels u
    SET noted_until = CASE WHEN u.reread_at > v_now - c_very_late THEN v_now - c_late END,
        reread_at = CASE WHEN u.reread_at > v_now - c_very_late THEN u.reread_at ELSE v_now END
    WHERE u.channel_name = p_channel AND u.format = p_format;
    RETURN false;
END;
$$;

-- Looks after a channel of undelivered_channels: notes up to p_limit requests, and gives up to
-- p_limit of them up. Returns how many it gave up, and whether there may be more to do.
--
-- A channel must have been without a runner for a while, or requests that wait behind a backlog
-- would be given up while their only runner is replaced.
CREATE FUNCTION sweep_channel(p_channel text, p_format smallint, p_limit int)
RETURNS TABLE (given_up bigint, more boolean)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    c_replaced_within CONSTANT interval := '1 minute';
    v_now timestamptz := clock_timestamp();
    v_noted undelivered_channels%ROWTYPE;
    v_ids uuid[];
    v_unsent uuid[];
    v_once uuid[];
BEGIN
    given_up := 0;
    more := false;
    -- One process at a time.
    SELECT * INTO v_noted FROM undelivered_channels u
    WHERE u.channel_name = p_channel AND u.format = p_format FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NEXT;
        RETURN;
    END IF;
    IF is_delivered(p_channel, p_format) THEN
        UPDATE undelivered_channels u SET since = NULL
        WHERE u.channel_name = p_channel AND u.format = p_format AND u.since IS NOT NULL;
        v_ids := ARRAY(
            SELECT u.id FROM undelivered u
            WHERE u.channel_name = p_channel AND u.format = p_format LIMIT p_limit
        );
        DELETE FROM undelivered u WHERE u.id = ANY (v_ids);
        more := cardinality(v_ids) >= p_limit;
    ELSE
        IF v_noted.since IS NULL THEN
            v_noted.since := v_now;
            v_noted.noted_until := NULL;
            UPDATE undelivered_channels u SET since = v_now, noted_until = NULL
            WHERE u.channel_name = p_channel AND u.format = p_format;
        END IF;
        more := note_requests(p_channel, p_format, v_noted.noted_until, p_limit);
        IF v_noted.since <= v_now - c_replaced_within THEN
            v_ids := ARRAY(
                SELECT u.id FROM undelivered u
                WHERE u.channel_name = p_channel AND u.format = p_format AND u.give_up_at <= v_now
                ORDER BY u.give_up_at LIMIT p_limit
            );
            DELETE FROM undelivered u WHERE u.id = ANY (v_ids);
            -- Those that changed in the meantime are noted again once they are due.
            SELECT
                array_agg(left_over.id) FILTER (WHERE left_over.state <> 'sending_once'),
                array_agg(left_over.id) FILTER (WHERE left_over.state = 'sending_once')
            INTO v_unsent, v_once
            FROM (
                SELECT m.id, m.state FROM mq_msgs m
                WHERE m.id = ANY (v_ids) AND m.attempt_at <= v_now
                    AND (
                        m.state IN ('waiting', 'behind', 'sending_once')
                        OR m.state IN ('claimed', 'held')
                            -- The process that looked at a parked request died before it could
                            -- read it.
                            AND NOT EXISTS (
                                SELECT FROM mq_payloads p
                                WHERE p.id = m.id AND p.parked_claim_no = m.claim_no - 1 OFFSET 0
                            )
                    )
                FOR UPDATE OF m SKIP LOCKED
            ) left_over;
            given_up := cardinality(end_requests(
                coalesce(v_unsent, '{}'), 'discarded', 'no_runner',
                format(
                    'no runner has delivered the channel "%s" within the time that the request may '
                    'take; start a process that delivers it',
                    p_channel
                ),
                NULL
            )) + cardinality(end_requests(
                coalesce(v_once, '{}'), 'ambiguous', 'lost',
                'the process that made the attempt died before it recorded an answer', NULL
            ));
            more := more OR cardinality(v_ids) >= p_limit;
        END IF;
    END IF;
    IF NOT more AND NOT EXISTS (
        SELECT FROM undelivered u WHERE u.channel_name = p_channel AND u.format = p_format
    ) THEN
        -- Noted again if requests become due.
        DELETE FROM undelivered_channels u
        WHERE u.channel_name = p_channel AND u.format = p_format
            AND (u.since IS NULL OR NOT has_due(p_channel, p_format, v_now));
    END IF;
    RETURN NEXT;
END;
$$;
