//! Persisting requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{Connection, PgConnection, PgExecutor, Postgres};
use uuid::Uuid;

use super::{Store, StoreError, millis, quoted};
use crate::codec::Unreadable;
use crate::destination::{destination_of, ordering_key};
use crate::error::{Error, Kind, is_lock_timeout};
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::options::Priority;
use crate::sealer::Sealer;

/// The longest time between two polls of a runner, as `mq_poll` returns it.
pub(crate) const RUNNER_WAIT: Duration = Duration::from_secs(1);
/// The message name of every row, for tools that read the queue as sqlxmq's. Rows of another name
/// are not this crate's.
pub(crate) const MESSAGE_NAME: &str = "requeuest";

/// A request on its way into the queue.
#[derive(Debug)]
pub(crate) struct NewRequest {
    pub(crate) id: RequestId,
    pub(crate) channel: Arc<str>,
    pub(crate) group: String,
    /// The destination, where the group doesn't name it.
    pub(crate) destination: Option<String>,
    pub(crate) ordered: bool,
    /// The request halts its ordering key if it ends as a dead letter.
    pub(crate) halts: bool,
    pub(crate) delay: Duration,
    /// How long after the insert the request is given up.
    pub(crate) deadline: Option<Duration>,
    pub(crate) head: String,
    pub(crate) body: Option<Bytes>,
    pub(crate) metadata: Option<Metadata>,
    pub(crate) priority: Priority,
    /// The instance that waits for the outcome.
    pub(crate) waiter: Option<Uuid>,
    pub(crate) key: Option<Key>,
    /// A newer request with the same key replaces this one until it has been sent.
    pub(crate) supersede: Option<Arc<str>>,
    pub(crate) initial: Initial,
}

/// A caller's key for a request.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) text: Arc<str>,
    /// Equal for two calls that mean the same request.
    pub(crate) fingerprint: [u8; 32],
    /// The form in which the fingerprint is stored, if it is encrypted.
    pub(crate) sealed: Option<Box<[u8]>>,
}

impl Key {
    pub(super) fn stored_fingerprint(&self) -> &[u8] {
        self.sealed.as_deref().unwrap_or(&self.fingerprint)
    }
}

/// The option that a key comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum KeyField {
    Supersede,
    Ordered,
    Key,
}

impl KeyField {
    /// In the order in which an insert locks them.
    pub(crate) const ALL: [Self; 3] = [Self::Supersede, Self::Ordered, Self::Key];

    /// The name of the option.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Supersede => "supersede",
            Self::Ordered => "ordered",
            Self::Key => "key",
        }
    }
}

/// The state that a row is inserted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Initial {
    /// Any runner may claim the row.
    Waiting,
    /// Any runner whose process has room for the destination may claim the row. Whether the
    /// runners are told.
    Deferred { tell: bool },
    /// Claimed with a lease by the process that inserts the row and makes the first attempt.
    Claimed,
    /// As `Claimed`. If the lease runs out, the request may have been sent and isn't sent again.
    ClaimedOnce,
}

impl Initial {
    /// Whether a poll claims the row.
    pub(crate) fn is_unclaimed(self) -> bool {
        matches!(self, Self::Waiting | Self::Deferred { .. })
    }

    /// The state's name in the database.
    fn state(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Deferred { .. } => "deferred",
            Self::Claimed => CLAIMED,
            Self::ClaimedOnce => SENDING_ONCE,
        }
    }
}

/// The state of a row that is owned by a process.
pub(super) const CLAIMED: &str = "claimed";
/// The state of a row that is being sent and must not be sent again.
pub(super) const SENDING_ONCE: &str = "sending_once";

impl NewRequest {
    /// Whether runners must be notified, because the next regular poll may be too late.
    pub(crate) fn needs_runner(&self) -> bool {
        matches!(
            self.initial,
            Initial::Waiting | Initial::Deferred { tell: true }
        ) && self.delay < RUNNER_WAIT
    }

    /// The name of the destination.
    pub(crate) fn destination(&self) -> &str {
        match &self.destination {
            Some(destination) => destination,
            None => destination_of(&self.group),
        }
    }

    /// Has the row inserted as deferred. `tell` says whether the runners are told.
    pub(crate) fn defer(&mut self, tell: bool) {
        self.destination = Some(self.destination().to_owned());
        self.initial = Initial::Deferred { tell };
    }

    /// Whether the insert takes a lock that another transaction may hold.
    pub(crate) fn needs_lock(&self) -> bool {
        self.ordered || self.key.is_some() || self.supersede.is_some()
    }

    /// How many bytes the row moves, about.
    pub(crate) fn size(&self) -> usize {
        self.head.len()
            + self.body.as_ref().map_or(0, Bytes::len)
            + self.metadata().map_or(0, str::len)
    }

    /// The error if unfinished requests of this other channel have the ordering key.
    pub(super) fn order_conflict(&self, holder: impl Into<Box<str>>) -> Error {
        Error::new(Kind::OrderConflict {
            key: ordering_key(&self.group).into(),
            holder: Some(holder.into()),
        })
    }

    /// The error if another transaction has had this key for as long as a request waits.
    pub(crate) fn key_busy(&self, field: KeyField) -> Error {
        let key = match field {
            KeyField::Ordered => Some(ordering_key(&self.group)),
            field => self.key_of(field),
        };
        Error::new(Kind::KeyBusy {
            field: field.name(),
            key: key.map(Into::into),
            channel: Arc::clone(&self.channel),
        })
    }

    /// The key that an insert locks for this option. Of an ordering key, the whole group.
    pub(crate) fn key_of(&self, field: KeyField) -> Option<&str> {
        match field {
            KeyField::Supersede => self.supersede.as_deref(),
            KeyField::Ordered => self.ordered.then_some(&*self.group),
            KeyField::Key => self.key.as_ref().map(|key| &*key.text),
        }
    }

    /// The first of the options that make the insert lock a key, from the end: its other locks are
    /// taken without a wait.
    pub(super) fn last_key(&self) -> Option<KeyField> {
        let mut fields = KeyField::ALL.into_iter().rev();
        fields.find(|field| self.key_of(*field).is_some())
    }

    /// The name of the priority, unless it is the default.
    pub(super) fn unusual_priority(&self) -> Option<&'static str> {
        (!self.priority.is_default()).then(|| self.priority.name())
    }

    /// Whether this is the stored fingerprint of the same request.
    fn has_fingerprint(&self, stored: Option<&[u8]>, sealer: &Sealer) -> Result<bool, Unreadable> {
        let (Some(key), Some(stored)) = (&self.key, stored) else {
            return Ok(false);
        };
        sealer.is_fingerprint(&self.channel, &key.text, &key.fingerprint, stored)
    }

    pub(super) fn metadata(&self) -> Option<&str> {
        self.metadata.as_ref().map(Metadata::json)
    }
}

/// Bodies are picked from their array by number. Unnested, they would be copied more than once, and
/// large ones through temporary files.
macro_rules! insert_many {
    ($only:literal) => {
        concat!(
            "WITH input AS MATERIALIZED (
                SELECT i.* FROM unnest(
                    $1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::text[],
                    $8::text[], $9::text[], $10::uuid[], $11::text[], $14::text[]
                ) WITH ORDINALITY AS i(
                    id, channel_name, channel_args, delay_ms, deadline_ms, head, metadata,
                    destination, waiter, state, priority, number
                ) ",
            $only,
            "), payloads AS (
                INSERT INTO mq_payloads (id, name, head, body, metadata)
                SELECT i.id, $12, i.head, ($7::bytea[])[i.number], i.metadata::json FROM input i
            )
            INSERT INTO mq_msgs (
                id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state,
                priority, destination, deadline
            )
            SELECT
                i.id, i.channel_name, i.channel_args,
                clock_timestamp()
                    + (
                        i.delay_ms
                        + CASE WHEN i.state IN ('waiting', 'deferred') THEN 0 ELSE $13 END
                    ) * interval '1 millisecond',
                i.waiter, (i.state NOT IN ('waiting', 'deferred'))::int,
                (i.state NOT IN ('waiting', 'deferred'))::int,
                i.state::mq_state, coalesce(i.priority::mq_priority, 'normal'), i.destination,
                clock_timestamp() + i.deadline_ms * interval '1 millisecond'
            FROM input i"
        )
    };
}

const INSERT: &str = insert_many!("");

/// For a retry after a commit whose outcome is unknown: rows that exist, or have already finished,
/// are left alone. A statement of its own, because preparing the check takes longer than the
/// insert.
const INSERT_AGAIN: &str = insert_many!(
    "WHERE NOT (
        EXISTS (SELECT FROM mq_payloads p WHERE p.id = i.id OFFSET 0)
        OR EXISTS (SELECT FROM outcomes o WHERE o.id = i.id OFFSET 0)
    )"
);

/// The same for one row: without arrays to unnest it takes half the time.
const INSERT_ALONE: &str = "
    WITH payload AS (
        INSERT INTO mq_payloads (id, name, head, body, metadata)
        VALUES ($1, $12, $6, $7, $8::text::json)
    )
    INSERT INTO mq_msgs (
        id, channel_name, channel_args, attempt_at, waiter, claim_no, attempts, state, priority,
        destination, deadline
    )
    VALUES (
        $1, $2, $3,
        clock_timestamp()
            + (
                $4::bigint
                + CASE WHEN $11::text IN ('waiting', 'deferred') THEN 0 ELSE $13::bigint END
            ) * interval '1 millisecond',
        $10, ($11 NOT IN ('waiting', 'deferred'))::int, ($11 NOT IN ('waiting', 'deferred'))::int,
        $11::mq_state, $14::text::mq_priority, $9,
        clock_timestamp() + $5::bigint * interval '1 millisecond'
    )";

impl Store {
    /// Inserts requests that need no lock, in one statement. With `again`, after a commit whose
    /// outcome is unknown, only those that neither exist nor have finished.
    pub(crate) async fn insert(
        &self,
        requests: &[NewRequest],
        again: bool,
    ) -> Result<(), StoreError> {
        let bytes = requests.iter().map(NewRequest::size).sum();
        if !self.may_insert() {
            let how = Inserting {
                notify: false,
                again,
                ..self.inserting()
            };
            let schema = &self.config().schema;
            return self
                .run_large("enqueue", bytes, async |connection| {
                    insert_by_function(connection, schema, requests, how).await
                })
                .await;
        }
        let lease = self.config().lease;
        self.run_large("enqueue", bytes, async |connection| {
            insert(connection, requests, lease, again).await
        })
        .await
    }

    /// Inserts a request that takes locks, unless another transaction holds one of them.
    pub(crate) async fn try_insert_locked(
        &self,
        request: &NewRequest,
        again: bool,
    ) -> Result<Inserted, StoreError> {
        let how = Inserting {
            wait: false,
            again,
            ..self.inserting()
        };
        let schema = &self.config().schema;
        self.run_large(
            "enqueue.locked",
            request.size(),
            async |connection| match insert_one(connection, schema, request, how).await {
                Err(error) if is_lock_timeout(&error) => match request.last_key() {
                    Some(field) => Ok(Inserted::Busy(field)),
                    None => Err(error),
                },
                inserted => inserted,
            },
        )
        .await
    }

    /// Inserts a request on the caller's connection, in the caller's transaction if there is one.
    pub(crate) async fn insert_for_caller<'c>(
        &self,
        executor: impl PgExecutor<'c>,
        request: &NewRequest,
    ) -> Result<Inserted, Error> {
        let how = self.inserting_for_caller();
        Ok(insert_one(executor, &self.config().schema, request, how).await?)
    }

    /// Tells the runners of these channels that requests are due.
    pub(crate) async fn notify_runners(&self, channels: &[Arc<str>]) -> Result<(), StoreError> {
        self.run("enqueue.notify", async |connection| {
            notify_runners(connection, channels).await
        })
        .await
    }

    /// How rows that take locks are inserted on the crate's own connections.
    pub(super) fn inserting(&self) -> Inserting<'_> {
        Inserting {
            notify: true,
            wait: true,
            again: false,
            lease: self.config().lease,
            retention: self.config().retention,
            prepared: true,
            sealer: self.sealer(),
        }
    }

    /// How rows are inserted on a caller's connection.
    pub(super) fn inserting_for_caller(&self) -> Inserting<'_> {
        Inserting {
            notify: self.config().notify_in_transactions,
            prepared: self.caller_keeps_sessions(),
            ..self.inserting()
        }
    }
}

async fn insert(
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
    .bind(unless_all_none(
        requests.iter().map(NewRequest::unusual_priority),
    ))
    .execute(connection)
    .await?;
    Ok(())
}

/// Inserts requests as a role that may not write the tables.
async fn insert_by_function(
    connection: &mut PgConnection,
    schema: &str,
    requests: &[NewRequest],
    how: Inserting<'_>,
) -> Result<(), sqlx::Error> {
    let plain = |request: &NewRequest| request.initial == Initial::Waiting;
    if requests.len() > 1 && !how.again && requests.iter().all(plain) {
        super::bulk::insert_many(connection, schema, requests, how, &HashMap::new()).await?;
        return Ok(());
    }
    let mut transaction = connection.begin().await?;
    for request in requests {
        insert_one(&mut *transaction, schema, request, how).await?;
    }
    transaction.commit().await
}

/// Binds the first nine parameters, which every insert of many rows has.
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
        .bind(unless_all_none(column.clone().map(NewRequest::metadata)))
        .bind(unless_all_none(column.map(|r| r.destination.as_deref())))
}

/// The values as an array, or `None` if there are none. Postgres makes the same rows of both, and
/// an array has to be encoded, sent and unnested.
pub(super) fn unless_all_none<T>(
    values: impl Iterator<Item = Option<T>> + Clone,
) -> Option<Vec<Option<T>>> {
    let any = values.clone().any(|value| value.is_some());
    any.then(|| values.collect())
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
        .bind(request.metadata())
        .bind(request.destination.as_deref())
        .bind(request.waiter)
        .bind(request.initial.state())
        .bind(MESSAGE_NAME)
        .bind(millis(lease))
        .bind(request.priority.name())
        .execute(connection)
        .await?;
    Ok(())
}

/// How [`insert_one`] inserts.
#[expect(
    clippy::struct_excessive_bools,
    reason = "the flags are independent parameters of one function"
)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Inserting<'a> {
    /// Whether the commit notifies runners of a request that is due, and processes that wait for a
    /// request that is superseded.
    pub(super) notify: bool,
    /// Whether to wait for another transaction that holds one of the request's keys.
    wait: bool,
    /// A retry after a commit whose outcome is unknown.
    again: bool,
    lease: Duration,
    retention: Duration,
    /// Whether the statement may stay prepared. Behind a pooler the session may serve another
    /// client next time.
    pub(super) prepared: bool,
    pub(super) sealer: &'a Sealer,
}

/// What an insert did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    New,
    /// Nothing: this earlier request has the key, and is the same request.
    Attached(RequestId),
    /// Nothing: this earlier request has the key, and is a different request.
    Conflict(RequestId),
    /// Nothing: this earlier request has the key, and this process can't tell whether it is the
    /// same.
    Unreadable(RequestId, Unreadable),
    /// Nothing: another transaction holds this key.
    Busy(KeyField),
    /// Nothing: unfinished requests of this other channel have the ordering key.
    Elsewhere(Box<str>),
}

impl Inserted {
    /// The verdict of a function of the schema about this request.
    pub(super) fn read(
        request: &NewRequest,
        verdict: &str,
        persisted: Option<Uuid>,
        elsewhere: Option<String>,
        sealer: &Sealer,
    ) -> Self {
        match (verdict, persisted.map(RequestId::from)) {
            ("attached", Some(first)) if first != request.id => Self::Attached(first),
            ("conflict", Some(first)) => {
                let stored = elsewhere.as_deref().and_then(from_hex);
                match request.has_fingerprint(stored.as_deref(), sealer) {
                    Ok(true) => Self::Attached(first),
                    Ok(false) => Self::Conflict(first),
                    Err(reason) => Self::Unreadable(first, reason),
                }
            }
            ("busy", _) => Self::Busy(match elsewhere.as_deref() {
                Some("supersede") => KeyField::Supersede,
                _ => KeyField::Ordered,
            }),
            ("elsewhere", _) => Self::Elsewhere(elsewhere.unwrap_or_default().into()),
            _ => Self::New,
        }
    }

    /// The caller's result: the id of the persisted request, which is `request` or an earlier one
    /// with the same key.
    pub(crate) fn persisted(self, request: &NewRequest) -> Result<RequestId, Error> {
        match self {
            Self::New => Ok(request.id),
            Self::Attached(first) => Ok(first),
            Self::Conflict(first) => {
                let key = request.key.as_ref();
                let kind = Kind::KeyConflict {
                    key: key.map(|key| Arc::clone(&key.text)).unwrap_or_default(),
                    channel: Arc::clone(&request.channel),
                };
                Err(Error::new(kind).with_id(first))
            }
            Self::Unreadable(first, reason) => Err(Error::from(reason).with_id(first)),
            Self::Elsewhere(holder) => Err(request.order_conflict(holder)),
            Self::Busy(field) => Err(request.key_busy(field)),
        }
    }
}

/// Inserts one request through a function of the schema: on any connection, in any transaction.
pub(super) async fn insert_one<'c>(
    executor: impl PgExecutor<'c>,
    schema: &str,
    request: &NewRequest,
    how: Inserting<'_>,
) -> Result<Inserted, sqlx::Error> {
    // On a caller's connection nothing may depend on the search_path, not even an operator.
    let schema = quoted(schema);
    let call = format!(
        "SELECT verdict, request_id, elsewhere FROM {schema}.enqueue(
            $1, $2, $3, $4, $5,
            $6 OPERATOR(pg_catalog.*) interval '1 millisecond',
            $7 OPERATOR(pg_catalog.*) interval '1 millisecond',
            $8, $9, $10, $11, $12::pg_catalog.text::{schema}.mq_state,
            $13 OPERATOR(pg_catalog.*) interval '1 millisecond', $14, $15, $16,
            $17 OPERATOR(pg_catalog.*) interval '1 millisecond', $18, $19, $20,
            $21::pg_catalog.text::pg_catalog.json, $22,
            $23::pg_catalog.text::{schema}.mq_priority
        )"
    );
    let key = request.key.as_ref();
    let (verdict, id, elsewhere): (String, Option<Uuid>, Option<String>) = sqlx::query_as(&call)
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
        .bind(key.map(|key| &*key.text))
        .bind(key.map(Key::stored_fingerprint))
        .bind(request.supersede.as_deref())
        .bind(millis(how.retention))
        .bind(how.notify.then(|| request.needs_runner()))
        .bind(how.wait)
        .bind(how.again)
        .bind(request.metadata())
        .bind(request.destination.as_deref())
        .bind(request.priority.name())
        .persistent(how.prepared)
        .fetch_one(executor)
        .await?;
    Ok(Inserted::read(request, &verdict, id, elsewhere, how.sealer))
}

pub(super) fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.as_bytes().chunks(2);
    let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    bytes.collect()
}

pub(super) async fn notify_runners(
    connection: &mut PgConnection,
    channels: &[Arc<str>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT pg_notify(c.name, '')
         FROM (
            SELECT 'mq_' || i.name FROM unnest($1::text[]) AS i(name)
            -- A longer name would be an error, and no runner can listen for it.
            WHERE octet_length(i.name) <= 60
            UNION SELECT 'mq'
         ) AS c(name)",
    )
    .bind(
        channels
            .iter()
            .map(|channel| &**channel)
            .collect::<Vec<_>>(),
    )
    .execute(connection)
    .await?;
    Ok(())
}
