-- What operators do: a record of each change, channels that are paused, and changes of many
-- requests that processes make in the background.

-- Who changed what, when and why. Each row is written in the transaction of its change. Nothing in
-- it is secret: targets are ids and names.
CREATE TABLE changes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    reason text,
    -- What was done, in words of this crate's version. Later versions may write others.
    action text NOT NULL,
    -- What it was done to: the id of a request or an operation, the name of a channel or a
    -- destination.
    target text NOT NULL,
    detail json,
    -- The operation on many requests that it is a part of.
    operation uuid
);
-- For deleting old ones.
CREATE INDEX changes_at ON changes (at);
-- What was done to one target.
CREATE INDEX changes_target ON changes (target, id);

-- Changes of many requests. A process with a runner takes one, changes some requests, and notes how
-- far it is, in one transaction. So no crash loses or repeats a change, and two processes never
-- work at one operation: the row is locked meanwhile.
CREATE TABLE operations (
    id uuid PRIMARY KEY,
    -- Which versions can read the action and the filter.
    format smallint NOT NULL,
    action text NOT NULL,
    filter json NOT NULL,
    actor text NOT NULL,
    reason text,
    -- How many requests are changed in a second at most. NULL: as many as can be.
    rate float8,
    -- `running`, `finished` or `cancelled`.
    state text NOT NULL DEFAULT 'running',
    -- Requests that began to match later are left alone: an operation would meet those that fail
    -- again for ever.
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    -- When a process last worked at it.
    driven_at timestamptz,
    -- When the next requests are changed.
    next_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The last request that was looked at.
    after_at bigint,
    after_id uuid,
    -- All requests were looked at, and these could not be changed because a transaction had them.
    -- They are tried again until the time.
    busy uuid[] NOT NULL DEFAULT '{}',
    busy_until timestamptz,
    looked bigint NOT NULL DEFAULT 0,
    done bigint NOT NULL DEFAULT 0,
    skipped bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    -- Why the last one was skipped, or failed.
    last_skipped text,
    last_error text
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
-- Which have work to do. Empty most of the time.
CREATE INDEX operations_running ON operations (next_at) WHERE state = 'running';
CREATE INDEX operations_finished ON operations (finished_at) WHERE finished_at IS NOT NULL;

-- Pauses a channel. Returns `paused`, `already`, or `many`: nothing was done, because p_most are
-- paused, and each poll reads them.
CREATE FUNCTION pause_channel(p_channel text, p_actor text, p_reason text, p_most int) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF is_paused(p_channel) THEN
        RETURN 'already';
    END IF;
    IF (SELECT count(*) FROM paused_channels c WHERE c.resumed_at IS NULL) >= p_most THEN
        RETURN 'many';
    END IF;
    INSERT INTO paused_channels AS c (channel_name, actor, reason)
    VALUES (p_channel, p_actor, p_reason)
    ON CONFLICT (channel_name) DO UPDATE
    SET since = clock_timestamp(), actor = excluded.actor, reason = excluded.reason,
        resumed_at = NULL
    WHERE c.resumed_at IS NOT NULL;
    RETURN CASE WHEN FOUND THEN 'paused' ELSE 'already' END;
END;
$$;

-- Lets attempts of a channel begin again. Returns false if it was not paused.
CREATE FUNCTION resume_channel(p_channel text) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    UPDATE paused_channels c SET resumed_at = clock_timestamp()
    WHERE c.channel_name = p_channel AND c.resumed_at IS NULL;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM tell_runners(p_channel);
    RETURN true;
END;
$$;

-- Deletes up to p_limit changes and p_limit finished operations that are older than 90 days.
-- Returns whether there may be more. With the rights of the schema's owner: no other role may
-- delete them.
CREATE FUNCTION prune_operations(p_limit int) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_before timestamptz := clock_timestamp() - interval '90 days';
    v_changes int;
    v_operations int;
BEGIN
    DELETE FROM changes c WHERE c.id = ANY (ARRAY(
        SELECT old.id FROM changes old WHERE old.at < v_before
        ORDER BY old.at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS v_changes = ROW_COUNT;
    DELETE FROM operations o WHERE o.id = ANY (ARRAY(
        SELECT old.id FROM operations old WHERE old.finished_at < v_before
        ORDER BY old.finished_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS v_operations = ROW_COUNT;
    DELETE FROM paused_channels c WHERE c.resumed_at < clock_timestamp() - interval '30 days';
    RETURN greatest(v_changes, v_operations) >= p_limit;
END;
$$;
