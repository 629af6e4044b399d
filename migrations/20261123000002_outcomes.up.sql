-- How requests ended: outcomes, their handover, failed attempts, and keys.

-- One row per finished request, in a ring of partitions by time. A partition whose rows have all
-- outlived their retention is truncated. So there are no row-by-row deletes and no vacuum debt, no
-- partition is missing when it is needed, and no right to change the schema is needed at run time.
-- Dead letters (discarded and ambiguous requests) are in slot -1, because they must not expire.
CREATE TABLE outcomes (
    slot smallint NOT NULL,
    id uuid NOT NULL,
    channel_name text COLLATE "C" NOT NULL,
    channel_args text COLLATE "C" NOT NULL,
    status text NOT NULL CHECK (status IN ('completed', 'discarded', 'cancelled', 'ambiguous')),
    attempts int NOT NULL,
    created_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    -- NULL: kept until purged.
    expires_at timestamptz,
    http_status smallint,
    head text,
    body bytea,
    -- Why there is no response, or only part of one.
    error_class text,
    error text,
    -- What the application attached to the request.
    metadata json
) PARTITION BY LIST (slot);
ALTER TABLE outcomes ALTER COLUMN body SET STORAGE EXTERNAL;

DO $$
BEGIN
    EXECUTE 'CREATE TABLE outcomes_kept PARTITION OF outcomes FOR VALUES IN (-1)';
    FOR slot IN 0..15 LOOP
        EXECUTE format(
            'CREATE TABLE outcomes_%s PARTITION OF outcomes FOR VALUES IN (%s)', slot, slot
        );
    END LOOP;
END;
$$;
CREATE INDEX outcomes_id ON outcomes (id);

-- Channels whose outcomes are handed to an application in a transaction.
CREATE TABLE handled_channels (
    channel_name text COLLATE "C" PRIMARY KEY
);

-- Outcomes of these channels that have not been handed over yet.
CREATE TABLE unhandled (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- How many times handing the outcome over has failed.
    failures int NOT NULL DEFAULT 0,
    error text
);
CREATE INDEX unhandled_due ON unhandled (channel_name, due_at);

-- Takes one outcome that is due. It counts as handled once the transaction commits. A concurrent
-- transaction takes a different outcome. The status is NULL if the outcome no longer exists.
CREATE FUNCTION take_unhandled(p_channel text)
RETURNS TABLE (
    id uuid,
    status text,
    attempts int,
    http_status smallint,
    head text,
    body bytea,
    error_class text,
    error text,
    metadata text
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
#variable_conflict use_column
DECLARE
    v_id uuid;
BEGIN
    DELETE FROM unhandled d WHERE d.id = (
        SELECT u.id FROM unhandled u
        WHERE u.channel_name = p_channel AND u.due_at <= clock_timestamp()
        ORDER BY u.due_at LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING d.id INTO v_id;
    RETURN QUERY
    SELECT
        t.id, o.status, o.attempts, o.http_status, o.head, o.body, o.error_class, o.error,
        o.metadata::text
    FROM (SELECT v_id AS id) t LEFT JOIN outcomes o ON o.id = t.id
    WHERE t.id IS NOT NULL;
END;
$$;

-- The slot of an outcome that ends at p_at. Twelve slots span the retention; the remaining four
-- leave time for pruning.
--
-- This function has no search_path of its own. With one, it could not be inlined and would be
-- planned anew for each settled row, which takes longer than the rest of the settle.
CREATE FUNCTION outcome_slot(p_at timestamptz, p_retention interval) RETURNS smallint
LANGUAGE sql
STABLE
AS $$
    SELECT pg_catalog.int2(
        pg_catalog.int8(pg_catalog.floor(
            extract(epoch FROM p_at)
                OPERATOR(pg_catalog./)
                greatest(extract(epoch FROM p_retention) OPERATOR(pg_catalog./) 12, 1)
        )) OPERATOR(pg_catalog.%) 16
    );
$$;

-- Empties the slots that no outcome will enter soon and whose rows have all expired. Returns the
-- number of slots it emptied.
CREATE FUNCTION prune_outcomes(p_retention interval) RETURNS int
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_current int := outcome_slot(clock_timestamp(), p_retention);
    v_slot int;
    v_live boolean;
    v_emptied int := 0;
BEGIN
    -- One process prunes at a time; the others need not wait.
    IF NOT pg_try_advisory_xact_lock(
        hashtextextended(concat_ws('/', 'requeuest', current_schema(), 'prune'), 0)
    ) THEN
        RETURN 0;
    END IF;
    FOR ahead IN 1..3 LOOP
        v_slot := (v_current + ahead) % 16;
        CONTINUE WHEN pg_relation_size(format('outcomes_%s', v_slot)::regclass) = 0;
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM outcomes_%s WHERE expires_at > clock_timestamp())', v_slot
        ) INTO v_live;
        CONTINUE WHEN v_live;
        BEGIN
            EXECUTE format('LOCK TABLE outcomes_%s IN ACCESS EXCLUSIVE MODE NOWAIT', v_slot);
        EXCEPTION WHEN lock_not_available THEN
            -- A session is reading the slot. Try again next time, rather than make all sessions
            -- queue behind this lock.
            CONTINUE;
        END;
        -- Check again: processes with a different retention may have added rows before the lock was
        -- taken.
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM outcomes_%s WHERE expires_at > clock_timestamp())', v_slot
        ) INTO v_live;
        CONTINUE WHEN v_live;
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM unhandled u JOIN outcomes_%s o ON o.id = ANY (ARRAY[u.id]))'
            , v_slot
        ) INTO v_live;
        CONTINUE WHEN v_live;
        EXECUTE format('TRUNCATE outcomes_%s', v_slot);
        v_emptied := v_emptied + 1;
    END LOOP;
    RETURN v_emptied;
END;
$$;

-- Failed attempts only: a request that is answered at once needs no history. A request keeps its
-- first 3 and its last 20.
CREATE TABLE attempts (
    id uuid NOT NULL,
    number int NOT NULL,
    ended_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    duration_ms int NOT NULL,
    http_status smallint,
    error_class text NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (id, number)
);
CREATE INDEX attempts_ended_at ON attempts (ended_at);

-- A caller's key for a request. A second call with the same key attaches to the first request.
CREATE TABLE request_keys (
    channel_name text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    id uuid NOT NULL,
    fingerprint bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (channel_name, key)
);
CREATE INDEX request_keys_created_at ON request_keys (created_at);
-- Used when a replay takes over a key, and to find keys of requests that no longer exist.
CREATE INDEX request_keys_id ON request_keys (id);

-- Ordering and supersede keys that a transaction with many keys has claimed; claim_keys explains.
-- Always empty for a reader: a transaction deletes its own rows before it ends.
CREATE UNLOGGED TABLE claimed_keys (
    lock bigint PRIMARY KEY
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

-- What the whole fleet knows about an origin.
CREATE TABLE destinations (
    origin text COLLATE "C" PRIMARY KEY,
    paused_until timestamptz,
    breaker json,
    limits json,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
