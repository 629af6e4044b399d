-- How requests leave and enter the index of what is due.
--
-- Requests are inserted as waiting. A poll that meets one behind the first request of its ordering
-- key moves it to state `behind`, and whatever removes the first request makes the next one waiting
-- again. No request is left in state `behind` without one ahead of it, because:
--
-- - Requests of one bulk insert are put behind the first one of their key in it. No transaction can
--   remove that one without seeing them.
-- - A poll moves requests only while it holds a lock on the first one of their key. A transaction
--   that removes that one waits for the poll, and then sees what the poll has moved.
-- - The next request is looked for by a statement that begins after the first one was deleted. A
--   request that is inserted too late to be found there can't be moved, because the poll can't lock
--   the deleted one.
-- - If the next request is locked, it may be about to be removed itself. Waiting for that lock
--   could take as long as a caller's transaction, so the key is noted in mq_freed_keys instead, and
--   later polls look at it until the lock is gone.

-- Moves those of these requests that wait and are not the first ones of their ordering keys to
-- state `behind`. Skips those that are locked. Returns how many it moved.
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
        WHERE m.ctid = ANY (p_rows) AND m.state <= 'waiting' AND first.id <> m.id
        FOR NO KEY UPDATE OF m SKIP LOCKED
        -- Conflicts with the removal of the first request, and not with its claim.
        FOR KEY SHARE OF first SKIP LOCKED
    ) blocked;
    UPDATE mq_msgs m SET state = 'behind' WHERE m.ctid = ANY (v_blocked);
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
    v_state mq_state;
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
        IF FOUND THEN
            IF v_state = 'behind' THEN
                UPDATE mq_msgs m SET state = 'waiting' WHERE m.id = v_next;
            END IF;
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
-- Whatever the session's session_replication_role: without the trigger, keys would get stuck.
ALTER TABLE mq_msgs ENABLE ALWAYS TRIGGER mq_msgs_free_next;

-- Makes the first request of an ordering key claimable. Returns 1 if it wasn't, 0 if it was or if
-- there is none, and NULL if the request is locked.
CREATE FUNCTION free_first(p_channel text, p_group text) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_first uuid;
    v_state mq_state;
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
    IF v_state <> 'behind' THEN
        RETURN 0;
    END IF;
    UPDATE mq_msgs m SET state = 'waiting' WHERE m.id = v_first;
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

-- Looks for ordering keys whose first request is in state `behind`, among up to p_keys of them from
-- a random one on, and makes those requests claimable. There are none, unless rows were changed by
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
    IF NOT EXISTS (SELECT FROM mq_msgs m WHERE m.state = 'behind') THEN
        RETURN 0;
    END IF;
    -- From the random start to the end, and then from the beginning.
    FOR pass IN 1..2 LOOP
        WITH RECURSIVE looked(number, key_group, channel, state) AS (
            SELECT 0, v_start COLLATE "C", '' COLLATE "C", 'waiting'::mq_state
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
            SELECT l.state = 'behind' AND NOT EXISTS (
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
