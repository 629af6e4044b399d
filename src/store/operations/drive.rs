//! Driving an operation: one chunk of it.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::apply::Verdict;
use super::matches::Search;
use super::{FORMAT, read, record_chunk};
use crate::change::{Entry, Signed};
use crate::dead_letter::Position;
use crate::id::RequestId;
use crate::inspection::RequestFilter;
use crate::operation::{Action, OperationId};
use crate::store::{Store, StoreError};

/// The part of a second in which an operation with a rate changes what it may.
const STEPS_PER_SECOND: f64 = 4.0;
/// How many requests whose keys are held are tried again. More of them are skipped.
const MAX_BUSY: usize = 1000;
/// For how long they are tried again, once all others were looked at.
const BUSY_FOR: Duration = Duration::from_secs(60);
/// The pause between two tries.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

const HELD: &str = "a transaction had its ordering key for a minute";
const NEEDS_KEYS: &str = "encrypted requests wait for a process with a runner and their keys";

/// What a look for work did.
#[derive(Debug)]
pub(crate) enum Driven {
    /// There is none now. The next one is due then, if that is known.
    Nothing(Option<Duration>),
    /// A chunk was committed. These requests of these channels were cancelled.
    Chunk(Vec<(RequestId, String)>),
    /// This process can't drive the operation.
    NotReadable(OperationId),
    /// The next request is encrypted, and this process has no keys.
    NeedsKeys(OperationId),
}

/// An operation whose row is locked.
struct Taken {
    id: OperationId,
    action: Action,
    filter: RequestFilter,
    author: Signed,
    rate: Option<f64>,
    until: i64,
    after: Option<Position>,
    busy: Vec<RequestId>,
    /// All requests were looked at. Whether the time of those that are tried again is over.
    is_over: Option<bool>,
}

/// What a chunk notes in the row.
#[derive(Default)]
struct Progress {
    after: Option<Position>,
    busy: Vec<RequestId>,
    looked: u64,
    /// With the new ids of those that were replayed.
    done: Vec<(RequestId, Option<RequestId>)>,
    /// With their channels.
    cancelled: Vec<(RequestId, String)>,
    skipped: u64,
    failed: u64,
    last_skipped: Option<String>,
    last_error: Option<String>,
    has_looked_at_all: bool,
}

impl Progress {
    fn skip(&mut self, reason: &str) {
        self.skipped += 1;
        self.last_skipped = Some(reason.to_owned());
    }

    fn is_finished(&self) -> bool {
        self.has_looked_at_all && self.busy.is_empty()
    }
}

impl Store {
    /// Takes the operation that has waited for longest, except these, and changes up to `limit` of
    /// its requests.
    pub(crate) async fn drive_operation(
        &self,
        except: &[Uuid],
        limit: usize,
    ) -> Result<Driven, StoreError> {
        // Most of the time there is nothing to do, and one statement says so.
        let due = self
            .run("operations.next", async |connection| {
                next(connection, except).await
            })
            .await?;
        if due.is_none_or(|due| !due.is_zero()) {
            return Ok(Driven::Nothing(due));
        }
        // Of a chunk, one encrypted body after the other is read and written.
        let bytes = self.config().max_request_body;
        let driven = self
            .run_large("operations.drive", bytes, async |connection| {
                let mut transaction = connection.begin().await?;
                let driven = self.drive_in(&mut transaction, except, limit).await?;
                match driven {
                    Driven::Chunk(_) => transaction.commit().await?,
                    _ => transaction.rollback().await?,
                }
                Ok(driven)
            })
            .await?;
        if let Driven::NeedsKeys(id) = driven {
            self.run("operations.needs_keys", async |connection| {
                sqlx::query(
                    "UPDATE operations SET last_error = $2
                     WHERE id = $1 AND last_error IS DISTINCT FROM $2",
                )
                .bind(Uuid::from(id))
                .bind(NEEDS_KEYS)
                .execute(connection)
                .await?;
                Ok(())
            })
            .await?;
        }
        Ok(driven)
    }

    async fn drive_in(
        &self,
        connection: &mut PgConnection,
        except: &[Uuid],
        limit: usize,
    ) -> Result<Driven, sqlx::Error> {
        let row = sqlx::query(TAKE)
            .bind(FORMAT)
            .bind(except)
            .fetch_optional(&mut *connection)
            .await?;
        let Some(row) = row else {
            // Another process works at it.
            return Ok(Driven::Nothing(Some(Duration::ZERO)));
        };
        let id = OperationId::from(row.try_get::<Uuid, _>("id")?);
        let Some(taken) = taken(&row, id)? else {
            return Ok(Driven::NotReadable(id));
        };
        let limit = match taken.rate {
            Some(rate) => limit.min((rate / STEPS_PER_SECOND).ceil().max(1.0) as usize),
            None => limit,
        };
        let mut progress = Progress {
            after: taken.after,
            busy: taken.busy.clone(),
            has_looked_at_all: taken.is_over.is_some(),
            ..Progress::default()
        };
        let ids = self.chunk(connection, &taken, limit, &mut progress).await?;
        for (id, verdict) in self.apply(connection, taken.action, &ids).await? {
            match verdict {
                Verdict::Done(new) => progress.done.push((id, new)),
                Verdict::Cancelled(channel) => {
                    progress.done.push((id, None));
                    progress.cancelled.push((id, channel));
                }
                Verdict::Busy if progress.busy.len() < MAX_BUSY => progress.busy.push(id),
                Verdict::Busy => progress.skip("too many transactions have ordering keys"),
                Verdict::Skipped(reason) => progress.skip(&reason),
                Verdict::Failed(error) => {
                    progress.failed += 1;
                    progress.last_error = Some(error);
                }
                Verdict::NeedsKeys => return Ok(Driven::NeedsKeys(taken.id)),
            }
        }
        if taken.is_over == Some(true) {
            for _ in 0..progress.busy.len() {
                progress.skip(HELD);
            }
            progress.busy.clear();
        }
        note(connection, &taken, &progress).await?;
        Ok(Driven::Chunk(progress.cancelled))
    }

    /// The requests of the next chunk: matches, and once there are no more, those to try again.
    async fn chunk(
        &self,
        connection: &mut PgConnection,
        taken: &Taken,
        limit: usize,
        progress: &mut Progress,
    ) -> Result<Vec<RequestId>, sqlx::Error> {
        if progress.has_looked_at_all {
            let number = limit.min(progress.busy.len());
            return Ok(progress.busy.drain(..number).collect());
        }
        let search = Search {
            action: taken.action,
            filter: &taken.filter,
            until: taken.until,
        };
        let found = search
            .look(connection, taken.after, limit, self.sealer())
            .await?;
        progress.looked = found.looked;
        progress.after = found.next.or(progress.after);
        progress.has_looked_at_all = found.next.is_none();
        Ok(found.matching.into_iter().map(|row| row.id).collect())
    }
}

/// The row stays locked until the transaction ends.
const TAKE: &str = "
    SELECT
        o.id, o.format, o.action, o.filter::text AS filter, o.actor, o.reason, o.rate,
        epoch_us(o.started_at) AS until, o.after_at, o.after_id, o.busy,
        o.busy_until <= clock_timestamp() AS is_over
    FROM operations o
    WHERE o.state = 'running' AND o.next_at <= clock_timestamp() AND o.format <= $1
        AND o.id <> ALL ($2)
    ORDER BY o.next_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED";

fn taken(row: &PgRow, id: OperationId) -> Result<Option<Taken>, sqlx::Error> {
    let (Some(action), Some(filter)) = read(row)? else {
        return Ok(None);
    };
    let after_at: Option<i64> = row.try_get("after_at")?;
    let after_id: Option<Uuid> = row.try_get("after_id")?;
    let busy: Vec<Uuid> = row.try_get("busy")?;
    Ok(Some(Taken {
        id,
        action,
        filter,
        author: Signed {
            actor: row.try_get("actor")?,
            reason: row.try_get("reason")?,
        },
        rate: row.try_get("rate")?,
        until: row.try_get("until")?,
        after: after_at.zip(after_id).map(|(finished_at, id)| Position {
            finished_at,
            id: id.into(),
        }),
        busy: busy.into_iter().map(RequestId::from).collect(),
        is_over: row.try_get("is_over")?,
    }))
}

/// When the next operation is due.
async fn next(
    connection: &mut PgConnection,
    except: &[Uuid],
) -> Result<Option<Duration>, sqlx::Error> {
    let millis: Option<i64> = sqlx::query_scalar(
        "SELECT (extract(epoch FROM o.next_at - clock_timestamp()) * 1000)::bigint
         FROM operations o
         WHERE o.state = 'running' AND o.format <= $1 AND o.id <> ALL ($2)
         ORDER BY o.next_at LIMIT 1",
    )
    .bind(FORMAT)
    .bind(except)
    .fetch_optional(connection)
    .await?;
    Ok(millis.map(|millis| Duration::from_millis(millis.max(0) as u64)))
}

/// Notes what the chunk did, and records it.
async fn note(
    connection: &mut PgConnection,
    taken: &Taken,
    progress: &Progress,
) -> Result<(), sqlx::Error> {
    if !progress.done.is_empty() {
        let old: Vec<_> = progress.done.iter().map(|(id, _)| id).collect();
        let new: Vec<_> = progress.done.iter().filter_map(|(_, new)| *new).collect();
        let detail = if new.is_empty() {
            serde_json::json!({ "requests": old })
        } else {
            serde_json::json!({ "requests": old, "new": new })
        };
        let entry = Entry::new(taken.action.as_str(), taken.id.to_string()).detail(&detail);
        record_chunk(connection, &taken.author, &entry, taken.id).await?;
    }
    // A chunk is small.
    let done = u32::try_from(progress.done.len()).unwrap_or(u32::MAX);
    let pause = match taken.rate {
        Some(rate) => Duration::from_secs_f64(f64::from(done) / rate),
        None => Duration::ZERO,
    };
    let pause = if progress.has_looked_at_all {
        pause.max(BUSY_PAUSE)
    } else {
        pause
    };
    let busy: Vec<Uuid> = progress.busy.iter().copied().map(Uuid::from).collect();
    let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    sqlx::query(
        "UPDATE operations o
         SET after_at = $2, after_id = $3, busy = $4, looked = o.looked + $5, done = o.done + $6,
            skipped = o.skipped + $7, failed = o.failed + $8,
            last_skipped = coalesce($9, o.last_skipped), last_error = coalesce($10, o.last_error),
            driven_at = clock_timestamp(),
            next_at = clock_timestamp() + $11 * interval '1 microsecond',
            busy_until = CASE
                WHEN $12 THEN
                    coalesce(o.busy_until, clock_timestamp() + $13 * interval '1 millisecond')
            END,
            state = CASE WHEN $14 THEN 'finished' ELSE o.state END,
            finished_at = CASE WHEN $14 THEN clock_timestamp() END
         WHERE o.id = $1",
    )
    .bind(Uuid::from(taken.id))
    .bind(progress.after.map(|after| after.finished_at))
    .bind(progress.after.map(|after| Uuid::from(after.id)))
    .bind(busy)
    .bind(count(progress.looked))
    .bind(count(progress.done.len() as u64))
    .bind(count(progress.skipped))
    .bind(count(progress.failed))
    .bind(&progress.last_skipped)
    .bind(&progress.last_error)
    .bind(i64::try_from(pause.as_micros()).unwrap_or(i64::MAX))
    .bind(progress.has_looked_at_all)
    .bind(BUSY_FOR.as_millis() as i64)
    .bind(progress.is_finished())
    .execute(connection)
    .await?;
    Ok(())
}
