-- Views for reports. A role that may read nothing but them sees no URL, header, body, metadata or
-- key. See DatabaseRole::Report.
--
-- They call no function of the schema: a view reads tables with its owner's rights, but calls
-- functions with those of its reader. They hide columns and no requests, so nothing leaks through
-- a filter that is evaluated early, and conditions may use the indexes.

-- Each request once. A halted one is in the queue and among the dead letters, and counts as the
-- latter.
CREATE VIEW requests AS
SELECT
    m.id,
    m.channel_name AS channel,
    coalesce(
        m.destination,
        CASE WHEN substr(m.channel_args, 5, 3) NOT IN ('|o|', '|c|')
            THEN substr(m.channel_args, 8) END
    ) AS destination,
    CASE WHEN substr(m.channel_args, 5, 3) IN ('|o|', '|c|') THEN substr(m.channel_args, 8) END
        AS ordering_key,
    CASE
        WHEN m.state = 'parked' THEN 'parked'
        WHEN m.state = 'deferred' AND m.attempt_at <= clock_timestamp() THEN 'deferred'
        -- A held row's due time includes a lease. Once the lease runs out, any runner may claim
        -- the row.
        WHEN m.state = 'held' AND m.attempt_at - coalesce(
                nullif(current_setting('requeuest.lease', true), ''), '15 seconds'
            )::interval > clock_timestamp()
            THEN 'retryable'
        WHEN m.state IN ('claimed', 'held', 'sending_once')
            AND m.attempt_at > clock_timestamp() THEN 'running'
        WHEN m.attempt_at <= clock_timestamp() THEN 'available'
        WHEN m.attempts = 0 THEN 'scheduled'
        ELSE 'retryable'
    END AS status,
    CASE WHEN m.state IN ('claimed', 'sending_once') THEN 'sending' ELSE m.state::text END
        AS state,
    m.attempts,
    m.created_at,
    CASE
        WHEN m.state = 'held' THEN m.attempt_at - coalesce(
            nullif(current_setting('requeuest.lease', true), ''), '15 seconds'
        )::interval
        -- While it is being sent, that is the end of a lease.
        WHEN m.state NOT IN ('claimed', 'sending_once') THEN m.attempt_at
    END AS due_at,
    NULL::timestamptz AS finished_at,
    m.deadline,
    NULL::smallint AS http_status,
    NULL::text AS error_class,
    NULL::text AS error,
    NULL::uuid AS replayed_as
FROM mq_msgs m
WHERE m.state <> 'halted'
UNION ALL
SELECT
    o.id,
    o.channel_name,
    coalesce(
        o.destination,
        CASE WHEN substr(o.channel_args, 5, 3) NOT IN ('|o|', '|c|')
            THEN substr(o.channel_args, 8) END
    ),
    CASE WHEN substr(o.channel_args, 5, 3) IN ('|o|', '|c|') THEN substr(o.channel_args, 8) END,
    o.status,
    'ended',
    o.attempts,
    o.created_at,
    NULL,
    o.finished_at,
    NULL,
    o.http_status,
    o.error_class,
    -- Encrypted texts begin like this.
    CASE WHEN o.error NOT LIKE 'sealed:%' THEN o.error END,
    o.replayed_as
FROM outcomes o;

-- The failed attempts of requests.
CREATE VIEW attempts_view AS
SELECT
    a.id,
    a.number,
    a.ended_at,
    a.duration_ms * interval '1 millisecond' AS duration,
    a.http_status,
    a.error_class,
    CASE WHEN a.error NOT LIKE 'sealed:%' THEN a.error END AS error
FROM attempts a;

-- The status of a request, or NULL if there is no such request or its outcome has expired.
CREATE FUNCTION status(id uuid) RETURNS text
LANGUAGE plpgsql
STABLE
SET search_path FROM CURRENT
-- A session may have planned this while the tables were empty, and keeps the plan.
SET enable_seqscan = off
AS $$
BEGIN
    RETURN (SELECT r.status FROM requests r WHERE r.id = $1 LIMIT 1);
END;
$$;
