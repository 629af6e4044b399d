-- Tables and indexes.
--
-- In all migrations, functions carry the search_path of their installation, so they work from any
-- connection and never touch a sqlxmq that lives in another schema.
--
-- Lookups are written `id = ANY (ARRAY[x.id])` rather than `id = x.id`, with `state <= 'waiting'`
-- rather than `state = 'waiting'` beside them. Statistics taken while the queue is empty make the
-- planner expect no rows, and a cached plan may then scan a whole index per row. These forms allow
-- no such plan: `= ANY` can't merge-join two sorted indexes, and no partial index has the condition
-- `state <= 'waiting'`. For the same reason, OFFSET 0 makes an EXISTS look up its rows one by one.

CREATE TYPE mq_state AS ENUM (
    -- For a claim, once attempt_at is past. The first value: see `state <= 'waiting'` above.
    'waiting',
    -- Owned by a process until attempt_at.
    'claimed',
    -- Owned by the process that made the last attempt and makes the next one.
    'held',
    -- Owned, being sent, and not to be sent again.
    'sending_once',
    -- Waiting, and known not to be the first of its ordering key.
    'behind',
    -- Waiting, for its destination to take more requests.
    'deferred',
    -- Could not be read by the process that claimed it; looked at again after attempt_at.
    'parked',
    -- Ended without success, and halts its ordering key.
    'halted'
);

-- What polls claim first. An enum, so that each row has a value that polls look for.
CREATE TYPE mq_priority AS ENUM ('high', 'normal', 'low');

-- The formats that the session's process can read.
CREATE FUNCTION known_formats() RETURNS smallint[]
LANGUAGE sql
STABLE
AS $$
    SELECT coalesce(
        nullif(pg_catalog.current_setting('requeuest.formats', true), ''), '{1}'
    )::pg_catalog.int2[]
$$;

-- The next claim_no. The greatest one is followed by 1, so that a row with a number that is out of
-- any count fails no statement that claims it beside others. No search_path, so it is inlined.
CREATE FUNCTION next_claim_no(p_claim_no int) RETURNS int
LANGUAGE sql
IMMUTABLE
AS $$ SELECT p_claim_no OPERATOR(pg_catalog.%) 2147483647 OPERATOR(pg_catalog.+) 1 $$;

-- A time in microseconds since 1970. Infinite times, which have none, are the first and the last
-- ones of this crate's. No search_path, so it is inlined.
CREATE FUNCTION epoch_us(p_at timestamptz) RETURNS bigint
LANGUAGE sql
STABLE
AS $$
    SELECT CASE
        WHEN pg_catalog.isfinite(p_at) THEN
            (extract(epoch FROM p_at) OPERATOR(pg_catalog.*) 1000000)::pg_catalog.int8
        WHEN p_at OPERATOR(pg_catalog.<) '1970-01-01 UTC' THEN 0
        WHEN p_at IS NOT NULL THEN 253402300799000000
    END
$$;

-- Hot and narrow: only unfinished requests. No foreign key points here, because each delete would
-- have to look for referrers.
--
-- No CHECK on numbers and times: each statement would parse the conditions anew, which takes half
-- as long as the insert of a row. And the greatest value that a CHECK allows would still fail where
-- it is counted up. Instead, all statements on many rows take any value in any row.
CREATE TABLE mq_msgs (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    -- The group: `hhhh|o|key` for an ordering key that all channels share, `hhhh|c|key` for an
    -- ordering key within one channel, `hhhh|d|destination` otherwise. hhhh is a hash that spreads
    -- the groups.
    channel_args text COLLATE "C" NOT NULL,
    -- When the next attempt is due; while an attempt is under way, the end of its lease.
    attempt_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Since when the request's age counts: its first attempt, and later by as much as it has waited
    -- for a runner since. NULL means created_at, as for a request that was inserted claimed.
    began_at timestamptz,
    -- Position among the requests of an ordering key, in commit order.
    seq bigint,
    -- The instance that waits for the outcome; nil if several instances wait.
    waiter uuid,
    -- The only fence: rises with every change of owner.
    claim_no int NOT NULL DEFAULT 0,
    -- Transmissions begun.
    attempts int NOT NULL DEFAULT 0,
    state mq_state NOT NULL DEFAULT 'waiting',
    priority mq_priority NOT NULL DEFAULT 'normal',
    -- Which versions of requeuest can read the request. A session claims the formats of its setting
    -- `requeuest.formats`.
    format smallint NOT NULL DEFAULT 1,
    -- How many attempts in a row were lost with their processes. Raised when a poll claims the
    -- request again; zero after a recorded result.
    lost smallint NOT NULL DEFAULT 0,
    -- When the request was last claimed as a suspect: see `lock_suspects`.
    suspected_at timestamptz,
    -- The destination (scheme, host and port, or the caller's limit key), of a request with an
    -- ordering key or a group of its own, and of each request that was deferred. The group of any
    -- other request names it.
    destination text COLLATE "C",
    -- When the request is given up, whether or not it has been sent.
    deadline timestamptz,
    -- A newer request with the same supersede key replaces this request if this one is still
    -- unsent.
    supersede_key text COLLATE "C",
    -- If the request ends without success, it halts its ordering key.
    halts boolean NOT NULL DEFAULT false,
    -- The handle that has, or last had, the claim. Only shown. NULL while a first attempt that was
    -- inserted claimed is under way for less than a third of its lease.
    owner uuid
) WITH (
    fillfactor = 70,
    -- The table is small and all of its rows change, so thresholds relative to its size mean
    -- nothing.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);

-- What a poll can't claim is not in the indexes that it reads: requests behind others of their
-- ordering key have a state of their own, and requests of other formats are apart.

-- Waiting requests: which are due, and when the next one will be.
CREATE INDEX mq_msgs_due ON mq_msgs (channel_name, format, priority, attempt_at)
    WHERE state = 'waiting';
-- For skipping from group to group, and for finding the due requests of one group.
CREATE INDEX mq_msgs_groups ON mq_msgs (channel_name, format, channel_args, attempt_at)
    WHERE state = 'waiting';
-- Owned requests whose lease has run out. This index is separate because most requests are inserted
-- with a lease and are gone long before it ends. Polls for waiting requests must not step over the
-- entries that such requests leave behind until the next vacuum.
CREATE INDEX mq_msgs_leases ON mq_msgs (channel_name, format, attempt_at)
    WHERE state IN ('claimed', 'held', 'sending_once');
-- Owned requests that may have ended their processes.
CREATE INDEX mq_msgs_suspects ON mq_msgs (channel_name, attempt_at)
    WHERE lost > 0 AND state IN ('claimed', 'sending_once');
-- The head of an ordering key, and whether another channel has the key.
CREATE UNIQUE INDEX mq_msgs_order ON mq_msgs (channel_args, channel_name, seq)
    WHERE seq IS NOT NULL;

-- Requests that are out of the way, and when parked ones may be looked at again. One index, because
-- each new row version has to pass the conditions of all of them.
CREATE INDEX mq_msgs_aside ON mq_msgs (state, channel_name, format, attempt_at)
    WHERE state IN ('behind', 'deferred', 'parked', 'halted');
-- The deferred requests of a destination.
CREATE INDEX mq_msgs_deferred ON mq_msgs (destination, channel_name, format, attempt_at)
    WHERE state = 'deferred';

-- Requests that are given up at a deadline.
CREATE INDEX mq_msgs_deadline ON mq_msgs (format, deadline)
    WHERE deadline IS NOT NULL AND state <> 'parked';
-- Requests that a newer request may replace.
CREATE INDEX mq_msgs_supersede ON mq_msgs (channel_name, supersede_key)
    WHERE supersede_key IS NOT NULL;

CREATE SEQUENCE mq_seq;

-- Ordering keys whose first request was removed while the next one could not be looked at. Empty
-- most of the time. Without a constraint, so that an insert never waits.
CREATE TABLE mq_freed_keys (
    channel_name text COLLATE "C" NOT NULL,
    channel_args text COLLATE "C" NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX mq_freed_keys_channel ON mq_freed_keys (channel_name);
-- A publication of all tables refuses deletes from a table without an identity of its rows.
ALTER TABLE mq_freed_keys REPLICA IDENTITY FULL;

-- Channels of which no process begins an attempt, until an operator resumes them. Empty most of the
-- time.
CREATE TABLE paused_channels (
    channel_name text COLLATE "C" PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Who paused it, and why.
    actor text NOT NULL,
    reason text,
    -- NULL: it is paused. Kept for a while afterwards: what was due before waited for this.
    resumed_at timestamptz
);

-- Destinations that are limited, closed, or watched because of failures. Healthy ones have no row.
CREATE TABLE destinations (
    -- Scheme, host and port, or the caller's limit key.
    name text COLLATE "C" PRIMARY KEY,
    -- Until when no request is sent to it, `infinity` for until further notice.
    closed_until timestamptz,
    -- A policy that was set at run time. NULL: the policy of each process's code.
    policy json,
    -- What its processes have seen of it.
    state json NOT NULL DEFAULT '{}',
    -- The token bucket of its rate limit, as of filled_at.
    tokens float8,
    filled_at timestamptz,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX destinations_changed_at ON destinations (changed_at);
-- Whether there are any that a poll has to look for.
CREATE INDEX destinations_closed ON destinations (name) WHERE closed_until IS NOT NULL;

-- The permits of limited destinations that processes have leased.
CREATE TABLE destination_leases (
    name text COLLATE "C" NOT NULL,
    -- The handle whose process it is.
    instance uuid NOT NULL,
    permits int NOT NULL,
    -- How many the process could use.
    wanted int NOT NULL,
    -- Since when the process has had some, or none.
    since timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (name, instance)
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

-- The content of requests. Read once per attempt, so it is kept out of the hot table.
CREATE TABLE mq_payloads (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    head text NOT NULL,
    -- NULL means no body, which HTTP distinguishes from an empty body.
    body bytea,
    -- What the application attached to the request.
    metadata json,
    -- Since when processes have looked at the request and could not read it.
    parked_since timestamptz,
    -- The claim_no with which the request was parked last. The next look's claim has the next
    -- number, unless a process that could read the request has made an attempt in between.
    parked_claim_no int,
    -- What could not be read: names and positions, never values.
    parked_reason text,
    -- The last response that was not final. The caller gets it if no better response arrives.
    response_status smallint,
    response_head text,
    response_body bytea,
    -- How often the request went back into the queue after it had ended.
    returns int NOT NULL DEFAULT 0,
    -- The request halted its ordering key, and the key was released.
    halts boolean NOT NULL DEFAULT false
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
-- For listing. Empty most of the time.
CREATE INDEX mq_payloads_parked ON mq_payloads (id) WHERE parked_since IS NOT NULL;
-- Most bodies don't compress well. An uncompressed body can be measured and cut without being read.
ALTER TABLE mq_payloads ALTER COLUMN body SET STORAGE EXTERNAL;
ALTER TABLE mq_payloads ALTER COLUMN response_body SET STORAGE EXTERNAL;

-- One row per finished request, in a ring of partitions by time. A partition whose rows have all
-- outlived their retention is truncated. So there are few row-by-row deletes and little vacuum
-- debt, no partition is missing when it is needed, and no right to change the schema is needed at
-- run time. Two slots are not part of the ring:
--
-- - -1: dead letters (discarded and ambiguous requests), which must not expire;
-- - -2: outcomes that outlived the retention before a handler took them, or were replayed while one
--   had them.
CREATE TABLE outcomes (
    slot smallint NOT NULL,
    id uuid NOT NULL,
    channel_name text COLLATE "C" NOT NULL,
    channel_args text COLLATE "C" NOT NULL,
    -- `completed`, `discarded`, `cancelled` or `ambiguous`. Without a constraint, because each
    -- settle would parse its condition anew.
    status text NOT NULL,
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
    metadata json,
    -- Which versions of requeuest can read the response.
    format smallint NOT NULL DEFAULT 1,
    -- The request that a replay made from this dead letter.
    replayed_as uuid,
    -- When the receiver may be asked about an ambiguous request again; while it is being asked, the
    -- end of a lease.
    reconcile_at timestamptz,
    -- How often the receiver was asked.
    reconciles int NOT NULL DEFAULT 0,
    -- Of dead letters: scheme, host and port.
    destination text COLLATE "C",
    -- Requests are looked up by id. The slot is here because the key of a partitioned table must
    -- have it.
    PRIMARY KEY (id, slot)
) PARTITION BY LIST (slot);
ALTER TABLE outcomes ALTER COLUMN body SET STORAGE EXTERNAL;

DO $$
BEGIN
    EXECUTE 'CREATE TABLE outcomes_kept PARTITION OF outcomes FOR VALUES IN (-1)';
    EXECUTE 'CREATE TABLE outcomes_late PARTITION OF outcomes FOR VALUES IN (-2)';
    FOR slot IN 0..15 LOOP
        EXECUTE format(
            'CREATE TABLE outcomes_%s PARTITION OF outcomes FOR VALUES IN (%s)', slot, slot
        );
    END LOOP;
END;
$$;
-- Whether a slot has rows that have expired, and rows that have not, without reading the slot.
CREATE INDEX outcomes_expires_at ON outcomes (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX outcomes_kept_reconcile ON outcomes_kept (reconcile_at) WHERE status = 'ambiguous';
-- Lists of dead letters, one index for each combination of filters. What is filtered for is one
-- expression, so that no plan can read another combination's index and filter its rows: statistics
-- would lead to that if most dead letters are of one channel or destination.
CREATE INDEX outcomes_kept_all ON outcomes_kept (status, format, finished_at, id);
CREATE INDEX outcomes_kept_channel ON outcomes_kept
    ((channel_name || ' ' || status), format, finished_at, id);
CREATE INDEX outcomes_kept_destination ON outcomes_kept
    ((destination || ' ' || status), format, finished_at, id);
CREATE INDEX outcomes_kept_both ON outcomes_kept
    ((channel_name || ' ' || destination || ' ' || status), format, finished_at, id);

-- Channels whose outcomes are handed to an application in a transaction.
CREATE TABLE handled_channels (
    channel_name text COLLATE "C" PRIMARY KEY
);

-- When a process last had a handler of the channel. Not a column of handled_channels, because every
-- settle reads that table, and would read its dead rows too.
CREATE TABLE handler_heartbeats (
    channel_name text COLLATE "C" PRIMARY KEY,
    seen_at timestamptz NOT NULL
);

-- Outcomes of these channels that have not been handed over yet.
CREATE TABLE unhandled (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    -- The slot of the outcome.
    slot smallint NOT NULL,
    -- Infinite once the handler has failed too often.
    due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- How many times handing the outcome over has failed, since when, and why the last time.
    failures int NOT NULL DEFAULT 0,
    failing_since timestamptz,
    error text,
    -- Since when processes have taken the outcome and could not read it.
    parked_since timestamptz
);
CREATE INDEX unhandled_due ON unhandled (channel_name, due_at);
CREATE INDEX unhandled_slot ON unhandled (slot);
-- What operators list.
CREATE INDEX unhandled_failing ON unhandled (id) WHERE failures > 0 OR parked_since IS NOT NULL;

-- Failed attempts only: a request that is answered at once needs no history. A request keeps its
-- first 3 and its last 20.
CREATE TABLE attempts (
    id uuid NOT NULL,
    number int NOT NULL,
    ended_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(ended_at)),
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
    created_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(created_at)),
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

-- The runners of all processes. A runner renews its row, and counts as gone after expires_at.
CREATE TABLE runners (
    -- The handle whose runner it is.
    id uuid PRIMARY KEY,
    -- NULL: all channels.
    channels text[] COLLATE "C",
    -- Which formats of requests the runner claims.
    formats smallint[] NOT NULL,
    -- The version of the crate.
    version text NOT NULL,
    host text,
    pid bigint NOT NULL,
    -- How many requests its process had claimed when it last renewed the row.
    in_flight int NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000
);

-- Channels whose requests are due and that no runner delivers. Empty most of the time.
CREATE TABLE undelivered_channels (
    channel_name text COLLATE "C" NOT NULL,
    format smallint NOT NULL,
    -- NULL: there is a runner again.
    since timestamptz DEFAULT clock_timestamp(),
    -- Requests that were due by then are in `undelivered`. NULL: none are.
    noted_until timestamptz,
    -- When noted_until was last set back, for rows that were committed late.
    reread_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (channel_name, format)
);

-- The due requests of these channels, and when they are given up. A table of its own, because
-- finding them by a column of mq_msgs would need an index that each insert pays for.
CREATE TABLE undelivered (
    id uuid PRIMARY KEY,
    channel_name text COLLATE "C" NOT NULL,
    format smallint NOT NULL,
    -- `infinity`: never.
    give_up_at timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX undelivered_give_up_at ON undelivered (channel_name, format, give_up_at);
