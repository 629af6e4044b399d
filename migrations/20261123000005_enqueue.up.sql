-- How requests enter the queue.

-- `enqueue` and `enqueue_many` have the rights of the schema's owner, so a role that may only
-- execute them can persist requests and can't read any. They return ids, names of keys that the
-- caller gave, and encrypted fingerprints, and never what else a row holds.

-- Ordering keys and supersede keys are locked until the end of the transaction. A transaction takes
-- up to 64 advisory locks, one for each key. The server's lock table is shared by all databases and
-- has room for some thousand locks, so a transaction with more keys claims the rest of them by
-- rows:
--
-- 1. It takes the schema's bulk lock, shared, which tells others that there may be claims.
-- 2. It waits until no other transaction has the advisory lock of the key.
-- 3. It inserts a row into claimed_keys. Another transaction that inserts the same row waits for
--    the end of this one. The row is deleted at once, which changes nothing for the other.
--
-- A transaction that takes the advisory lock of a key looks next whether the bulk lock is taken. If
-- it is, the transaction inserts the row too. If it isn't, a claim that begins later waits in
-- step 2.

CREATE FUNCTION bulk_lock() RETURNS bigint
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$ SELECT hashtextextended(concat_ws('/', 'requeuest', current_schema(), 'bulk'), 0) $$;

-- The advisory lock of a key.
CREATE FUNCTION key_lock(p_kind text, p_channel text, p_key text) RETURNS bigint
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$
    SELECT hashtextextended(
        concat_ws('/', 'requeuest', current_schema(), p_kind, p_channel, p_key), 0
    )
$$;

-- Claims keys by rows. Waits for transactions that have one of the keys.
CREATE FUNCTION claim_keys(p_locks bigint[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- Its errors are expected.
SET exit_on_error = off
AS $$
DECLARE
    c_at_once CONSTANT int := 64;
    v_locks bigint[] :=
        ARRAY(SELECT DISTINCT l.lock FROM unnest(p_locks) AS l(lock) ORDER BY l.lock);
    v_held bigint[];
    v_lock bigint;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(bulk_lock());
    -- From here on, the transaction takes no more advisory locks: see lock_key.
    PERFORM set_config('requeuest.key_locks', '64', true);
    FOR v_from IN 1..coalesce(cardinality(v_locks), 0) BY c_at_once LOOP
        -- The only way to release a lock before the end of the transaction is an error. Nothing is
        -- written in these blocks, so they cost no transaction ids.
        BEGIN
            v_held := ARRAY(
                SELECT l.lock FROM unnest(v_locks[v_from:v_from + c_at_once - 1]) AS l(lock)
                WHERE NOT pg_try_advisory_xact_lock(l.lock)
            );
            RAISE SQLSTATE 'RQ000';
        EXCEPTION WHEN SQLSTATE 'RQ000' THEN
            NULL;
        END;
        FOREACH v_lock IN ARRAY v_held LOOP
            BEGIN
                PERFORM pg_advisory_xact_lock(v_lock);
                RAISE SQLSTATE 'RQ000';
            EXCEPTION WHEN SQLSTATE 'RQ000' THEN
                NULL;
            END;
        END LOOP;
    END LOOP;
    -- In sorted order, so that two such calls don't deadlock.
    INSERT INTO claimed_keys (lock) SELECT l.lock FROM unnest(v_locks) AS l(lock);
    DELETE FROM claimed_keys c WHERE c.lock = ANY (v_locks);
END;
$$;

-- As claim_keys for one key, without a wait. Returns false if another transaction has the key.
CREATE FUNCTION try_claim_key(p_lock bigint) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET lock_timeout = '1ms'
AS $$
BEGIN
    INSERT INTO claimed_keys (lock) VALUES (p_lock);
    DELETE FROM claimed_keys c WHERE c.lock = p_lock;
    RETURN true;
EXCEPTION WHEN lock_not_available THEN
    RETURN false;
END;
$$;

-- Whether the current transaction has inserted this row, in whichever of its savepoints. For rows
-- that the statement sees: one of a transaction in progress is then its own.
CREATE FUNCTION is_own(p_xmin xid, p_created_at timestamptz) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_top bigint := pg_current_xact_id_if_assigned()::text::bigint;
    -- Savepoints have later numbers than their transaction. xmin is a number modulo 2^32.
    v_later bigint := (p_xmin::text::bigint - v_top) & 4294967295;
BEGIN
    RETURN coalesce(
        -- Later numbers than all are an error, and an old row's may look like one.
        p_created_at >= now() AND v_later < 2147483648
            AND pg_xact_status((v_top + v_later)::text::xid8) = 'in progress',
        false
    );
END;
$$;

-- Whether the current transaction has a key already, as far as its unfinished requests tell.
CREATE FUNCTION has_key(p_kind text, p_channel text, p_key text) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF p_kind = 'order' THEN
        RETURN coalesce((
            SELECT is_own(m.xmin, m.created_at) FROM mq_msgs m
            WHERE m.channel_args = p_key AND (p_channel = '' OR m.channel_name = p_channel)
                AND m.seq IS NOT NULL
            ORDER BY m.channel_name DESC, m.seq DESC LIMIT 1
        ), false);
    END IF;
    RETURN EXISTS (
        SELECT FROM mq_msgs m
        WHERE m.channel_name = p_channel AND m.supersede_key = p_key
            AND is_own(m.xmin, m.created_at)
    );
END;
$$;

-- How many advisory locks of keys the transaction may still take.
CREATE FUNCTION key_locks_left() RETURNS int
LANGUAGE sql
STABLE
AS $$
    SELECT 64 OPERATOR(pg_catalog.-) coalesce(
        nullif(pg_catalog.current_setting('requeuest.key_locks', true), ''), '0'
    )::pg_catalog.int4
$$;

-- Locks a key until the end of the transaction. Returns false if another transaction holds the lock
-- and p_wait is not set. Repeats the bodies of bulk_lock, key_lock and key_locks_left: three calls
-- would make an ordered insert a tenth slower.
CREATE FUNCTION lock_key(p_kind text, p_channel text, p_key text, p_wait boolean) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_lock bigint := hashtextextended(
        concat_ws('/', 'requeuest', current_schema(), p_kind, p_channel, p_key), 0
    );
    v_bulk bigint := hashtextextended(concat_ws('/', 'requeuest', current_schema(), 'bulk'), 0);
    v_left int :=
        64 - coalesce(nullif(current_setting('requeuest.key_locks', true), ''), '0')::int;
BEGIN
    IF v_left <= 0 AND p_wait THEN
        -- A key that is claimed must not be claimed again, nor locked: a transaction that has its
        -- advisory lock may wait for this one.
        IF NOT has_key(p_kind, p_channel, p_key) THEN
            PERFORM claim_keys(ARRAY[v_lock]);
        END IF;
        RETURN true;
    END IF;
    IF p_wait THEN
        PERFORM pg_advisory_xact_lock(v_lock);
    ELSIF NOT pg_try_advisory_xact_lock(v_lock) THEN
        RETURN false;
    END IF;
    PERFORM set_config('requeuest.key_locks', (65 - v_left)::text, true);
    -- Free, unless a transaction has claims or another session looks at this very moment.
    IF pg_try_advisory_lock(v_bulk) AND pg_advisory_unlock(v_bulk) THEN
        RETURN true;
    END IF;
    IF NOT p_wait THEN
        RETURN try_claim_key(v_lock);
    END IF;
    INSERT INTO claimed_keys (lock) VALUES (v_lock);
    DELETE FROM claimed_keys c WHERE c.lock = v_lock;
    RETURN true;
END;
$$;

-- Whether a request is in the queue or has ended. Both lookups are in one statement: a request that
-- ends between two statements would look as if it had never existed. In a function of its own,
-- because a statement locks all partitions that it may read until the end of the transaction.
CREATE FUNCTION is_known(p_id uuid) RETURNS boolean
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$
    SELECT EXISTS (SELECT FROM mq_msgs m WHERE m.id = p_id)
        OR EXISTS (SELECT FROM outcomes o WHERE o.id = p_id)
$$;

-- Whether a group is an ordering key: one that all channels share, or one within a channel.
CREATE FUNCTION is_ordered(p_group text) RETURNS boolean
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$ SELECT substr(p_group, 5, 3) IN ('|o|', '|c|') $$;

-- The channel within which an ordering key orders: none for a key that all channels share.
CREATE FUNCTION order_scope(p_channel text, p_group text) RETURNS text
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$ SELECT CASE WHEN substr(p_group, 5, 3) = '|o|' THEN '' ELSE p_channel END $$;

-- Locks an ordering key, in the same way as lock_key.
CREATE FUNCTION lock_order(p_channel text, p_group text, p_wait boolean) RETURNS boolean
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT lock_key(
        'order', CASE WHEN substr(p_group, 5, 3) = '|o|' THEN '' ELSE p_channel END, p_group, p_wait
    )
$$;

-- Locks the ordering keys of many requests, and waits for transactions that have one of them.
CREATE FUNCTION lock_orders(p_channels text[], p_groups text[], p_ordered boolean[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_channels text[];
    v_groups text[];
BEGIN
    -- In sorted order, so that two such calls don't deadlock.
    SELECT array_agg(k.channel), array_agg(k.key_group) INTO v_channels, v_groups FROM (
        SELECT min(i.channel) AS channel, i.key_group
        FROM unnest(p_channels, p_groups, p_ordered) AS i(channel, key_group, ordered)
        WHERE i.ordered
        GROUP BY i.key_group, order_scope(i.channel, i.key_group)
        ORDER BY i.key_group, order_scope(i.channel, i.key_group)
    ) k;
    IF cardinality(v_groups) <= key_locks_left() THEN
        PERFORM lock_order(k.channel, k.key_group, true)
        FROM unnest(v_channels, v_groups) AS k(channel, key_group);
        RETURN;
    END IF;
    -- As in lock_key.
    PERFORM claim_keys(ARRAY(
        SELECT key_lock('order', order_scope(k.channel, k.key_group), k.key_group)
        FROM unnest(v_channels, v_groups) AS k(channel, key_group)
        WHERE NOT has_key('order', k.channel, k.key_group)
    ));
END;
$$;

-- Another channel that has unfinished requests with this ordering key, or NULL. Call it while
-- holding the key's lock, in a later statement than the one that took the lock.
CREATE FUNCTION ordered_elsewhere(p_channel text, p_group text) RETURNS text
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    -- Two ranges of the index: a single condition `<>` would read the key's own backlog.
    SELECT CASE WHEN substr(p_group, 5, 3) = '|o|' THEN coalesce(
        (
            SELECT m.channel_name FROM mq_msgs m
            WHERE m.channel_args = p_group AND m.channel_name < p_channel AND m.seq IS NOT NULL
            LIMIT 1
        ),
        (
            SELECT m.channel_name FROM mq_msgs m
            WHERE m.channel_args = p_group AND m.channel_name > p_channel AND m.seq IS NOT NULL
            LIMIT 1
        )
    ) END;
$$;

-- A position after those of all requests of an ordering key, also if the sequence went back: a
-- logical replica gets the rows and not the sequence. Call it while holding the key's lock, in a
-- later statement than the one that took the lock.
CREATE FUNCTION next_seq(p_channel text, p_group text) RETURNS bigint
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    SELECT greatest(nextval('mq_seq'), (
        SELECT m.seq FROM mq_msgs m
        WHERE m.channel_name = p_channel AND m.channel_args = p_group AND m.seq IS NOT NULL
        ORDER BY m.seq DESC LIMIT 1
    ) + 1)
$$;

-- A stored fingerprint in hexadecimal digits, for a comparison that needs its key. One that is not
-- encrypted tells what to guess a request by, so only a role that may read it gets it.
CREATE FUNCTION shown_fingerprint(p_stored bytea) RETURNS text
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$
    SELECT encode(p_stored, 'hex')
    WHERE octet_length(p_stored) > 32 OR has_table_privilege(
        -- As in enqueue.
        coalesce(nullif(current_setting('role'), 'none'), session_user), 'request_keys', 'SELECT'
    )
$$;

-- Whether the role that calls can do no more than call, for functions that run as the schema's
-- owner: within them, the current role is the owner. No search_path, so it is inlined, and the
-- table is found by that of the function that asks.
CREATE FUNCTION calls_only() RETURNS boolean
LANGUAGE sql
STABLE
AS $$
    SELECT NOT pg_catalog.has_table_privilege(
        coalesce(nullif(pg_catalog.current_setting('role'), 'none'), session_user),
        'mq_msgs', 'INSERT'
    )
$$;

-- Refuses what the crate never asks for, from a role that can only call: the id of another request,
-- whose key or outcome it would replace; a channel's name that no handle can have; and metadata
-- that is too long or no `jsonb`, with which an operator's query over all requests would fail.
CREATE FUNCTION check_new(p_ids uuid[], p_channels text[], p_metadata text[]) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
-- One of its errors is expected.
SET exit_on_error = off
AS $$
DECLARE
    v_first uuid := (SELECT i.id FROM unnest(p_ids) AS i(id) ORDER BY i.id LIMIT 1);
    v_last uuid := (SELECT i.id FROM unnest(p_ids) AS i(id) ORDER BY i.id DESC LIMIT 1);
    v_known boolean;
BEGIN
    BEGIN
        -- Both in one statement, as in is_known. Ids rise with time, so few others are in between.
        v_known := EXISTS (
            SELECT FROM (
                SELECT m.id FROM mq_msgs m WHERE m.id >= v_first AND m.id <= v_last
                UNION ALL
                SELECT o.id FROM outcomes o WHERE o.id >= v_first AND o.id <= v_last
                OFFSET 0
            ) near
            WHERE near.id = ANY (p_ids)
        );
        -- Releases the locks of all partitions, as in claim_keys.
        RAISE SQLSTATE 'RQ000';
    EXCEPTION WHEN SQLSTATE 'RQ000' THEN
        NULL;
    END;
    IF v_known THEN
        RAISE EXCEPTION 'another request has this id' USING ERRCODE = 'unique_violation';
    END IF;
    IF EXISTS (
        SELECT FROM unnest(p_channels) AS i(channel)
        WHERE octet_length(i.channel) NOT BETWEEN 1 AND 55
    ) THEN
        RAISE EXCEPTION 'the name of a channel has 1 to 55 bytes'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF EXISTS (
        SELECT FROM unnest(p_metadata) AS i(metadata)
        -- Text that is no jsonb is an error.
        WHERE octet_length(i.metadata) > 4096 OR jsonb_typeof(i.metadata::jsonb) = ''
    ) THEN
        RAISE EXCEPTION 'the metadata has more than 4096 bytes'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
END;
$$;

-- Persists one request in the caller's transaction: a commit sends it, a rollback never does.
--
-- Verdicts:
--
-- - `inserted`
-- - `attached`: the key belongs to an earlier request with the same fingerprint, whose id is
--   returned.
-- - `conflict`: the key belongs to an earlier request that differs, whose id is returned. The
--   column `elsewhere` has its fingerprint in hexadecimal digits: the encrypted fingerprints of a
--   request differ if their keys do, and only the crate can compare them.
-- - `busy`: nothing was done, because another transaction has one of the keys and p_wait is not
--   set. The column `elsewhere` says which one, `supersede` or `ordered`.
-- - `elsewhere`: nothing was done, because another channel, which is returned, has unfinished
--   requests with the ordering key.
CREATE FUNCTION enqueue(
    p_id uuid,
    p_channel text,
    p_group text,
    p_ordered boolean,
    p_halts boolean,
    p_delay interval,
    p_deadline interval,
    p_name text,
    p_head text,
    p_body bytea,
    p_waiter uuid,
    -- `waiting`, or the state of a row that is inserted already claimed, with this lease.
    p_state mq_state,
    p_lease interval,
    p_key text,
    p_fingerprint bytea,
    p_supersede text,
    p_retention interval,
    -- Whether to notify runners. NULL: the transaction sends no notification at all.
    p_notify boolean,
    p_wait boolean,
    -- Set after a commit whose outcome is unknown. A request that is in the queue or has already
    -- ended is then left alone.
    p_again boolean,
    p_metadata json DEFAULT NULL,
    -- NULL if the group names it.
    p_destination text DEFAULT NULL,
    p_priority mq_priority DEFAULT 'normal'
) RETURNS TABLE (verdict text, request_id uuid, elsewhere text)
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
-- A caller's session may have planned this while the tables were empty, and keeps the plan.
SET enable_seqscan = off
AS $$
DECLARE
    v_timeout text;
    v_first record;
    v_elsewhere text;
    v_older uuid[];
    v_last bigint;
    v_seq bigint;
    v_now timestamptz;
    v_calls_only boolean := calls_only();
BEGIN
    IF v_calls_only AND p_state NOT IN ('waiting', 'deferred') THEN
        RAISE EXCEPTION
            'permission denied to send a request at once; a role that enqueues needs runner(false)'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    -- Take all locks first, always in this order: if a later lock is not available, nothing may
    -- have been done yet.
    IF p_supersede IS NOT NULL AND NOT lock_key('supersede', p_channel, p_supersede, p_wait) THEN
        RETURN QUERY SELECT 'busy', NULL::uuid, 'supersede';
        RETURN;
    END IF;
    IF p_ordered AND NOT lock_order(p_channel, p_group, p_wait) THEN
        RETURN QUERY SELECT 'busy', NULL::uuid, 'ordered';
        RETURN;
    END IF;
    -- From here on, all reads are in later statements than the locks. The snapshot of a single
    -- statement that did both could be older than the wait for the lock.
    IF p_again AND is_known(p_id) THEN
        RETURN QUERY SELECT 'inserted', p_id, NULL;
        RETURN;
    END IF;
    IF v_calls_only THEN
        PERFORM check_new(ARRAY[p_id], ARRAY[p_channel], ARRAY[p_metadata::text]);
    END IF;
    IF p_ordered THEN
        -- Repeats the body of ordered_elsewhere: in one statement, the two lookups take less time
        -- than a call.
        SELECT
            CASE WHEN substr(p_group, 5, 3) = '|o|' THEN coalesce(
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.channel_args = p_group AND m.channel_name < p_channel
                        AND m.seq IS NOT NULL
                    LIMIT 1
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.channel_args = p_group AND m.channel_name > p_channel
                        AND m.seq IS NOT NULL
                    LIMIT 1
                )
            ) END,
            -- A serializable transaction that reads the key's requests could not be committed after
            -- another one that inserts such a request. It relies on the sequence alone.
            CASE WHEN current_setting('transaction_isolation') <> 'serializable' THEN (
                SELECT m.seq FROM mq_msgs m
                WHERE m.channel_name = p_channel AND m.channel_args = p_group
                    AND m.seq IS NOT NULL
                ORDER BY m.seq DESC LIMIT 1
            ) END
        INTO v_elsewhere, v_last;
    END IF;
    IF p_key IS NOT NULL THEN
        IF NOT p_wait THEN
            -- A statement that ends with lock_not_available counts as `busy`.
            v_timeout := current_setting('lock_timeout');
            PERFORM set_config('lock_timeout', '1ms', true);
        END IF;
        -- The primary key makes a second transaction with the key wait for the first one. The loop
        -- ends when the key is either taken or seen to belong to another request.
        LOOP
            SELECT
                k.id, k.fingerprint = p_fingerprint AS same, k.fingerprint AS stored,
                is_known(k.id) AS present
            INTO v_first
            FROM request_keys k
            WHERE k.channel_name = p_channel AND k.key = p_key;
            IF v_first.present THEN
                RETURN QUERY SELECT
                    CASE WHEN v_first.same THEN 'attached' ELSE 'conflict' END, v_first.id,
                    CASE WHEN NOT v_first.same THEN shown_fingerprint(v_first.stored) END;
                RETURN;
            END IF;
            EXIT WHEN v_elsewhere IS NOT NULL;
            INSERT INTO request_keys AS k (channel_name, key, id, fingerprint)
            VALUES (p_channel, p_key, p_id, p_fingerprint)
            ON CONFLICT (channel_name, key) DO UPDATE
            SET id = excluded.id, fingerprint = excluded.fingerprint,
                created_at = excluded.created_at
            WHERE k.id = v_first.id;
            EXIT WHEN FOUND;
        END LOOP;
        IF NOT p_wait THEN
            -- A commit that notifies waits for all others that do.
            PERFORM set_config('lock_timeout', v_timeout, true);
        END IF;
    END IF;
    IF v_elsewhere IS NOT NULL THEN
        RETURN QUERY SELECT 'elsewhere', NULL::uuid, v_elsewhere;
        RETURN;
    END IF;
    IF p_supersede IS NOT NULL THEN
        -- Skips a row that a runner is claiming right now, because that request is being sent.
        SELECT array_agg(older.id) INTO v_older FROM (
            SELECT m.id FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.supersede_key = p_supersede
                AND m.attempts = 0 AND m.state IN ('waiting', 'behind', 'deferred', 'parked')
            FOR NO KEY UPDATE SKIP LOCKED
        ) older;
        -- An ordered one may be locked by a poll that moves it behind others, and not be sent.
        SELECT nullif(coalesce(v_older, '{}') || array_agg(older.id), '{}') INTO v_older FROM (
            SELECT m.id FROM mq_msgs m
            WHERE m.channel_name = p_channel AND m.supersede_key = p_supersede
                AND m.attempts = 0 AND m.state IN ('waiting', 'behind', 'deferred', 'parked')
                AND coalesce(m.seq, 0) > 0
                AND (v_older IS NULL OR NOT m.id = ANY (v_older))
            FOR NO KEY UPDATE
        ) older;
        IF v_older IS NOT NULL THEN
            -- The requests behind the older one are not locked until the caller commits.
            PERFORM set_config('requeuest.free_later', 'on', true);
            PERFORM end_requests(
                v_older, 'cancelled', 'superseded', 'a newer request took its place', p_retention,
                p_notify IS NOT NULL
            );
            PERFORM set_config('requeuest.free_later', '', true);
        END IF;
    END IF;
    IF p_ordered THEN
        -- As next_seq.
        v_seq := greatest(nextval('mq_seq'), v_last + 1);
    END IF;
    INSERT INTO mq_payloads (id, name, head, body, metadata)
    VALUES (p_id, p_name, p_head, p_body, p_metadata);
    v_now := clock_timestamp();
    INSERT INTO mq_msgs (
        id, channel_name, channel_args, attempt_at, seq, waiter, claim_no, attempts, state,
        priority, destination, deadline, supersede_key, halts
    )
    VALUES (
        p_id, p_channel, p_group,
        v_now + CASE WHEN p_state IN ('waiting', 'deferred') THEN p_delay ELSE p_lease END,
        v_seq, p_waiter, (p_state NOT IN ('waiting', 'deferred'))::int,
        (p_state NOT IN ('waiting', 'deferred'))::int, p_state,
        p_priority, p_destination, v_now + p_deadline, p_supersede, p_halts
    );
    IF p_notify THEN
        PERFORM pg_notify('mq_' || p_channel, ''), pg_notify('mq', '');
    END IF;
    RETURN QUERY SELECT 'inserted', p_id, NULL;
END;
$$;

-- Takes the callers' keys of many requests, in the same way as enqueue. Of several requests with
-- the same key, the first one gets it. Afterwards each key belongs to one of these requests, or to
-- an earlier request that is in the queue or has ended.
CREATE FUNCTION take_keys(
    p_ids uuid[], p_channels text[], p_keys text[], p_fingerprints bytea[]
) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    v_ids uuid[];
    v_channels text[];
    v_keys text[];
    v_fingerprints bytea[];
    v_absent uuid[];
    v_settled boolean;
BEGIN
    -- In sorted order, so that two such calls don't deadlock.
    SELECT array_agg(f.id), array_agg(f.channel), array_agg(f.key), array_agg(f.fingerprint)
    INTO v_ids, v_channels, v_keys, v_fingerprints
    FROM (
        SELECT DISTINCT ON (i.channel, i.key) i.id, i.channel, i.key, i.fingerprint
        FROM unnest(p_ids, p_channels, p_keys, p_fingerprints) WITH ORDINALITY
            AS i(id, channel, key, fingerprint, number)
        WHERE i.key IS NOT NULL
        ORDER BY i.channel, i.key, i.number
    ) f;
    LOOP
        SELECT array_agg(k.id) INTO v_absent
        FROM unnest(v_ids, v_channels, v_keys) AS f(id, channel, key)
        JOIN request_keys k ON k.channel_name = f.channel AND k.key = f.key
        WHERE k.id <> f.id AND NOT is_known(k.id);
        INSERT INTO request_keys AS k (channel_name, key, id, fingerprint)
        SELECT f.channel, f.key, f.id, f.fingerprint
        FROM unnest(v_ids, v_channels, v_keys, v_fingerprints) AS f(id, channel, key, fingerprint)
        ON CONFLICT (channel_name, key) DO UPDATE
        SET id = excluded.id, fingerprint = excluded.fingerprint, created_at = excluded.created_at
        WHERE k.id = ANY (v_absent);
        -- A key that another transaction took meanwhile belongs to its request now.
        SELECT bool_and(k.id IS NOT NULL AND (k.id = f.id OR is_known(k.id))) INTO v_settled
        FROM unnest(v_ids, v_channels, v_keys) AS f(id, channel, key)
        LEFT JOIN request_keys k ON k.channel_name = f.channel AND k.key = f.key;
        EXIT WHEN v_settled;
    END LOOP;
END;
$$;

-- Persists many requests in the caller's transaction and in their order. Returns a row for each
-- request that it did not insert, with a verdict of enqueue:
--
-- - `attached`, with the id of the earlier request. The other requests are inserted.
-- - `conflict`, with the id and the fingerprint of the earlier request, for each such request. Or
--   `elsewhere`, with the channel, for one. Then nothing was done, and there are no other rows.
CREATE FUNCTION enqueue_many(
    p_ids uuid[],
    p_channels text[],
    p_groups text[],
    p_delays_ms bigint[],
    p_deadlines_ms bigint[],
    p_heads text[],
    p_bodies bytea[],
    p_ordered boolean[],
    p_halts boolean[],
    p_name text,
    p_notify boolean,
    p_metadata text[] DEFAULT NULL,
    p_keys text[] DEFAULT NULL,
    p_fingerprints bytea[] DEFAULT NULL,
    p_destinations text[] DEFAULT NULL,
    p_priorities text[] DEFAULT NULL
) RETURNS TABLE (request_id uuid, verdict text, earlier uuid, elsewhere text)
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path FROM CURRENT
-- As for enqueue.
SET enable_seqscan = off
-- A plan made for one call's arrays is not worth the time it takes.
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_keyed boolean := EXISTS (SELECT FROM unnest(p_keys) AS i(key) WHERE i.key IS NOT NULL);
    -- Requests whose keys belong to others.
    v_attached uuid[] := '{}';
    v_earlier uuid[];
    v_same boolean[];
    v_stored bytea[];
    v_id uuid;
    v_elsewhere text;
    v_states mq_state[];
    v_lift bigint;
    v_now timestamptz;
BEGIN
    IF calls_only() THEN
        PERFORM check_new(p_ids, p_channels, p_metadata);
    END IF;
    IF true = ANY (p_ordered) THEN
        -- Before the statement that takes the sequence numbers.
        PERFORM lock_orders(p_channels, p_groups, p_ordered);
    END IF;
    IF v_keyed THEN
        PERFORM take_keys(p_ids, p_channels, p_keys, p_fingerprints);
        SELECT
            coalesce(array_agg(i.id), '{}'), array_agg(k.id),
            array_agg(k.fingerprint = i.fingerprint), array_agg(k.fingerprint)
        INTO v_attached, v_earlier, v_same, v_stored
        FROM unnest(p_ids, p_channels, p_keys, p_fingerprints)
            AS i(id, channel, key, fingerprint)
        JOIN request_keys k ON k.channel_name = i.channel AND k.key = i.key
        WHERE k.id <> i.id;
        IF false = ANY (v_same) THEN
            DELETE FROM request_keys k WHERE k.id = ANY (p_ids);
            RETURN QUERY SELECT c.id, 'conflict', c.earlier, shown_fingerprint(c.stored)
            FROM unnest(v_attached, v_earlier, v_same, v_stored)
                WITH ORDINALITY AS c(id, earlier, same, stored, number)
            WHERE NOT c.same ORDER BY c.number;
            RETURN;
        END IF;
    END IF;
    IF true = ANY (p_ordered) THEN
        SELECT c.id, c.holder INTO v_id, v_elsewhere
        FROM (
            SELECT i.id, coalesce(
                ordered_elsewhere(i.channel, i.key_group),
                -- Another channel of this call.
                CASE WHEN order_scope(i.channel, i.key_group) = '' THEN
                    nullif(CASE WHEN i.low = i.channel THEN i.high ELSE i.low END, i.channel)
                END
            ) AS holder
            FROM (
                SELECT
                    r.*, min(r.channel) OVER same_key AS low, max(r.channel) OVER same_key AS high
                FROM unnest(p_ids, p_channels, p_groups, p_ordered)
                    AS r(id, channel, key_group, ordered)
                WHERE r.ordered AND r.id <> ALL (v_attached)
                WINDOW same_key AS (PARTITION BY r.key_group)
            ) i
        ) c
        WHERE c.holder IS NOT NULL LIMIT 1;
        IF FOUND THEN
            IF v_keyed THEN
                DELETE FROM request_keys k WHERE k.id = ANY (p_ids);
            END IF;
            RETURN QUERY SELECT v_id, 'elsewhere', NULL::uuid, v_elsewhere;
            RETURN;
        END IF;
        -- Of the requests with the same key, only the first may be due: the others would only be
        -- moved behind it. No transaction can remove the first without seeing the others.
        SELECT array_agg(
            CASE WHEN i.ordered AND i.place > 1 THEN 'behind'::mq_state ELSE 'waiting' END
            ORDER BY i.number
        ) INTO v_states FROM (
            SELECT r.number, r.ordered, row_number() OVER (
                PARTITION BY r.channel, r.key_group, r.id <> ALL (v_attached) ORDER BY r.number
            ) AS place
            FROM unnest(p_ids, p_channels, p_groups, p_ordered) WITH ORDINALITY
                AS r(id, channel, key_group, ordered, number)
        ) i;
        -- If the sequence went back, the positions are lifted above those of the keys' requests, as
        -- by next_seq.
        SELECT coalesce(max(last.seq) FILTER (WHERE last.seq >= base.seq), 0) INTO v_lift
        FROM (SELECT nextval('mq_seq') AS seq) base, (
            SELECT DISTINCT i.channel, i.key_group
            FROM unnest(p_channels, p_groups, p_ordered) AS i(channel, key_group, ordered)
            -- As in enqueue.
            WHERE i.ordered AND current_setting('transaction_isolation') <> 'serializable'
        ) k, LATERAL (
            SELECT m.seq FROM mq_msgs m
            WHERE m.channel_name = k.channel AND m.channel_args = k.key_group
                AND m.seq IS NOT NULL
            ORDER BY m.seq DESC LIMIT 1
        ) last;
    END IF;
    v_now := clock_timestamp();
    INSERT INTO mq_payloads (id, name, head, body, metadata)
    SELECT i.id, p_name, i.head, i.body, i.metadata::json
    FROM unnest(p_ids, p_heads, p_bodies, p_metadata) AS i(id, head, body, metadata)
    WHERE i.id <> ALL (v_attached);
    INSERT INTO mq_msgs (
        id, channel_name, channel_args, attempt_at, created_at, seq, state, priority, destination,
        deadline, halts
    )
    SELECT
        i.id, i.channel, i.key_group, v_now + i.delay_ms * interval '1 millisecond', v_now,
        -- unnest returns rows in the order of the arrays.
        CASE WHEN i.ordered THEN v_lift + nextval('mq_seq') END, coalesce(i.state, 'waiting'),
        coalesce(i.priority::mq_priority, 'normal'), i.destination,
        v_now + i.deadline_ms * interval '1 millisecond', i.halts
    FROM unnest(
        p_ids, p_channels, p_groups, p_ordered, p_halts, p_delays_ms, p_deadlines_ms,
        p_destinations, v_states, p_priorities
    )
        AS i(
            id, channel, key_group, ordered, halts, delay_ms, deadline_ms, destination, state,
            priority
        )
    WHERE i.id <> ALL (v_attached);
    IF p_notify THEN
        PERFORM tell_runners(told.channel)
        FROM (SELECT DISTINCT i.channel FROM unnest(p_channels) AS i(channel)) told;
    END IF;
    RETURN QUERY
    SELECT i.id, 'attached', i.earlier, NULL::text FROM unnest(v_attached, v_earlier)
        AS i(id, earlier);
END;
$$;
