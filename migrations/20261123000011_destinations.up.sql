-- The limits of destinations: permits for attempts at the same time, and tokens for attempts in a
-- period. Processes lease both in lumps, and what a process has leased expires.

-- Leases, gives back and renews for one process. For each destination it takes the permits that the
-- process uses (p_used) and could use (p_permits), of p_limits (NULL: no limit). It also takes the
-- tokens that the process wants, of a bucket that is filled with p_rates tokens a second (NULL: no
-- limit). It returns the permits that the process has now, the new tokens, and if there is no
-- token, the time until the next one.
--
-- While other processes want more permits than they have, each may have an equal part. A process
-- that has more begins no attempt, and gives the surplus back as its attempts end. If there are
-- fewer permits than processes, each process has one by turns.
--
-- A process passes on what its code or a stored policy says, which may be any number.
CREATE FUNCTION lease_destinations(
    p_instance uuid, p_names text[], p_limits int[], p_used int[], p_permits int[],
    p_rates float8[], p_buckets int[], p_tokens int[], p_lease interval
) RETURNS TABLE (destination text, permits int, tokens int, wait_ms bigint)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    -- A turn is no shorter, or most of the time would be lost in between.
    c_turn CONSTANT interval := '1 second';
    c_longest_ms CONSTANT bigint := 86400000;
    v record;
    v_row record;
    v_now timestamptz;
    v_own destination_leases%ROWTYPE;
    v_others record;
    v_part int;
    v_held int;
    v_filled float8;
BEGIN
    INSERT INTO destinations (name)
    SELECT i.name FROM unnest(p_names) AS i(name) ORDER BY i.name COLLATE "C"
    ON CONFLICT DO NOTHING;
    -- In sorted order, so that two such calls don't deadlock.
    FOR v IN
        SELECT * FROM unnest(
            p_names, p_limits, p_used, p_permits, p_rates, p_buckets, p_tokens
        ) AS i(name, maximum, used, permits, rate, bucket, tokens)
        ORDER BY i.name COLLATE "C"
    LOOP
        SELECT d.tokens, d.filled_at INTO v_row FROM destinations d
        WHERE d.name = v.name FOR NO KEY UPDATE;
        v_now := clock_timestamp();
        destination := v.name;
        permits := 0;
        tokens := 0;
        wait_ms := 0;
        IF v.maximum IS NOT NULL THEN
            DELETE FROM destination_leases l WHERE l.name = v.name AND l.expires_at <= v_now;
            SELECT * INTO v_own FROM destination_leases l
            WHERE l.name = v.name AND l.instance = p_instance;
            SELECT
                coalesce(sum(l.permits), 0) AS permits, count(*)::int AS number,
                count(*) FILTER (
                    WHERE l.permits = 0 AND l.since < CASE
                        WHEN v_own.permits > 0 AND v_own.since > v_now - c_turn THEN '-infinity'
                        WHEN v_own.permits > 0 THEN 'infinity'
                        ELSE coalesce(v_own.since, 'infinity')
                    END
                ) AS before
            INTO v_others FROM destination_leases l
            WHERE l.name = v.name AND l.instance <> p_instance;
            v_part := v.maximum / (v_others.number + 1);
            IF v_part > 0 THEN
                permits := greatest(0, least(v.permits, v.maximum - (
                    SELECT coalesce(sum(greatest(l.permits, least(l.wanted, v_part))), 0)
                    FROM destination_leases l
                    WHERE l.name = v.name AND l.instance <> p_instance
                )));
            ELSE
                permits := greatest(0, least(
                    v.permits, 1, v.maximum - v_others.permits - v_others.before
                ));
            END IF;
            -- Attempts under way hold theirs until they end.
            v_held := greatest(permits, least(v.used, v.maximum - v_others.permits));
            IF v.permits = 0 THEN
                DELETE FROM destination_leases l
                WHERE l.name = v.name AND l.instance = p_instance;
            ELSE
                INSERT INTO destination_leases AS l (
                    name, instance, permits, wanted, since, expires_at
                )
                VALUES (v.name, p_instance, v_held, v.permits, v_now, v_now + p_lease)
                ON CONFLICT (name, instance) DO UPDATE
                SET permits = excluded.permits, wanted = excluded.wanted,
                    since = CASE
                        WHEN (l.permits > 0) = (excluded.permits > 0) THEN l.since
                        ELSE excluded.since
                    END,
                    expires_at = excluded.expires_at;
            END IF;
        END IF;
        IF v.rate IS NOT NULL AND v.tokens > 0 THEN
            v_filled := CASE WHEN v.rate > 0 THEN least(
                v.bucket,
                greatest(coalesce(v_row.tokens, v.bucket), 0) + v.rate * greatest(
                    CASE WHEN isfinite(v_row.filled_at)
                        THEN extract(epoch FROM v_now - v_row.filled_at)::float8
                    END,
                    0
                )
            ) ELSE 0 END;
            tokens := least(floor(v_filled)::int, v.tokens);
            IF tokens = 0 THEN
                wait_ms := CASE
                    WHEN v.rate > 0 THEN least(ceil((1 - v_filled) / v.rate * 1000), c_longest_ms)
                    ELSE c_longest_ms
                END;
            END IF;
            UPDATE destinations d
            SET tokens = v_filled - lease_destinations.tokens, filled_at = v_now
            WHERE d.name = v.name;
        END IF;
        RETURN NEXT;
    END LOOP;
END;
$$;

-- Removes up to p_limit rows of destinations that have said nothing for p_age: no policy, no leases
-- and an empty state. All processes have read them by then. Returns how many it removed.
CREATE FUNCTION forget_destinations(p_age interval, p_limit int) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_removed int;
BEGIN
    DELETE FROM destination_leases l WHERE l.expires_at <= v_now;
    WITH idle AS MATERIALIZED (
        SELECT d.name FROM destinations d
        WHERE d.policy IS NULL AND d.closed_until IS NULL AND d.state::text = '{}'
            AND d.changed_at <= v_now - p_age
            AND coalesce(d.filled_at, d.changed_at) <= v_now - p_age
            AND NOT EXISTS (SELECT FROM destination_leases l WHERE l.name = d.name OFFSET 0)
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    )
    DELETE FROM destinations d USING idle i WHERE d.name = i.name;
    GET DIAGNOSTICS v_removed = ROW_COUNT;
    RETURN v_removed;
END;
$$;
