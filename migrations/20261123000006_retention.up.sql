-- Pruning of outcomes.
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
