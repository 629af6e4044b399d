-- Polling: which due requests a runner claims.
--
-- The cost doesn't grow with the backlog. A poll reads a bounded number of due rows, the oldest of
-- each priority: its view. If more are due, it also skips from group to group from a random start,
-- so that one destination's backlog can't hide the others. Requests behind the first one of their
-- ordering key are moved out of the way, a bounded number by one poll: the rows that a poll reads
-- are then rows that it can claim.
--
-- So are the requests of destinations that take no more of them now. They become deferred, and a
-- poll claims deferred requests one destination after the other, as many as its process has room
-- for. The session setting `requeuest.room` says for how many that is, as a JSON object.

-- A poll under way. Rows are held by ctid, which saves another index lookup for each row. No other
-- row can take over one of these ctids while the poll runs, because its snapshot is older. A row
-- that is updated meanwhile moves to a new ctid, and the next poll finds it there. A locked row
-- keeps its ctid.
CREATE TYPE poll_t AS (
    now timestamptz,
    channels text[],
    -- Channels that are paused. The poll looks at none of their requests.
    paused text[],
    formats smallint[],
    batch int,
    -- How many rows are in view, and how many of them at most of one priority from one channel and
    -- format.
    width int,
    width_each int,
    -- Due rows, and how many of them were looked at.
    view tid[],
    looked int,
    -- More rows are due than are in view.
    backlog boolean,
    -- Rows that this poll has locked and will claim.
    picked tid[],
    -- Rows in view that are behind the first request of their ordering key.
    blocked tid[],
    -- The process's room for requests of the destinations that it knows. Their waiting requests are
    -- in the way, and are deferred before they are claimed, except of destinations with room for a
    -- whole batch.
    room jsonb,
    -- Whether any destination is in the way: one of these, or one that is closed.
    gated boolean,
    any_closed boolean,
    -- Rows in view that are to be deferred.
    surplus tid[],
    -- How many rows were moved, and how many may be, about 10 µs each. A deferred one counts as
    -- sixteen: those that are not in the way are found without waiting for that.
    moved int,
    moved_max int,
    -- Groups with rows picked by age.
    served text[],
    -- How many groups were visited, and how many may be.
    visited int,
    visited_max int,
    -- This poll leaves what is in the way where it is. It looks at the latest requests and at some
    -- groups.
    hurried boolean,
    -- More rows are in the way.
    unfinished boolean,
    -- How soon to look again at due rows that could not be locked.
    again interval
);

-- When the session's polls may again move rows of destinations that are in the way. Moving takes
-- ten times as long as looking past them, so it gets a sixteenth of the time, and half of that
-- while there is much else to claim: requests of other destinations lose little while a large
-- backlog is moved. The session setting `requeuest.may_move` holds the time, in seconds since 1970.
CREATE FUNCTION may_move_at(p poll_t) RETURNS timestamptz
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_at timestamptz := to_timestamp(
        coalesce(nullif(current_setting('requeuest.may_move', true), ''), '0')::float8
    );
BEGIN
    -- Unless the clock was put back.
    RETURN CASE WHEN v_at < p.now + interval '10 seconds' THEN v_at ELSE p.now END;
END;
$$;

-- Begins a poll, with the work that comes before any claim.
CREATE FUNCTION begin_poll(p_channels text[], p_batch int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v poll_t;
BEGIN
    v.now := clock_timestamp();
    v.paused := ARRAY(
        SELECT c.channel_name FROM paused_channels c WHERE c.resumed_at IS NULL
    );
    v.formats := known_formats();
    v.batch := p_batch;
    v.width := 4 * p_batch;
    v.view := '{}';
    v.looked := 0;
    v.picked := '{}';
    v.blocked := '{}';
    v.room := coalesce(nullif(current_setting('requeuest.room', true), ''), '{}')::jsonb;
    v.any_closed := EXISTS (
        SELECT FROM destinations d WHERE d.closed_until IS NOT NULL
    );
    v.gated := v.any_closed OR v.room <> '{}';
    v.surplus := '{}';
    v.moved := 0;
    v.moved_max := 4096;
    v.served := '{}';
    v.visited := 0;
    v.visited_max := p_batch;
    v.hurried := v.gated AND may_move_at(v) > v.now;
    IF v.hurried THEN
        v.width := p_batch;
        v.moved_max := 0;
        v.visited_max := p_batch / 8 + 1;
    END IF;
    IF EXISTS (
        SELECT FROM mq_msgs m
        WHERE m.format = ANY (v.formats) AND m.deadline <= v.now AND m.state <> 'parked'
    ) THEN
        BEGIN
            PERFORM expire_requests(p_batch);
        EXCEPTION WHEN OTHERS THEN
            -- The sweep fails of the same, and says so. A poll claims what there is.
            NULL;
        END;
    END IF;
    IF EXISTS (SELECT FROM mq_freed_keys) THEN
        PERFORM free_noted(p_channels, p_batch);
    END IF;
    RETURN v;
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
                WHERE m.state = 'waiting' AND m.channel_name > w.channel
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

-- All channels with owned or parked requests.
CREATE FUNCTION leased_channels() RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE leased(channel) AS (
            SELECT '' COLLATE "C"
            UNION ALL
            SELECT least(
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state IN ('claimed', 'held', 'sending_once')
                        AND m.channel_name > l.channel
                    ORDER BY m.channel_name LIMIT 1
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state = 'parked' AND m.channel_name > l.channel
                    ORDER BY m.channel_name LIMIT 1
                )
            )
            FROM leased l WHERE l.channel IS NOT NULL
        )
        SELECT coalesce(array_agg(l.channel), '{}') FROM leased l
        WHERE l.channel <> ''
    );
END;
$$;

-- These channels without those that are paused.
CREATE FUNCTION not_paused(p poll_t, p_channels text[]) RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF p.paused = '{}' OR p_channels IS NULL THEN
        RETURN p_channels;
    END IF;
    RETURN ARRAY(
        SELECT c.name FROM unnest(p_channels) WITH ORDINALITY AS c(name, place)
        WHERE c.name <> ALL (p.paused) ORDER BY c.place
    );
END;
$$;

-- Both lists in one: each p_every-th row is of the second one, and the others are of the first one,
-- as long as both last. Begins at a random place of such a round, so that a poll for few rows takes
-- some of the second list as often.
CREATE FUNCTION take_turns(p_first tid[], p_second tid[], p_every int) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_begun int := floor(random() * p_every);
BEGIN
    IF p_first = '{}' OR p_second = '{}' THEN
        RETURN p_first || p_second;
    END IF;
    RETURN array_agg(turn.ctid ORDER BY turn.place) FROM (
        SELECT f.ctid, f.number + (f.number - 1 + v_begun) / (p_every - 1) AS place
        FROM unnest(p_first) WITH ORDINALITY AS f(ctid, number)
        UNION ALL
        SELECT s.ctid, p_every * s.number - v_begun
        FROM unnest(p_second) WITH ORDINALITY AS s(ctid, number)
    ) turn;
END;
$$;

-- Rows of all priorities in the order in which a poll picks them. NULL stands for no rows. Each
-- eighth is of a low priority, and of the others each third of the normal one, while there are
-- such: no priority waits for the end of a higher one.
CREATE FUNCTION by_priority(p_high tid[], p_normal tid[], p_low tid[]) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN take_turns(
        take_turns(coalesce(p_high, '{}'), coalesce(p_normal, '{}'), 3), coalesce(p_low, '{}'), 8
    );
END;
$$;

-- The requests that have been due for longest, up to width_each of each channel, format and
-- priority. Of each priority, the oldest first.
CREATE FUNCTION oldest_due(p poll_t, p_channels text[]) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_high tid[];
    v_normal tid[];
    v_low tid[];
BEGIN
    SELECT
        array_agg(due.ctid ORDER BY due.attempt_at) FILTER (WHERE due.priority = 'high'),
        array_agg(due.ctid ORDER BY due.attempt_at) FILTER (WHERE due.priority = 'normal'),
        array_agg(due.ctid ORDER BY due.attempt_at) FILTER (WHERE due.priority = 'low')
    INTO v_high, v_normal, v_low
    FROM unnest(p_channels) AS wanted(channel), unnest(p.formats) AS known(format),
        unnest('{high,normal,low}'::mq_priority[]) AS kind(priority),
        LATERAL (
            SELECT m.ctid, m.attempt_at, m.priority FROM mq_msgs m
            WHERE m.channel_name = wanted.channel AND m.format = known.format
                AND m.priority = kind.priority
                AND m.state = 'waiting' AND m.attempt_at <= p.now
            ORDER BY m.attempt_at LIMIT p.width_each
        ) due;
    IF v_high IS NULL AND v_low IS NULL THEN
        RETURN coalesce(v_normal, '{}');
    END IF;
    RETURN by_priority(v_high, v_normal, v_low);
END;
$$;

-- The requests that fell due last, a batch of each channel, format and priority. Of each priority,
-- the latest first.
CREATE FUNCTION latest_due(p poll_t) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_high tid[];
    v_normal tid[];
    v_low tid[];
BEGIN
    SELECT
        array_agg(due.ctid ORDER BY due.attempt_at DESC) FILTER (WHERE due.priority = 'high'),
        array_agg(due.ctid ORDER BY due.attempt_at DESC) FILTER (WHERE due.priority = 'normal'),
        array_agg(due.ctid ORDER BY due.attempt_at DESC) FILTER (WHERE due.priority = 'low')
    INTO v_high, v_normal, v_low
    FROM unnest(p.channels) AS wanted(channel), unnest(p.formats) AS known(format),
        unnest('{high,normal,low}'::mq_priority[]) AS kind(priority),
        LATERAL (
            SELECT m.ctid, m.attempt_at, m.priority FROM mq_msgs m
            WHERE m.channel_name = wanted.channel AND m.format = known.format
                AND m.priority = kind.priority
                AND m.state = 'waiting' AND m.attempt_at <= p.now
            ORDER BY m.attempt_at DESC LIMIT p.batch
        ) due;
    RETURN by_priority(v_high, v_normal, v_low);
END;
$$;

-- Whether a destination is closed. The group names the destination where that is NULL.
CREATE FUNCTION is_closed(p_now timestamptz, p_destination text, p_group text) RETURNS boolean
LANGUAGE plpgsql
STABLE
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM destinations d
        WHERE d.name = coalesce(p_destination, substr(p_group, 8))
            AND d.closed_until > p_now
    );
END;
$$;

-- Defers requests that wait, except those that are locked. Returns how many it deferred.
CREATE FUNCTION defer_rows(p_rows tid[]) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_rows tid[];
BEGIN
    SELECT array_agg(locked.ctid) INTO v_rows FROM (
        SELECT m.ctid FROM mq_msgs m
        WHERE m.ctid = ANY (p_rows) AND m.state <= 'waiting'
        FOR NO KEY UPDATE SKIP LOCKED
    ) locked;
    UPDATE mq_msgs m
    SET state = 'deferred', destination = coalesce(m.destination, substr(m.channel_args, 8))
    WHERE m.ctid = ANY (v_rows);
    RETURN coalesce(cardinality(v_rows), 0);
END;
$$;

-- The channels with deferred requests of a destination.
CREATE FUNCTION deferred_channels(p_destination text) RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE found(channel) AS (
            SELECT '' COLLATE "C"
            UNION ALL
            SELECT (
                SELECT m.channel_name FROM mq_msgs m
                WHERE m.state = 'deferred' AND m.destination = p_destination
                    AND m.channel_name > f.channel
                ORDER BY m.channel_name LIMIT 1
            )
            FROM found f WHERE f.channel IS NOT NULL
        )
        SELECT coalesce(array_agg(f.channel), '{}') FROM found f WHERE f.channel <> ''
    );
END;
$$;

-- Up to p_limit destinations with deferred requests, in order: those after p_after.
CREATE FUNCTION deferred_destinations(p_after text, p_limit int) RETURNS text[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- As for mq_poll.
SET enable_sort = off
AS $$
BEGIN
    RETURN (
        WITH RECURSIVE found(number, name) AS (
            SELECT 0, p_after COLLATE "C"
            UNION ALL
            SELECT f.number + 1, (
                SELECT m.destination FROM mq_msgs m
                WHERE m.state = 'deferred' AND m.destination > f.name
                ORDER BY m.destination LIMIT 1
            )
            FROM found f WHERE f.number < p_limit AND f.name IS NOT NULL
        )
        SELECT coalesce(array_agg(f.name ORDER BY f.number), '{}') FROM found f
        WHERE f.number > 0 AND f.name IS NOT NULL
    );
END;
$$;

-- Looks at what is due in the given channels.
CREATE FUNCTION view_channels(p poll_t, p_channels text[]) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    p.channels := p_channels;
    p.width_each := p.width;
    p.view := oldest_due(p, p_channels);
    p.backlog := cardinality(p.view) >= p.width;
    RETURN p;
END;
$$;

-- Looks at what is due in all channels. Goes through the channels until the view is full, from
-- where this session's last poll left off. Each channel has an equal share of the view, and more if
-- others need less. The session setting `requeuest.polled` holds the last channel of the last poll.
CREATE FUNCTION view_all_channels(p poll_t) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    -- How many channels are looked at in one step.
    c_channels CONSTANT int := 64;
    v_start text := coalesce(current_setting('requeuest.polled', true), '');
    v_cursor text := v_start;
    v_until text;
    v_more text[];
    v_open text[];
    v_met tid[];
BEGIN
    p.channels := '{}';
    LOOP
        v_more := waiting_channels(v_cursor, v_until, c_channels);
        v_open := not_paused(p, v_more);
        p.width_each := ceil(p.width::float8 / greatest(cardinality(v_open), 1));
        LOOP
            v_met := oldest_due(p, v_open);
            EXIT WHEN cardinality(p.view) + cardinality(v_met) >= p.width
                OR cardinality(v_met) < p.width_each OR p.width_each >= p.width;
            p.width_each := least(4 * p.width_each, p.width);
        END LOOP;
        p.channels := p.channels || v_open;
        p.view := p.view || v_met;
        EXIT WHEN cardinality(p.view) >= p.width;
        IF cardinality(v_more) = c_channels THEN
            v_cursor := v_more[c_channels];
        ELSE
            EXIT WHEN v_start = '' OR v_until IS NOT NULL;
            v_cursor := '';
            v_until := v_start;
        END IF;
    END LOOP;
    PERFORM set_config(
        'requeuest.polled', coalesce(p.channels[cardinality(p.channels)], ''), false
    );
    p.backlog := cardinality(p.view) >= p.width;
    RETURN p;
END;
$$;

-- Moves the rows that block the view, and looks at what comes after them. If that is too much for
-- one poll, looks at what came last, so that new requests don't wait for the rest. Changes nothing
-- if nothing blocks the view.
CREATE FUNCTION view_beyond_blocked(p poll_t) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_moved int;
BEGIN
    IF NOT p.backlog OR p.moved >= p.moved_max OR p.blocked = '{}' AND p.surplus = '{}' THEN
        RETURN p;
    END IF;
    v_moved := p.moved;
    p := defer_surplus(p);
    p.moved := p.moved + CASE WHEN p.blocked = '{}' THEN 0 ELSE move_behind(p.blocked) END;
    IF p.moved = v_moved THEN
        RETURN p;
    END IF;
    p.blocked := '{}';
    p.looked := 0;
    IF p.moved < p.moved_max THEN
        p.view := oldest_due(p, p.channels);
        p.backlog := cardinality(p.view) >= p.width;
    ELSE
        p.view := latest_due(p);
    END IF;
    RETURN p;
END;
$$;

-- A process that dies takes all of its requests with it, and only one of them may be the cause. So
-- a request whose lease has run out with `lost` above zero, that is, whose second attempt in a row
-- was lost, is a suspect. The suspects of a channel are claimed one after another: the next one
-- once the last one has its result, or a lease later, because a suspect that takes long must not
-- keep the others waiting.
--
-- Locks the suspect of each channel (NULL: of all channels) that may be claimed now.
CREATE FUNCTION lock_suspects(p poll_t, p_channels text[]) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lease interval :=
        coalesce(nullif(current_setting('requeuest.lease', true), ''), '15 seconds')::interval;
    v_busy text[];
BEGIN
    v_busy := ARRAY(
        SELECT DISTINCT m.channel_name FROM mq_msgs m
        WHERE m.lost > 0 AND m.state IN ('claimed', 'sending_once')
            AND m.attempt_at > p.now
            -- Of the last lease. A time far ahead is a damaged row's.
            AND m.suspected_at > p.now - v_lease AND m.suspected_at < p.now + v_lease
    );
    RETURN ARRAY(
        SELECT m.ctid FROM (
            SELECT DISTINCT ON (s.channel_name) s.id FROM mq_msgs s
            WHERE s.lost > 0 AND s.state IN ('claimed', 'sending_once') AND s.attempt_at <= p.now
                AND s.format = ANY (p.formats) AND s.channel_name <> ALL (v_busy)
                AND (p_channels IS NULL OR s.channel_name = ANY (p_channels))
                AND s.channel_name <> ALL (p.paused)
            ORDER BY s.channel_name, s.attempt_at
        ) oldest JOIN mq_msgs m ON m.id = ANY (ARRAY[oldest.id])
        WHERE m.lost > 0 AND m.state IN ('claimed', 'sending_once') AND m.attempt_at <= p.now
        FOR NO KEY UPDATE OF m SKIP LOCKED
    );
END;
$$;

-- Picks owned rows whose lease has run out, and parked rows that may be looked at again. During a
-- backlog, a session does so at most once a second. The session setting `requeuest.looked` holds
-- the time of its last look, in seconds since 1970.
CREATE FUNCTION pick_lapsed(p poll_t, p_channels text[]) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_channels text[];
    -- So few that what nothing can read doesn't keep the rest waiting.
    v_parked int := p.batch / 16 + 1;
BEGIN
    IF p.backlog AND extract(epoch FROM p.now) - 1 <=
        coalesce(nullif(current_setting('requeuest.looked', true), ''), '0')::numeric
    THEN
        RETURN p;
    END IF;
    PERFORM set_config('requeuest.looked', extract(epoch FROM p.now)::text, false);
    v_channels := coalesce(p_channels, not_paused(p, leased_channels()));
    SELECT coalesce(array_agg(locked.ctid), '{}') INTO p.picked FROM (
        SELECT m.ctid
        FROM unnest(v_channels) AS wanted(channel), unnest(p.formats) AS known(format), LATERAL (
            (
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = wanted.channel AND l.format = known.format
                    AND l.state IN ('claimed', 'held', 'sending_once') AND l.attempt_at <= p.now
                    AND (l.lost <= 0 OR l.state = 'held')
                ORDER BY l.attempt_at LIMIT p.batch
            )
            UNION ALL
            (
                SELECT l.id FROM mq_msgs l
                WHERE l.channel_name = wanted.channel AND l.format = known.format
                    AND l.state = 'parked' AND l.attempt_at <= p.now
                ORDER BY l.attempt_at LIMIT v_parked
            )
        ) lapsed JOIN mq_msgs m ON m.id = ANY (ARRAY[lapsed.id])
        WHERE m.state IN ('claimed', 'held', 'sending_once', 'parked') AND m.attempt_at <= p.now
        LIMIT p.batch FOR NO KEY UPDATE OF m SKIP LOCKED
    ) locked;
    IF EXISTS (
        SELECT FROM mq_msgs m
        WHERE m.lost > 0 AND m.state IN ('claimed', 'sending_once') AND m.attempt_at <= p.now
            AND m.format = ANY (p.formats)
            AND (p_channels IS NULL OR m.channel_name = ANY (p_channels))
            AND m.channel_name <> ALL (p.paused)
    ) THEN
        p.picked := (lock_suspects(p, p_channels) || p.picked)[1:p.batch];
        -- There may be many, and the next one follows soon.
        p.again := '0';
        PERFORM set_config('requeuest.looked', '', false);
    END IF;
    RETURN p;
END;
$$;

-- Notes which of these rows could not be picked, and why. p_locked of them could be locked. Takes
-- no locks. Written so that no plan scans the index of all ordering keys.
CREATE FUNCTION note_rest(p poll_t, p_met tid[], p_locked int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_blocked tid[];
    v_surplus tid[];
    v_changed int;
    v_overdue interval;
BEGIN
    SELECT
        array_agg(rest.ctid) FILTER (WHERE rest.behind),
        array_agg(rest.ctid) FILTER (WHERE rest.surplus AND NOT rest.behind),
        cardinality(p_met) - p_locked - count(*),
        min(p.now - rest.attempt_at) FILTER (
            WHERE NOT rest.behind AND NOT rest.surplus AND isfinite(rest.attempt_at)
        )
    INTO v_blocked, v_surplus, v_changed, v_overdue
    FROM (
        SELECT
            m.ctid, m.attempt_at,
            coalesce(m.seq, 0) > 0 AND EXISTS (
                SELECT FROM mq_msgs ahead
                WHERE ahead.channel_name = m.channel_name AND ahead.channel_args = m.channel_args
                    AND ahead.seq < m.seq
                OFFSET 0
            ) AS behind,
            p.gated AND coalesce(
                (p.room ->> coalesce(m.destination, substr(m.channel_args, 8)))::int < p.batch,
                p.any_closed AND is_closed(p.now, m.destination, m.channel_args)
            ) AS surplus
        FROM mq_msgs m
        WHERE m.ctid = ANY (p_met) AND m.state <= 'waiting' AND NOT m.ctid = ANY (p.picked)
    ) rest;
    p.blocked := p.blocked || coalesce(v_blocked, '{}');
    p.surplus := p.surplus || coalesce(v_surplus, '{}');
    -- A row that another transaction locks, or has just changed, may be claimable in a moment, and
    -- no notification says so. One that stays locked is looked at less often the longer that lasts.
    p.again := least(p.again, v_overdue, CASE WHEN v_changed > 0 THEN interval '0' END);
    RETURN p;
END;
$$;

-- Picks rows by priority and age until p_room are picked. Each step takes as many rows as there is
-- room for. Only the first row of an ordering key may be picked; a leased one still blocks the
-- others. Requests of destinations that are in the way are left to defer_surplus.
CREATE FUNCTION pick_by_age(p poll_t, p_room int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_open int;
    v_step int;
    v_met tid[];
    v_some tid[];
    v_groups text[];
BEGIN
    LOOP
        v_open := p_room - cardinality(p.picked);
        EXIT WHEN v_open <= 0;
        -- Not the whole view, if all of it is in the way: new requests are to be looked at too.
        IF p.looked >= cardinality(p.view)
            OR 16 * cardinality(p.surplus) >= p.moved_max - p.moved
        THEN
            p := view_beyond_blocked(p);
            EXIT WHEN p.looked >= cardinality(p.view);
        END IF;
        -- Fewer and larger steps where rows are blocked, or the last ones would be single rows.
        v_step := CASE
            WHEN p.blocked = '{}' AND p.surplus = '{}' THEN v_open
            ELSE greatest(v_open, 64)
        END;
        v_met := p.view[p.looked + 1:p.looked + v_step];
        SELECT
            array_agg(locked.ctid),
            array_agg(DISTINCT locked.channel_name || ' ' || locked.channel_args)
                FILTER (WHERE p.backlog)
        INTO v_some, v_groups FROM (
            SELECT m.ctid, m.channel_name, m.channel_args FROM mq_msgs m
            WHERE m.ctid = ANY (v_met)
                AND m.state <= 'waiting' AND m.attempt_at <= p.now AND NOT m.ctid = ANY (p.picked)
                AND (m.seq IS NULL OR NOT EXISTS (
                    SELECT FROM mq_msgs ahead
                    WHERE ahead.channel_name = m.channel_name
                        AND ahead.channel_args = m.channel_args AND ahead.seq < m.seq
                ))
                AND NOT (p.gated AND coalesce(
                    (p.room ->> coalesce(m.destination, substr(m.channel_args, 8)))::int < p.batch,
                    p.any_closed AND is_closed(p.now, m.destination, m.channel_args)
                ))
            FOR NO KEY UPDATE OF m SKIP LOCKED
        ) locked;
        IF cardinality(v_some) > v_open THEN
            -- The others are looked at again once there is room for them.
            v_some := ARRAY(
                SELECT met.ctid FROM unnest(v_met) WITH ORDINALITY AS met(ctid, place)
                WHERE met.ctid = ANY (v_some) ORDER BY met.place LIMIT v_open
            );
            p.picked := p.picked || v_some;
            p.served := p.served || ARRAY(
                SELECT DISTINCT m.channel_name || ' ' || m.channel_args
                FROM mq_msgs m WHERE m.ctid = ANY (v_some) AND p.backlog
            );
            EXIT;
        END IF;
        p.picked := p.picked || coalesce(v_some, '{}');
        p.served := p.served || coalesce(v_groups, '{}');
        p.looked := p.looked + v_step;
        IF cardinality(v_some) IS DISTINCT FROM cardinality(v_met) THEN
            p := note_rest(p, v_met, coalesce(cardinality(v_some), 0));
        END IF;
    END LOOP;
    RETURN p;
END;
$$;

-- Locks due rows of one group, up to p_limit. Of an ordering key, the first one, unless that is in
-- the way.
CREATE FUNCTION lock_of_group(
    p poll_t, p_channel text, p_format smallint, p_group text, p_ordered boolean, p_limit int
) RETURNS tid[]
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF p_ordered THEN
        RETURN array_agg(locked.ctid) FROM (
            SELECT m.ctid FROM mq_msgs m
            WHERE m.id = (
                SELECT head.id FROM mq_msgs head
                WHERE head.channel_name = p_channel AND head.channel_args = p_group
                    AND head.seq IS NOT NULL
                ORDER BY head.seq LIMIT 1
            ) AND m.format = p_format AND m.state <= 'waiting' AND m.attempt_at <= p.now
                AND NOT m.ctid = ANY (p.picked)
                AND NOT (p.gated AND coalesce(
                    (p.room ->> coalesce(m.destination, substr(m.channel_args, 8)))::int < p.batch,
                    p.any_closed AND is_closed(p.now, m.destination, m.channel_args)
                ))
            FOR NO KEY UPDATE SKIP LOCKED
        ) locked;
    END IF;
    -- A range over a single group, sorted by the group as well. With an equality, a plan made while
    -- there was one group would use the index by due time, and would read all of it once there are
    -- many groups.
    RETURN array_agg(locked.ctid) FROM (
        SELECT m.ctid FROM mq_msgs m
        WHERE m.channel_name = p_channel AND m.format = p_format
            AND m.channel_args >= p_group AND m.channel_args <= p_group
            AND m.state = 'waiting' AND m.attempt_at <= p.now AND NOT m.ctid = ANY (p.picked)
        ORDER BY m.channel_args, m.attempt_at LIMIT p_limit
        FOR NO KEY UPDATE SKIP LOCKED
    ) locked;
END;
$$;

-- Picks up to p_share rows of each group with none picked by age, or of each group at all if
-- p_share is a whole batch. Visits as many groups as a batch has rows, from a random one on. Of a
-- group that is in the way, it leaves one row to defer_surplus: an ordering key is then gone from
-- the groups, and other polls don't visit it.
CREATE FUNCTION pick_by_group(p poll_t, p_share int, p_room int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_start text := lpad(to_hex((random() * 65535)::int), 4, '0');
    v_cursor text;
    v_wrapped boolean;
    v_channel text;
    v_format smallint;
    v_group text;
    v_seq bigint;
    v_first tid;
    v_due boolean;
    v_in_the_way boolean;
    v_met tid[] := '{}';
BEGIN
    IF NOT p.backlog THEN
        RETURN p;
    END IF;
    <<groups>>
    FOR v_channel, v_format IN
        SELECT wanted.channel, known.format
        FROM unnest(p.channels) AS wanted(channel), unnest(p.formats) AS known(format)
        ORDER BY random()
    LOOP
        v_cursor := v_start;
        v_wrapped := false;
        LOOP
            EXIT groups WHEN cardinality(p.picked) >= p_room OR p.visited >= p.visited_max;
            SELECT
                m.channel_args, m.seq, m.ctid, m.attempt_at <= p.now,
                p.gated AND coalesce(
                    (p.room ->> coalesce(m.destination, substr(m.channel_args, 8)))::int < p.batch,
                    p.any_closed AND is_closed(p.now, m.destination, m.channel_args)
                )
            INTO v_group, v_seq, v_first, v_due, v_in_the_way FROM mq_msgs m
            WHERE m.channel_name = v_channel AND m.format = v_format AND m.state = 'waiting'
                AND m.channel_args > v_cursor
            ORDER BY m.channel_args, m.attempt_at LIMIT 1;
            IF NOT FOUND THEN
                EXIT WHEN v_wrapped;
                v_wrapped := true;
                v_cursor := '';
                CONTINUE;
            END IF;
            -- In the order of the index.
            EXIT WHEN v_wrapped AND v_group COLLATE "C" > v_start;
            v_cursor := v_group;
            p.visited := p.visited + 1;
            CONTINUE WHEN NOT v_due;
            IF v_in_the_way THEN
                v_met := v_met || v_first;
                -- An ordering key's first request may be another one, for another destination.
                CONTINUE WHEN v_seq IS NULL OR NOT EXISTS (
                    SELECT FROM mq_msgs ahead
                    WHERE ahead.channel_name = v_channel AND ahead.channel_args = v_group
                        AND ahead.seq < v_seq
                );
            END IF;
            IF p_share >= p.batch OR v_channel || ' ' || v_group <> ALL (p.served) THEN
                p.picked := p.picked || coalesce(lock_of_group(
                    p, v_channel, v_format, v_group, v_seq IS NOT NULL,
                    least(p_share, p_room - cardinality(p.picked))
                ), '{}');
            END IF;
        END LOOP;
    END LOOP;
    RETURN CASE WHEN v_met = '{}' THEN p ELSE note_rest(p, v_met, 0) END;
END;
$$;

-- Defers the requests that the poll met and whose destinations take no more of them now.
CREATE FUNCTION defer_surplus(p poll_t) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_deferred int;
    v_locked int;
    v_overdue interval;
BEGIN
    IF p.surplus = '{}' OR p.hurried THEN
        RETURN p;
    END IF;
    v_deferred := defer_rows(p.surplus);
    IF v_deferred < cardinality(p.surplus) THEN
        -- As in note_rest: no notification says when they can be deferred.
        SELECT count(*), min(p.now - m.attempt_at) FILTER (WHERE isfinite(m.attempt_at))
        INTO v_locked, v_overdue
        FROM mq_msgs m WHERE m.ctid = ANY (p.surplus) AND m.state <= 'waiting';
        p.again := least(
            p.again, v_overdue,
            CASE WHEN v_deferred + v_locked < cardinality(p.surplus) THEN interval '0' END
        );
    END IF;
    p.moved := p.moved + 16 * v_deferred;
    p.surplus := '{}';
    RETURN p;
END;
$$;

-- How soon the process will have room for more deferred requests, if it says so.
CREATE FUNCTION room_soon() RETURNS interval
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    RETURN nullif(current_setting('requeuest.soon', true), '')::int * interval '1 millisecond';
END;
$$;

-- Picks deferred requests of the destinations that the process has room for, until p_room rows are
-- picked. Each destination has the same share, and more if others need less.
CREATE FUNCTION pick_deferred(p poll_t, p_channels text[], p_room int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_names text[];
    v_rooms int[];
    v_share int;
    v_channel text;
    v_format smallint;
    v_some tid[];
    v_left int;
BEGIN
    IF p.room = '{}' OR cardinality(p.picked) >= p_room THEN
        RETURN p;
    END IF;
    SELECT array_agg(r.key ORDER BY r.place), array_agg(r.room ORDER BY r.place)
    INTO v_names, v_rooms FROM (
        SELECT e.key, e.value::int AS room, random() AS place FROM jsonb_each_text(p.room) e
        WHERE e.value::int > 0
    ) r;
    FOR i IN 1..coalesce(cardinality(v_names), 0) LOOP
        EXIT WHEN cardinality(p.picked) >= p_room;
        v_share := ceil(
            (p_room - cardinality(p.picked))::float8 / (cardinality(v_names) - i + 1)
        );
        v_left := least(v_rooms[i], greatest(v_share, 1));
        FOR v_channel, v_format IN
            SELECT wanted.channel, known.format
            FROM unnest(
                    coalesce(p_channels, not_paused(p, deferred_channels(v_names[i])))
                ) AS wanted(channel),
                unnest(p.formats) AS known(format)
            ORDER BY random()
        LOOP
            EXIT WHEN v_left <= 0;
            SELECT array_agg(locked.ctid) INTO v_some FROM (
                SELECT m.ctid FROM mq_msgs m
                WHERE m.destination = v_names[i] AND m.channel_name = v_channel
                    AND m.format = v_format AND m.state = 'deferred' AND m.attempt_at <= p.now
                    AND NOT m.ctid = ANY (p.picked)
                ORDER BY m.attempt_at LIMIT v_left
                FOR NO KEY UPDATE SKIP LOCKED
            ) locked;
            p.picked := p.picked || coalesce(v_some, '{}');
            v_left := v_left - coalesce(cardinality(v_some), 0);
            IF v_left > 0 THEN
                -- Of a row that is locked. As in note_rest.
                p.again := least(p.again, (
                    SELECT p.now - m.attempt_at FROM mq_msgs m
                    WHERE m.destination = v_names[i] AND m.channel_name = v_channel
                        AND m.format = v_format AND m.state = 'deferred'
                        AND m.attempt_at <= p.now AND isfinite(m.attempt_at)
                        AND NOT m.ctid = ANY (p.picked)
                    ORDER BY m.attempt_at LIMIT 1
                ));
            END IF;
        END LOOP;
        -- There may be more, and the process will soon have room for them. It says how soon, except
        -- if these are the first ones.
        IF v_left <= 0 AND room_soon() IS NULL THEN
            p.again := '0';
        END IF;
    END LOOP;
    RETURN p;
END;
$$;

-- Moves the rows out of the way that the poll met, except where they are so few that meeting them
-- costs less than moving them.
CREATE FUNCTION end_poll(p poll_t) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF cardinality(p.blocked) >= greatest(p.batch / 4, 16) THEN
        p.moved := p.moved + move_behind(p.blocked);
    END IF;
    p := defer_surplus(p);
    p.unfinished := p.moved >= p.moved_max AND p.backlog OR p.surplus <> '{}';
    IF p.gated AND p.moved > 0 AND NOT p.hurried THEN
        PERFORM set_config(
            'requeuest.may_move',
            extract(epoch FROM
                clock_timestamp() + least(
                    CASE WHEN cardinality(p.picked) >= p.batch / 4 THEN 31 ELSE 15 END
                        * (clock_timestamp() - p.now),
                    '5 seconds'
                )
            )::text,
            false
        );
    END IF;
    RETURN p;
END;
$$;

-- How long a runner that got these rows waits until it polls again.
CREATE FUNCTION poll_wait(p poll_t) RETURNS interval
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    c_min CONSTANT interval := '50 milliseconds';
    -- An upper bound, so that a row whose notification was lost is still found. The process says if
    -- it will soon have room for deferred requests.
    c_max CONSTANT interval := coalesce(room_soon(), '1 second');
    v_next timestamptz;
BEGIN
    IF cardinality(p.picked) >= p.batch
        -- While rows are in the way, a poll that picks fewer leaves others behind too.
        OR p.unfinished AND cardinality(p.picked) >= p.batch / 4
    THEN
        RETURN '0';
    ELSIF p.unfinished THEN
        RETURN greatest(least(may_move_at(p) - p.now, c_max), c_min);
    END IF;
    -- Looks no further ahead than the longest wait. A later row doesn't change the wait, and may be
    -- gone by the time it is due.
    SELECT min(upcoming.attempt_at) INTO v_next
    FROM unnest(p.channels) AS wanted(channel), unnest(p.formats) AS known(format),
        unnest('{high,normal,low}'::mq_priority[]) AS kind(priority),
        LATERAL (
            SELECT m.attempt_at FROM mq_msgs m
            WHERE m.channel_name = wanted.channel AND m.format = known.format
                AND m.priority = kind.priority AND m.state = 'waiting'
                AND m.attempt_at > p.now AND m.attempt_at < p.now + c_max
            ORDER BY m.attempt_at LIMIT 1
        ) upcoming;
    RETURN greatest(least(v_next - p.now, p.again, c_max), c_min);
END;
$$;

-- Picks due rows, the rows that a runner is to claim.
CREATE FUNCTION pick_due(p_channels text[], p_batch int) RETURNS poll_t
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    p poll_t := begin_poll(p_channels, p_batch);
BEGIN
    p_channels := not_paused(p, p_channels);
    p := CASE WHEN p_channels IS NULL
        THEN view_all_channels(p) ELSE view_channels(p, p_channels) END;
    p := pick_lapsed(p, p_channels);
    IF p.hurried AND p.backlog THEN
        p.view := latest_due(p);
    END IF;
    IF p.gated THEN
        -- What is due to healthy destinations and what is deferred share the batch.
        p := pick_by_age(p, greatest(p_batch / 2, 1));
        p := pick_by_group(p, greatest(1, p_batch / 32), greatest(p_batch * 3 / 4, 1));
        p := defer_surplus(p);
        p := pick_deferred(p, p_channels, p_batch);
        p := pick_by_age(p, p_batch);
        p := pick_by_group(p, p_batch, p_batch);
    ELSIF p.backlog THEN
        -- A quarter of the batch goes group by group to groups with no row picked by age, so that
        -- no destination waits behind everything that came earlier for another destination. The
        -- share is no larger because the oldest rows lie side by side on disk, and the rows of one
        -- group don't.
        p := pick_by_age(p, p_batch - p_batch / 4);
        p := pick_by_group(p, greatest(1, p_batch / 32), p_batch);
        -- There may still be room, because there are few groups or because other polls took the
        -- oldest rows.
        p := pick_by_age(p, p_batch);
        p := pick_by_group(p, p_batch, p_batch);
    ELSE
        p := pick_by_age(p, p_batch);
    END IF;
    RETURN end_poll(p);
END;
$$;

-- Claims up to batch_size due requests. The lease is the session's `requeuest.lease`.
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
-- The limits are parameters, so the estimates are high enough for a compilation, which takes longer
-- than the poll.
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    -- No request of this crate is older.
    c_first CONSTANT timestamptz := '1970-01-01 UTC';
    -- Attempts fetch larger bodies themselves, under a memory budget.
    c_inline_body CONSTANT int := 65536;
    -- No head that this crate wrote is as long. A longer one might be too long to be returned.
    c_max_head CONSTANT int := 4194304;
    v poll_t := pick_due(channel_names, batch_size);
    v_now timestamptz := v.now;
    v_lease interval :=
        coalesce(nullif(current_setting('requeuest.lease', true), ''), '15 seconds')::interval;
    v_owner uuid := nullif(current_setting('requeuest.instance', true), '')::uuid;
    v_wait interval := poll_wait(v);
    v_more boolean := cardinality(v.picked) >= batch_size OR v.unfinished;
    -- For an application that measures how long requests wait.
    v_measured boolean :=
        coalesce(nullif(current_setting('requeuest.measured', true), ''), 'off')::boolean;
BEGIN
    IF v.picked = '{}' THEN
        RETURN QUERY SELECT
            NULL::uuid, NULL::boolean, NULL::text, NULL::text, NULL::bytea, NULL::interval, v_wait;
        RETURN;
    END IF;
    -- Here and not in a function of its own, which would copy each row once more.
    RETURN QUERY
    WITH claimed AS (
        UPDATE mq_msgs m
        -- A request that may have been sent and must not be sent again keeps its state until its
        -- outcome is recorded.
        --
        -- Whatever a damaged row has in its numbers and times, it must not fail the others.
        SET attempt_at = v_now + v_lease, claim_no = next_claim_no(m.claim_no), owner = v_owner,
            attempts = least(greatest(m.attempts, 0), 2147483646) + 1,
            -- Time for which no runner came doesn't count, except while a caller waits.
            began_at = CASE
                WHEN m.attempts = 0 THEN v_now
                WHEN m.waiter IS NOT NULL THEN m.began_at
                WHEN m.attempt_at > c_first AND coalesce(m.began_at, m.created_at) <= v_now THEN
                    coalesce(m.began_at, m.created_at) + greatest(v_now - m.attempt_at, '0')
                ELSE v_now
            END,
            state = CASE WHEN m.state = 'sending_once' THEN m.state ELSE 'claimed' END,
            -- An attempt was under way, and its result will never come.
            lost = CASE
                WHEN m.state IN ('claimed', 'sending_once')
                    THEN least(greatest(m.lost, 0), 9999) + 1
                ELSE greatest(m.lost, 0)
            END,
            suspected_at = CASE
                WHEN m.state IN ('claimed', 'sending_once') AND m.lost > 0 THEN v_now
            END
        WHERE m.ctid = ANY (v.picked)
        RETURNING
            m.id, m.channel_name, m.claim_no, m.attempts, m.deadline,
            coalesce(m.began_at, m.created_at) AS began_at, m.created_at,
            m.state = 'sending_once' AS once, m.lost
    )
    SELECT
        c.id,
        true,
        -- sqlxmq's runner drops rows without a name. A row without a payload must reach the code
        -- that ends it.
        coalesce(p.name, ''),
        -- Put together as text, not by JSON functions, which would parse each head anew. Each value
        -- is JSON as it is: numbers, booleans, the channel by to_json, and the metadata by its
        -- type. The head is text that may be anything: if it is not JSON, the crate reads the claim
        -- around it.
        concat(
            '{"claim_no":', c.claim_no,
            ',"attempts":', c.attempts,
            ',"age_ms":',
            CASE
                WHEN isfinite(c.began_at)
                    THEN (extract(epoch FROM v_now - c.began_at) * 1000)::bigint
                ELSE 0
            END,
            ',"lived_ms":',
            CASE
                WHEN isfinite(c.created_at)
                    THEN (extract(epoch FROM v_now - c.created_at) * 1000)::bigint
                ELSE 0
            END,
            -- The row as it was before the update.
            CASE WHEN v_measured THEN (
                SELECT concat(
                    ',"waited_ms":',
                    CASE
                        WHEN isfinite(o.attempt_at)
                            THEN (extract(epoch FROM v_now - o.attempt_at) * 1000)::bigint
                        ELSE 0
                    END,
                    ',"taken_over":', (o.state IN ('claimed', 'held', 'sending_once'))::text
                )
                FROM mq_msgs o WHERE o.id = ANY (ARRAY[c.id])
            ) END,
            ',"deadline_ms":',
            CASE
                WHEN isfinite(c.deadline)
                    THEN (extract(epoch FROM c.deadline - v_now) * 1000)::bigint::text
                WHEN c.deadline < v_now THEN '0'
                ELSE 'null'
            END,
            ',"lost":', c.once::text,
            ',"lost_attempts":', c.lost,
            -- Whether more requests may be due than this poll took.
            ',"more":', v_more::text,
            ',"fetch_body":',
            CASE WHEN octet_length(p.body) > c_inline_body THEN 'true' ELSE 'false' END,
            ',"channel":', to_json(c.channel_name),
            ',"head":',
            CASE
                WHEN p.head IS NULL THEN 'null'
                WHEN octet_length(p.head) <= c_max_head THEN p.head
                ELSE '{"too_long":true}'
            END,
            ',"metadata":' || p.metadata::text,
            '}'
        ),
        CASE WHEN octet_length(p.body) <= c_inline_body THEN p.body END,
        v_lease,
        v_wait
    FROM claimed c LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[c.id]);
END;
$$;
