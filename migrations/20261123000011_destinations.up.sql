-- The limits of destinations: permits for attempts at the same time, and tokens for attempts in a
-- period. Processes lease both in lumps, and what a process has leased expires.

-- Leases, gives back and renews for one process. For each destination it takes the permits that the
-- process uses (p_used) and could use (p_permits), of p_limits (NULL: no limit). It also takes the
-- tokens that the process wants, of a bucket that is filled with p_rates tokens a second (NULL: no
-- limit). It returns the permits that the process has now, the new tokens, and if there is no
-- token, the time until the next one.
--
-- While other processes want more permits than they have, each may have an equal part. A process
-- that has more gives the surplus back as its attempts end.
CREATE FUNCTION lease_destinations(
    p_instance uuid, p_names text[], p_limits int[], p_used int[], p_permits int[],
    p_rates float8[], p_buckets int[], p_tokens int[], p_lease interval
) RETURNS TABLE (destination text, permits int, tokens int, wait_ms bigint)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v record;
    v_row record;
    v_now timestamptz;
    v_others record;
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
            SELECT
                coalesce(sum(l.permits), 0)::int AS permits, count(*)::int AS number,
                coalesce(bool_or(l.permits < l.wanted), false) AS want_more
            INTO v_others FROM destination_leases l
            WHERE l.name = v.name AND l.instance <> p_instance;
            permits := greatest(least(v.permits, v.maximum - v_others.permits), 0);
            IF v_others.want_more THEN
                permits := least(
                    permits,
                    greatest(v.used, ceil(v.maximum::float8 / (v_others.number + 1))::int)
                );
            END IF;
            IF v.permits = 0 THEN
                DELETE FROM destination_leases l
                WHERE l.name = v.name AND l.instance = p_instance;
            ELSE
                INSERT INTO destination_leases AS l (name, instance, permits, wanted, expires_at)
                VALUES (v.name, p_instance, permits, v.permits, v_now + p_lease)
                ON CONFLICT (name, instance) DO UPDATE
                SET permits = excluded.permits, wanted = excluded.wanted,
                    expires_at = excluded.expires_at;
            END IF;
        END IF;
        IF v.rate IS NOT NULL AND v.tokens > 0 THEN
            v_filled := least(
                v.bucket,
                coalesce(v_row.tokens, v.bucket) + v.rate * greatest(
                    extract(epoch FROM v_now - coalesce(v_row.filled_at, v_now))::float8, 0
                )
            );
            tokens := least(floor(v_filled)::int, v.tokens);
            IF tokens = 0 THEN
                wait_ms := ceil((1 - v_filled) / v.rate * 1000)::bigint;
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
