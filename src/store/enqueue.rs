//! Persisting requests.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{PgConnection, PgExecutor, Postgres};
use uuid::Uuid;

use super::{millis, quoted};
use crate::error::{Error, Kind};
use crate::id::RequestId;

/// The longest that a runner goes without a look, as `mq_poll` tells it.
pub(crate) const RUNNER_WAIT: Duration = Duration::from_secs(1);
/// Names the rows for anybody who looks into the queue with sqlxmq's eyes.
pub(super) const MESSAGE_NAME: &str = "requeuest";

/// A request on its way into the queue.
#[derive(Debug)]
pub(crate) struct NewRequest {
    pub(crate) id: RequestId,
    pub(crate) channel: Arc<str>,
    pub(crate) group: String,
    pub(crate) ordered: bool,
    /// Ended without success it holds up its ordering key.
    pub(crate) halts: bool,
    pub(crate) delay: Duration,
    /// How long after the insert it is given up.
    pub(crate) deadline: Option<Duration>,
    pub(crate) head: String,
    pub(crate) body: Option<Bytes>,
    /// The instance that waits for the outcome.
    pub(crate) waiter: Option<Uuid>,
    pub(crate) key: Option<Key>,
    /// A newer request with the same one takes its place while it has not been sent.
    pub(crate) supersede: Option<Arc<str>>,
    pub(crate) initial: Initial,
}

/// A caller's key for a request.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) key: Arc<str>,
    /// Tells whether another call with the key means the same request.
    pub(crate) fingerprint: [u8; 32],
}

/// How a row begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Initial {
    /// For whichever runner claims it.
    Waiting,
    /// With a lease, for the process that inserts it to make the first attempt.
    Claimed,
    /// Likewise, and once its lease has run out it may have been sent and must not be sent again.
    ClaimedOnce,
}

impl Initial {
    /// The row's state, as the migrations list them.
    fn state(self) -> i16 {
        match self {
            Self::Waiting => 0,
            Self::Claimed => 1,
            Self::ClaimedOnce => SENDING_ONCE,
        }
    }
}

/// The state of a row that is being sent and must not be sent again.
pub(crate) const SENDING_ONCE: i16 = 4;

impl NewRequest {
    /// Whether a runner has to be told of it, because it may look too late by itself.
    pub(crate) fn needs_runner(&self) -> bool {
        self.initial == Initial::Waiting && self.delay < RUNNER_WAIT
    }

    /// Whether the insert has to hold a lock that another transaction may have.
    pub(crate) fn needs_lock(&self) -> bool {
        self.ordered || self.key.is_some() || self.supersede.is_some()
    }

    pub(crate) fn size(&self) -> usize {
        self.head.len() + self.body.as_ref().map_or(0, Bytes::len)
    }
}

/// Bodies are picked by their number: unnested they would be copied more than once, through temporary files if they are large.
macro_rules! insert_many {
    ($only:literal) => {
        concat!(
            "WITH input AS MATERIALIZED (
                SELECT i.* FROM unnest(
                    $1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[], $8::uuid[], $9::smallint[]
                ) WITH ORDINALITY AS i(id, channel_name, channel_args, delay_ms, deadline_ms, head, waiter, state, number) ",
            $only,
            "), payloads AS (
                INSERT INTO mq_payloads (id, name, head, body)
                SELECT i.id, $10, i.head, ($7::bytea[])[i.number] FROM input i
            )
            INSERT INTO mq_msgs (id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state, deadline)
            SELECT
                i.id, i.channel_name, i.channel_args,
                clock_timestamp() + (i.delay_ms + CASE WHEN i.state > 0 THEN $11 ELSE 0 END) * interval '1 millisecond',
                i.waiter, (i.state > 0)::int, (i.state > 0)::int, i.state,
                clock_timestamp() + i.deadline_ms * interval '1 millisecond'
            FROM input i"
        )
    };
}

const INSERT: &str = insert_many!("");

/// After a commit whose outcome is unknown: a row that is there, or has already ended, is left alone. A statement of its own, because
/// getting ready to look takes longer than the insert.
const INSERT_AGAIN: &str = insert_many!(
    "WHERE NOT (
        EXISTS (SELECT FROM mq_payloads p WHERE p.id = i.id OFFSET 0)
        OR EXISTS (SELECT FROM outcomes o WHERE o.id = i.id OFFSET 0)
    )"
);

/// The same for one row: without arrays to take apart it takes half the time.
const INSERT_ALONE: &str = "
    WITH payload AS (INSERT INTO mq_payloads (id, name, head, body) VALUES ($1, $10, $6, $7))
    INSERT INTO mq_msgs (id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state, deadline)
    VALUES (
        $1, $2, $3,
        clock_timestamp() + ($4::bigint + CASE WHEN $9::smallint > 0 THEN $11::bigint ELSE 0 END) * interval '1 millisecond',
        $8, ($9 > 0)::int, ($9 > 0)::int, $9,
        clock_timestamp() + $5::bigint * interval '1 millisecond'
    )";

/// Inserts requests that need no lock, in one statement.
pub(crate) async fn insert(
    connection: &mut PgConnection,
    requests: &[NewRequest],
    lease: Duration,
    again: bool,
) -> Result<(), sqlx::Error> {
    if let ([request], false) = (requests, again) {
        return insert_alone(connection, request, lease).await;
    }
    bind_columns(
        sqlx::query(if again { INSERT_AGAIN } else { INSERT }),
        requests,
    )
    .bind(requests.iter().map(|r| r.waiter).collect::<Vec<_>>())
    .bind(
        requests
            .iter()
            .map(|r| r.initial.state())
            .collect::<Vec<_>>(),
    )
    .bind(MESSAGE_NAME)
    .bind(millis(lease))
    .execute(connection)
    .await?;
    Ok(())
}

/// Binds what all rows have: the first seven parameters.
pub(super) fn bind_columns<'q>(
    query: Query<'q, Postgres, PgArguments>,
    requests: &'q [NewRequest],
) -> Query<'q, Postgres, PgArguments> {
    let column = requests.iter();
    query
        .bind(column.clone().map(|r| r.id.into()).collect::<Vec<Uuid>>())
        .bind(column.clone().map(|r| &*r.channel).collect::<Vec<_>>())
        .bind(column.clone().map(|r| &*r.group).collect::<Vec<_>>())
        .bind(column.clone().map(|r| millis(r.delay)).collect::<Vec<_>>())
        .bind(
            column
                .clone()
                .map(|r| r.deadline.map(millis))
                .collect::<Vec<_>>(),
        )
        .bind(column.clone().map(|r| &*r.head).collect::<Vec<_>>())
        .bind(
            column
                .clone()
                .map(|r| r.body.as_deref())
                .collect::<Vec<_>>(),
        )
}

async fn insert_alone(
    connection: &mut PgConnection,
    request: &NewRequest,
    lease: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(INSERT_ALONE)
        .bind(Uuid::from(request.id))
        .bind(&*request.channel)
        .bind(&*request.group)
        .bind(millis(request.delay))
        .bind(request.deadline.map(millis))
        .bind(&*request.head)
        .bind(request.body.as_deref())
        .bind(request.waiter)
        .bind(request.initial.state())
        .bind(MESSAGE_NAME)
        .bind(millis(lease))
        .execute(connection)
        .await?;
    Ok(())
}

/// How [`insert_one`] goes about it.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each says something of its own"
)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inserting {
    /// Whether runners are told at the commit, if it is for them.
    pub(crate) notify: bool,
    /// Whether to wait for another transaction that has one of the request's keys.
    pub(crate) wait: bool,
    /// After a commit whose outcome is unknown.
    pub(crate) again: bool,
    pub(crate) lease: Duration,
    pub(crate) retention: Duration,
    /// Whether the statement may stay prepared: behind a pooler, the session may be another one's next time.
    pub(crate) prepared: bool,
}

/// What became of an insert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    New,
    /// The key was given to this request before.
    Attached(RequestId),
    /// The key was given to this request before, which is another one.
    Conflict(RequestId),
    /// Another transaction has one of the keys; nothing was done.
    Busy,
    /// Unfinished requests of another channel have the ordering key; nothing was done.
    Elsewhere,
}

impl Inserted {
    /// What a caller is told: the request that is persisted, `id` or an earlier one with its key.
    pub(crate) fn persisted(self, id: RequestId) -> Result<RequestId, Error> {
        match self {
            Self::New => Ok(id),
            Self::Attached(first) => Ok(first),
            Self::Conflict(first) => Err(Error::new(Kind::KeyConflict).with_id(first)),
            Self::Elsewhere => Err(Error::new(Kind::OrderConflict)),
            Self::Busy => Err(Error::new(Kind::Database(sqlx::Error::Protocol(
                "a key was not waited for".to_owned(),
            )))),
        }
    }
}

/// Inserts one request through the schema's own function: on any connection, in any transaction.
pub(crate) async fn insert_one<'c>(
    executor: impl PgExecutor<'c>,
    schema: &str,
    request: &NewRequest,
    how: Inserting,
) -> Result<Inserted, sqlx::Error> {
    // On the caller's connection nothing may depend on its search_path, not even the operator.
    let call = format!(
        "SELECT verdict, request_id FROM {}.enqueue(
            $1, $2, $3, $4, $5,
            $6 OPERATOR(pg_catalog.*) interval '1 millisecond', $7 OPERATOR(pg_catalog.*) interval '1 millisecond',
            $8, $9, $10, $11, $12, $13 OPERATOR(pg_catalog.*) interval '1 millisecond', $14, $15, $16,
            $17 OPERATOR(pg_catalog.*) interval '1 millisecond', $18, $19, $20
        )",
        quoted(schema)
    );
    let key = request.key.as_ref();
    let (verdict, id): (String, Option<Uuid>) = sqlx::query_as(&call)
        .bind(Uuid::from(request.id))
        .bind(&*request.channel)
        .bind(&*request.group)
        .bind(request.ordered)
        .bind(request.halts)
        .bind(millis(request.delay))
        .bind(request.deadline.map(millis))
        .bind(MESSAGE_NAME)
        .bind(&*request.head)
        .bind(request.body.as_deref())
        .bind(request.waiter)
        .bind(request.initial.state())
        .bind(millis(how.lease))
        .bind(key.map(|key| &*key.key))
        .bind(key.map(|key| &key.fingerprint[..]))
        .bind(request.supersede.as_deref())
        .bind(millis(how.retention))
        .bind(how.notify && request.needs_runner())
        .bind(how.wait)
        .bind(how.again)
        .persistent(how.prepared)
        .fetch_one(executor)
        .await?;
    Ok(match (&*verdict, id) {
        ("attached", Some(id)) if id != Uuid::from(request.id) => Inserted::Attached(id.into()),
        ("conflict", Some(id)) => Inserted::Conflict(id.into()),
        ("busy", _) => Inserted::Busy,
        ("elsewhere", _) => Inserted::Elsewhere,
        _ => Inserted::New,
    })
}

/// Tells the runners of these channels that something is due.
pub(crate) async fn notify_runners(
    connection: &mut PgConnection,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT pg_notify(c.name, '')
         FROM (SELECT 'mq_' || i.name FROM unnest($1::text[]) AS i(name) UNION SELECT 'mq') AS c(name)",
    )
    .bind(channels.iter().map(|channel| &**channel).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}
