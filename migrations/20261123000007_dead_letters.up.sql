-- Dead letters, that is, requests that ended as discarded or ambiguous: listing, replay,
-- resolution, reconciliation and purging.
--
-- Each change of a dead letter locks the outcome first, then the row that halts an ordering key,
-- then the payload.

-- When a dead letter expires. The session setting `requeuest.dead_letter_retention` is the time in
-- milliseconds. A session without it makes dead letters that are kept until they are purged.
--
-- A trigger, because several statements make dead letters, and because a default of the column
-- would apply to all outcomes.
CREATE FUNCTION set_expiry() RETURNS trigger
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    NEW.expires_at := NEW.finished_at + dead_letter_retention();
    RETURN NEW;
END;
$$;

CREATE FUNCTION dead_letter_retention() RETURNS interval
LANGUAGE sql
STABLE
SET search_path FROM CURRENT
AS $$
    SELECT nullif(current_setting('requeuest.dead_letter_retention', true), '')::bigint
        * interval '1 millisecond'
$$;

CREATE TRIGGER outcomes_kept_expiry BEFORE INSERT ON outcomes_kept
    FOR EACH ROW WHEN (NEW.expires_at IS NULL) EXECUTE FUNCTION set_expiry();
ALTER TABLE outcomes_kept ENABLE ALWAYS TRIGGER outcomes_kept_expiry;

-- Scheme, host and port of a stored request, without its credentials. NULL for a head that can't be
-- read, so that such a request doesn't keep the others from being listed.
CREATE FUNCTION request_destination(p_head text) RETURNS text
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    -- By "C", or a Turkish locale would make another letter of an I. A regular expression with
    -- backslashes in dollars, for sessions whose standard_conforming_strings is off.
    SELECT lower((u.url[1] || '://' || CASE
        WHEN u.url[2] ~ ':[0-9]+$' THEN u.url[2]
        ELSE rtrim(u.url[2], ':') || CASE lower(u.url[1]) WHEN 'https' THEN ':443' ELSE ':80' END
    END) COLLATE "C")
    FROM regexp_match(
        -- No URL of this crate's ends later. A longer head is a damaged one.
        left(p_head, 16384) COLLATE "C",
        $re$^\{"method":"[^"\\]*","url":"(https?)://(?:[^/?#"\\]*@)?([^/?#"\\@]+)$re$, 'i'
    ) AS u(url);
$$;

-- The limit key of a stored request, or NULL. Only escapes that the crate writes are read, so that
-- what is read is always JSON.
CREATE FUNCTION request_limit_key(p_head text) RETURNS text
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    SELECT ('"' || substring(
        -- No limit key begins earlier.
        right(p_head, 2048) FROM
        $re$(?x)
            "limit_key":"((?:
                [^"\\\u0001-\u001f] | \\["\\bfnrt] | \\u00(?:0[1-9a-f]|1[0-9a-f])
            )+)"(?:,"awaited":true)?[}][}]\Z
        $re$
    ) || '"')::json #>> '{}'
$$;

-- The priority of a stored request.
CREATE FUNCTION request_priority(p_head text) RETURNS mq_priority
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    SELECT coalesce(substring(
        right(p_head, 2048) FROM
        $re$(?x)
            "priority":"(high|low)"
            (?:,"limit_key":"(?:[^"\\]|\\.)*")?(?:,"awaited":true)?[}][}]\Z
        $re$
    ), 'normal')::mq_priority
$$;

-- A stored head without the mark of a caller that gets the response, whatever it is. No caller
-- waits for a dead letter that is sent again.
CREATE FUNCTION without_caller(p_head text) RETURNS text
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    SELECT regexp_replace(p_head, ',"awaited":true[}][}]$', '}}')
$$;

-- Locks an ordering key for a request that is about to return to it. Returns NULL, or the reason
-- why the request can't return, in the terms of replay_request.
CREATE FUNCTION refuses_order(p_channel text, p_group text) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    IF NOT lock_order(p_channel, p_group, false) THEN
        RETURN 'busy';
    END IF;
    IF ordered_elsewhere(p_channel, p_group) IS NOT NULL THEN
        RETURN 'elsewhere';
    END IF;
    RETURN NULL;
END;
$$;

-- Whether a stored request is encrypted.
CREATE FUNCTION is_sealed(p_head text) RETURNS boolean
LANGUAGE sql
IMMUTABLE
SET search_path FROM CURRENT
AS $$
    SELECT left(p_head, 16384) ~ $re$^\{"method":"[^"\\]*","url":"[^"\\]*","sealed":"$re$
$$;

-- Makes a new request from a dead letter. An encrypted one needs its content encrypted for the new
-- id, as p_head and p_body. Returns:
--
-- - `replayed`
-- - `sealed`: nothing was done, because the request is encrypted and p_head is NULL.
-- - `gone`: its payload no longer exists.
-- - `busy`: nothing was done, because another transaction has its ordering key.
-- - `elsewhere`: nothing was done, because another channel has its ordering key.
-- - NULL: it isn't a dead letter.
CREATE FUNCTION replay_request(
    p_id uuid, p_new uuid, p_retention interval, p_head text DEFAULT NULL,
    p_body bytea DEFAULT NULL
) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_kept outcomes%ROWTYPE;
    v_in_place boolean;
    v_ordered boolean;
    v_refused text;
    v_halts boolean;
    v_destination text;
    v_priority mq_priority;
    v_seq bigint;
    v_now timestamptz;
BEGIN
    SELECT * INTO v_kept FROM outcomes o WHERE o.id = p_id AND o.slot = -1 FOR UPDATE;
    IF NOT FOUND THEN
        -- A second call, after a commit whose outcome is unknown.
        IF EXISTS (SELECT FROM outcomes o WHERE o.id = p_id AND o.replayed_as = p_new) THEN
            RETURN 'replayed';
        END IF;
        RETURN NULL;
    END IF;
    PERFORM FROM mq_msgs m WHERE m.id = p_id AND m.state = 'halted' FOR UPDATE;
    v_in_place := FOUND;
    v_ordered := is_ordered(v_kept.channel_args);
    IF v_ordered AND NOT v_in_place THEN
        v_refused := refuses_order(v_kept.channel_name, v_kept.channel_args);
        IF v_refused IS NOT NULL THEN
            RETURN v_refused;
        END IF;
    END IF;
    v_now := clock_timestamp();
    UPDATE mq_payloads p
    SET id = p_new, head = without_caller(coalesce(p_head, p.head)),
        body = CASE WHEN p_head IS NULL THEN p.body ELSE p_body END,
        returns = 0, response_status = NULL, response_head = NULL, response_body = NULL
    WHERE p.id = p_id AND (p_head IS NOT NULL OR NOT is_sealed(p.head))
    RETURNING
        p.halts, coalesce(request_limit_key(p.head), request_destination(p.head)),
        request_priority(p.head)
    INTO v_halts, v_destination, v_priority;
    IF NOT FOUND THEN
        IF EXISTS (SELECT FROM mq_payloads p WHERE p.id = p_id) THEN
            RETURN 'sealed';
        END IF;
        RETURN 'gone';
    END IF;
    IF v_in_place THEN
        UPDATE mq_msgs m
        SET id = p_new, attempt_at = v_now, created_at = v_now, waiter = NULL, claim_no = 0,
            attempts = 0, lost = 0, state = 'waiting'
        WHERE m.id = p_id;
    ELSE
        IF v_ordered THEN
            v_seq := next_seq(v_kept.channel_name, v_kept.channel_args);
        END IF;
        INSERT INTO mq_msgs (
            id, channel_name, channel_args, attempt_at, seq, priority, destination, halts
        )
        VALUES (
            p_new, v_kept.channel_name, v_kept.channel_args, v_now, v_seq, v_priority,
            CASE
                WHEN substr(v_kept.channel_args, 5) <> '|d|' || v_destination THEN v_destination
            END,
            v_ordered AND v_halts
        );
    END IF;
    UPDATE request_keys k SET id = p_new WHERE k.id = p_id;
    -- Not an UPDATE: a session that waits for the lock of a row gets an error if the row moves to
    -- another partition.
    DELETE FROM outcomes o WHERE o.id = p_id AND o.slot = -1;
    v_kept.slot := outcome_slot(v_now, p_retention);
    v_kept.expires_at := v_now + p_retention;
    v_kept.replayed_as := p_new;
    UPDATE unhandled u SET slot = v_kept.slot WHERE u.id = ANY (ARRAY(
        SELECT w.id FROM unhandled w WHERE w.id = p_id FOR UPDATE SKIP LOCKED
    ));
    IF NOT FOUND AND EXISTS (SELECT FROM unhandled u WHERE u.id = p_id) THEN
        -- A handler has the outcome at this moment, and may be what replays it. If it fails, the
        -- outcome is handed over again, so it goes to where outcomes wait for their handlers.
        v_kept.slot := -2;
    END IF;
    INSERT INTO outcomes SELECT v_kept.*;
    PERFORM tell_runners(v_kept.channel_name);
    RETURN 'replayed';
END;
$$;

-- Records whether an ambiguous request was sent. If p_finished is given, the call only applies
-- while the outcome still has this finished_at, that is, while it is the outcome that the receiver
-- was asked about. Returns `resolved`, or the same as replay_request; also `busy` while the outcome
-- is being handed over.
CREATE FUNCTION resolve_request(
    p_id uuid, p_sent boolean, p_finished timestamptz, p_retention interval
) RETURNS text
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_kept outcomes%ROWTYPE;
    v_in_place boolean;
    v_ordered boolean;
    v_refused text;
    v_attempts int;
    v_returns int;
    v_halts boolean;
    v_destination text;
    v_priority mq_priority;
    v_seq bigint;
    v_now timestamptz;
BEGIN
    SELECT * INTO v_kept FROM outcomes o
    WHERE o.id = p_id AND o.slot = -1 AND o.status = 'ambiguous'
        AND (p_finished IS NULL OR o.finished_at = p_finished)
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    BEGIN
        PERFORM FROM unhandled u WHERE u.id = p_id FOR UPDATE NOWAIT;
    EXCEPTION WHEN lock_not_available THEN
        -- The first outcome is being handed over. The lock lasts as long as that takes.
        RETURN 'busy';
    END;
    PERFORM FROM mq_msgs m WHERE m.id = p_id AND m.state = 'halted' FOR UPDATE;
    v_in_place := FOUND;
    v_now := clock_timestamp();
    IF p_sent THEN
        DELETE FROM mq_msgs m WHERE m.id = p_id AND m.state = 'halted';
        DELETE FROM mq_payloads p WHERE p.id = p_id;
        DELETE FROM outcomes o WHERE o.id = p_id AND o.slot = -1;
        v_kept.slot := outcome_slot(v_now, p_retention);
        v_kept.status := 'completed';
        v_kept.finished_at := v_now;
        v_kept.expires_at := v_now + p_retention;
        v_kept.http_status := NULL;
        v_kept.head := NULL;
        v_kept.body := NULL;
        v_kept.error_class := 'response_unknown';
        v_kept.error := 'it was sent, and its response is not known';
        INSERT INTO outcomes SELECT v_kept.*;
        -- The outcome changed, so it is handed over again.
        INSERT INTO unhandled AS u (id, channel_name, slot)
        SELECT p_id, h.channel_name, v_kept.slot FROM handled_channels h
        WHERE h.channel_name = v_kept.channel_name
        ON CONFLICT (id) DO UPDATE
        SET slot = excluded.slot, due_at = excluded.due_at, failures = 0, failing_since = NULL,
            error = NULL;
        IF v_in_place THEN
            PERFORM tell_runners(v_kept.channel_name);
        END IF;
    ELSE
        v_ordered := is_ordered(v_kept.channel_args);
        IF v_ordered AND NOT v_in_place THEN
            v_refused := refuses_order(v_kept.channel_name, v_kept.channel_args);
            IF v_refused IS NOT NULL THEN
                RETURN v_refused;
            END IF;
        END IF;
        UPDATE mq_payloads p
        SET returns = least(p.returns, 2147483646) + 1, head = without_caller(p.head)
        WHERE p.id = p_id
        RETURNING
            p.returns, p.halts, coalesce(request_limit_key(p.head), request_destination(p.head)),
            request_priority(p.head)
        INTO v_returns, v_halts, v_destination, v_priority;
        IF NOT FOUND THEN
            RETURN 'gone';
        END IF;
        -- The attempt that did not arrive is not counted, so that a policy of one attempt allows
        -- the next.
        v_attempts := greatest(v_kept.attempts, 1) - 1;
        IF v_in_place THEN
            UPDATE mq_msgs m
            SET attempt_at = v_now, began_at = v_now, waiter = NULL,
                claim_no = next_claim_no(m.claim_no),
                attempts = v_attempts, lost = 0, state = 'waiting'
            WHERE m.id = p_id;
        ELSE
            IF v_ordered THEN
                v_seq := next_seq(v_kept.channel_name, v_kept.channel_args);
            END IF;
            INSERT INTO mq_msgs (
                id, channel_name, channel_args, attempt_at, began_at, created_at, seq, claim_no,
                attempts, priority, destination, halts
            )
            VALUES (
                p_id, v_kept.channel_name, v_kept.channel_args, v_now, v_now, v_kept.created_at,
                v_seq,
                -- Higher than any claim_no the request had before, so that an old claim is never
                -- taken for a current one.
                least(v_returns, 2000) * 1000000, v_attempts, v_priority,
                CASE
                    WHEN substr(v_kept.channel_args, 5) <> '|d|' || v_destination THEN v_destination
                END,
                v_ordered AND v_halts
            );
        END IF;
        -- The request has not ended after all.
        DELETE FROM unhandled u WHERE u.id = p_id;
        DELETE FROM outcomes o WHERE o.id = p_id AND o.slot = -1;
        PERFORM tell_runners(v_kept.channel_name);
    END IF;
    PERFORM pg_notify('requeuest_00000000000000000000000000000000', p_id::text);
    RETURN 'resolved';
END;
$$;

-- Deletes dead letters and releases the ordering keys that they halt. Returns the number of dead
-- letters it deleted.
CREATE FUNCTION purge_requests(p_ids uuid[]) RETURNS bigint
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_ids uuid[];
BEGIN
    SELECT array_agg(kept.id) INTO v_ids FROM (
        SELECT o.id FROM outcomes o
        WHERE o.slot = -1 AND o.id = ANY (p_ids) ORDER BY o.id FOR UPDATE
    ) kept;
    PERFORM tell_runners(let_go.channel_name) FROM (
        SELECT DISTINCT m.channel_name FROM mq_msgs m
        WHERE m.id = ANY (v_ids) AND m.state = 'halted'
    ) let_go;
    DELETE FROM mq_msgs m WHERE m.id = ANY (v_ids) AND m.state = 'halted';
    DELETE FROM mq_payloads p WHERE p.id = ANY (v_ids);
    DELETE FROM attempts a WHERE a.id = ANY (v_ids);
    DELETE FROM request_keys k WHERE k.id = ANY (v_ids);
    DELETE FROM outcomes o WHERE o.slot = -1 AND o.id = ANY (v_ids);
    RETURN coalesce(cardinality(v_ids), 0);
END;
$$;

-- Deletes expired dead letters, up to p_limit, the oldest first. Returns how many it looked at, and
-- how many it deleted. Those that are still needed are looked at again a day later:
--
-- - those that halt an ordering key, because the requests behind them would be sent;
-- - those that wait for a handler.
CREATE FUNCTION purge_expired(p_limit int) RETURNS TABLE (looked bigint, purged bigint)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_ids uuid[];
    v_needed uuid[];
BEGIN
    -- Not those that an operator changes at this moment.
    SELECT coalesce(array_agg(expired.id), '{}') INTO v_ids FROM (
        SELECT o.id FROM outcomes_kept o
        WHERE o.expires_at <= v_now
        ORDER BY o.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ) expired;
    v_needed := ARRAY(
        SELECT m.id FROM mq_msgs m WHERE m.id = ANY (v_ids)
        UNION ALL
        SELECT u.id FROM unhandled u
        WHERE u.id = ANY (v_ids) AND EXISTS (
            SELECT FROM handled_channels h WHERE h.channel_name = u.channel_name
        )
    );
    UPDATE outcomes_kept o SET expires_at = v_now + interval '1 day' WHERE o.id = ANY (v_needed);
    looked := cardinality(v_ids);
    v_ids := ARRAY(SELECT i.id FROM unnest(v_ids) AS i(id) WHERE i.id <> ALL (v_needed));
    purged := 0;
    IF cardinality(v_ids) > 0 THEN
        purged := purge_requests(v_ids);
        DELETE FROM unhandled u WHERE u.id = ANY (v_ids);
    END IF;
    RETURN NEXT;
END;
$$;

-- Releases an ordering key from the first request that holds it up. Returns false if no request
-- does.
CREATE FUNCTION resume_key(p_channel text, p_group text) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    v_id uuid;
BEGIN
    SELECT m.id INTO v_id FROM mq_msgs m
    WHERE m.channel_name = p_channel AND m.channel_args = p_group
        AND m.seq IS NOT NULL AND m.state = 'halted'
    ORDER BY m.seq LIMIT 1 FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM mq_msgs m WHERE m.id = v_id;
    -- Kept for a replay: the new request halts the key again if it ends without success.
    UPDATE mq_payloads p SET halts = true WHERE p.id = v_id;
    PERFORM tell_runners(p_channel);
    RETURN true;
END;
$$;

-- As resume_key. The dead letter's retention begins anew, so that it can still be replayed.
CREATE FUNCTION resume_halted(p_channel text, p_group text) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
BEGIN
    -- Before the row that halts the key is locked, as all changes of dead letters.
    UPDATE outcomes_kept o SET expires_at = clock_timestamp() + dead_letter_retention()
    WHERE o.id = (
        SELECT m.id FROM mq_msgs m
        WHERE m.channel_name = p_channel AND m.channel_args = p_group
        AND m.seq IS NOT NULL AND m.state = 'halted'
        ORDER BY m.seq LIMIT 1
    );
    RETURN resume_key(p_channel, p_group);
END;
$$;
