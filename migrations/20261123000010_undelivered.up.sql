-- Requests in channels without a runner.
--
-- The time that a request may take counts although no process delivers it. That time is in its
-- head, and no index has it: a sweep finds the channels without a runner, reads each of their due
-- requests once, and notes when to give it up. Channels that have a runner cost one look at the
-- queue's index each. A channel that is paused counts as one with a runner: a runner wouldn't send
-- its requests either.

-- Whether a runner delivers the requests of a channel that have this format. With the rights of the
-- schema's owner, so that a role which only enqueues can warn of a channel that is misspelt.
CREATE FUNCTION is_delivered(p_channel text, p_format smallint) RETURNS boolean
LANGUAGE sql
STABLE
SECURITY DEFINER
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
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state = 'deferred' AND m.channel_name > q.channel
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
-- unless a caller waits. That of requests that could not be sent although there was a runner counts
-- from when the runner was lost: their destination took no more, or they were behind another. Time
-- for which the channel was paused doesn't count.
CREATE FUNCTION due_requests(
    p_channel text, p_format smallint, p_after timestamptz, p_until timestamptz, p_limit int
) RETURNS TABLE (id uuid, due timestamptz, since timestamptz)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- As for queued_channels.
SET enable_sort = off
-- As for mq_poll: the few rows that are left are sorted.
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    v_lost timestamptz := (
        SELECT u.since FROM undelivered_channels u
        WHERE u.channel_name = p_channel AND u.format = p_format
    );
    v_resumed timestamptz := (
        SELECT c.resumed_at FROM paused_channels c WHERE c.channel_name = p_channel
    );
BEGIN
    RETURN QUERY
    SELECT
        first.id, first.attempt_at,
        CASE
            WHEN first.attempts > 0 AND first.waiter IS NOT NULL THEN first.began_at
            WHEN first.is_held_back THEN greatest(first.attempt_at, v_lost)
            ELSE greatest(first.attempt_at, v_resumed)
        END
    FROM (
        SELECT due.*
        FROM unnest('{high,normal,low}'::mq_priority[]) AS kind(priority), LATERAL (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at,
                false AS is_held_back
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format
                AND m.priority = kind.priority AND m.state = 'waiting'
                AND m.attempt_at > p_after AND m.attempt_at <= p_until
            ORDER BY m.attempt_at FETCH FIRST p_limit ROWS WITH TIES
        ) due
        UNION ALL
        -- Their leases have run out.
        (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at,
                false AS is_held_back
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
                coalesce(m.began_at, m.created_at) AS began_at,
                true AS is_held_back
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'behind'
                AND m.attempt_at > p_after AND m.attempt_at <= p_until
            ORDER BY m.attempt_at FETCH FIRST p_limit ROWS WITH TIES
        )
        UNION ALL
        (
            SELECT
                m.id, m.attempt_at, m.attempts, m.waiter,
                coalesce(m.began_at, m.created_at) AS began_at,
                true AS is_held_back
            FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'deferred'
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
            SELECT min(first.attempt_at)
            FROM unnest('{high,normal,low}'::mq_priority[]) AS kind(priority), LATERAL (
                SELECT m.attempt_at FROM mq_msgs m
                WHERE m.channel_name = p_channel AND m.format = p_format
                    AND m.priority = kind.priority AND m.state = 'waiting'
                ORDER BY m.attempt_at LIMIT 1
            ) first
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
        ),
        (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.format = p_format AND m.state = 'deferred'
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
    WHERE NOT is_delivered(c.name, known.format) AND NOT is_paused(c.name)
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
-- would be given up while their only runner is replaced. Requests of a closed destination stay: a
-- runner wouldn't send them either.
CREATE FUNCTION sweep_channel(p_channel text, p_format smallint, p_limit int)
RETURNS TABLE (given_up bigint, more boolean)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    c_replaced_within CONSTANT interval := '1 minute';
    c_closed_again CONSTANT interval := '10 minutes';
    v_now timestamptz := clock_timestamp();
    v_noted undelivered_channels%ROWTYPE;
    v_ids uuid[];
    v_kept uuid[];
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
    IF is_delivered(p_channel, p_format) OR is_paused(p_channel) THEN
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
            v_kept := ARRAY(
                SELECT m.id FROM mq_msgs m
                WHERE m.id = ANY (v_ids) AND m.waiter IS NULL
                    AND m.state IN ('waiting', 'behind', 'deferred')
                    AND is_closed(v_now, m.destination, m.channel_args)
            );
            UPDATE undelivered u SET give_up_at = v_now + c_closed_again
            WHERE u.id = ANY (v_kept);
            more := more OR cardinality(v_ids) >= p_limit;
            v_ids := ARRAY(SELECT unnest(v_ids) EXCEPT SELECT unnest(v_kept));
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
                        m.state IN ('waiting', 'behind', 'deferred', 'sending_once')
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
