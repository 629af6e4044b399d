//! Handing outcomes to the application, in a transaction of its own database.

mod handler;
mod operate;
mod transaction;

use std::time::Duration;

use sqlx::PgConnection;
use uuid::Uuid;

use self::transaction::CallerTransaction;
use super::outcome::Found;
use super::{Store, StoreError, millis};
use crate::codec::Unreadable;
use crate::error::{BoxError, Error};
use crate::id::RequestId;
use crate::outcome::Outcome;

pub use self::handler::{OutcomeFn, OutcomeFnWith, OutcomeHandler, outcome_fn, outcome_fn_with};
pub(crate) use self::transaction::Xact;

/// How many outcomes one statement forgets.
const FORGOTTEN_AT_ONCE: i64 = 5000;

/// An outcome that is due, inside a transaction of the caller's pool. Dropping it closes the
/// connection.
#[derive(Debug)]
pub(crate) struct HandOver {
    transaction: CallerTransaction,
    xact: Xact,
    outcome: Outcome,
    store: Store,
}

impl HandOver {
    pub(crate) fn id(&self) -> RequestId {
        self.outcome.id
    }

    /// The transaction that the handler gets.
    pub(crate) fn xact(&self) -> &Xact {
        &self.xact
    }

    /// Calls the handler, marks the outcome as handled, and commits. Anything else rolls back.
    pub(crate) async fn run(mut self, handler: &dyn OutcomeHandler) -> Result<(), BoxError> {
        let connection = self.transaction.connection();
        if let Err(error) = handler.handle(connection, &self.outcome).await {
            // If this fails, the connection is closed, which rolls back too.
            let _ = self.transaction.roll_back().await;
            return Err(error);
        }
        self.store
            .commit_handled(self.transaction, self.outcome.id, &self.xact)
            .await
    }
}

/// What there was to hand over.
#[derive(Debug)]
pub(crate) enum Taken {
    Nothing,
    /// An outcome was due but has expired. It is not due any more.
    Expired,
    /// An outcome was due that this process can't read. It was put off.
    Unreadable {
        id: RequestId,
        reason: Unreadable,
        /// It was not put off before.
        first: bool,
    },
    HandOver(Box<HandOver>),
}

impl Store {
    /// From now on outcomes of the channel wait for a handler.
    pub(crate) async fn register_handler(&self, channel: &str) -> Result<(), Error> {
        self.run_verified("hand_over.register", async |connection| {
            register(connection, channel).await
        })
        .await
    }

    /// Outcomes of the channel don't wait for a handler any more. One that a handler has at this
    /// moment is left to the handler, or to the sweep.
    pub(crate) async fn unregister_handler(&self, channel: &str) -> Result<(), Error> {
        self.run_verified("hand_over.unregister", async |connection| {
            unregister(connection, channel).await
        })
        .await?;
        // In statements of their own, because there may be millions.
        let mut more = true;
        while more {
            more = self
                .run_verified("hand_over.forget", async |connection| {
                    forget(connection, channel).await
                })
                .await?;
        }
        Ok(())
    }

    /// Takes an outcome that is due, in a new transaction on the caller's pool. One that can't be
    /// read is due again after a delay of up to `cap`. Leaves out the outcomes in `except`.
    pub(crate) async fn take_unhandled(
        &self,
        channel: &str,
        except: &[RequestId],
        cap: Duration,
    ) -> Result<Taken, StoreError> {
        let failed = |error| StoreError::new("hand_over.take", error);
        let connection = self.caller_pool().acquire().await.map_err(failed)?;
        let mut transaction = CallerTransaction::begin(connection).await.map_err(failed)?;
        let (schema, prepared) = (&self.config().schema, self.caller_keeps_sessions());
        let due = transaction.take(schema, channel, except, prepared).await;
        let Some((id, xact)) = due.map_err(failed)? else {
            transaction.roll_back().await.map_err(failed)?;
            return Ok(Taken::Nothing);
        };
        // On one of the crate's own connections: the handler may work for long, and a lock on the
        // outcome's partition until then would delay pruning.
        let found = self.find(&[id]).await?.into_iter().next();
        match found {
            Some((_, Found::Finished(outcome))) => Ok(Taken::HandOver(Box::new(HandOver {
                transaction,
                xact,
                outcome: *outcome,
                store: self.clone(),
            }))),
            Some((_, Found::Unreadable(reason))) => {
                transaction.roll_back().await.map_err(failed)?;
                let first = self.park_unhandled(id, cap).await?;
                Ok(Taken::Unreadable { id, reason, first })
            }
            // One outcome alone is always fetched.
            Some((_, Found::Pending | Found::Unknown | Found::Unfetched)) | None => {
                // Under the row's lock: the request could finish anew.
                let marked = transaction.mark(id, &xact, schema, prepared).await;
                marked.map_err(failed)?;
                transaction.commit().await.map_err(failed)?;
                Ok(Taken::Expired)
            }
        }
    }

    async fn commit_handled(
        &self,
        transaction: CallerTransaction,
        id: RequestId,
        xact: &Xact,
    ) -> Result<(), BoxError> {
        let (schema, prepared) = (&self.config().schema, self.caller_keeps_sessions());
        transaction.commit_handled(id, xact, schema, prepared).await
    }

    /// Ends the session of a handler's transaction, if it still runs. Closing the connection is not
    /// enough: Postgres notices that only once the statement under way has ended.
    pub(crate) async fn end_hand_over(&self, xact: &Xact) -> Result<(), StoreError> {
        self.run("hand_over.end", async |connection| {
            end(connection, xact).await
        })
        .await
    }

    /// Makes an outcome due again that can't be read, after as long as it has been put off, from 5
    /// seconds up to `cap`. Returns whether it was not put off before.
    async fn park_unhandled(&self, id: RequestId, cap: Duration) -> Result<bool, StoreError> {
        self.run("hand_over.park", async |connection| {
            park(connection, id, cap).await
        })
        .await
    }

    /// Notes a failure. The outcome is due again after a delay that doubles with each failure, from
    /// one second up to `cap`. After `max_failures` it is parked. Returns `None` if the outcome
    /// doesn't wait any more.
    pub(crate) async fn put_off(
        &self,
        id: RequestId,
        error: &str,
        cap: Duration,
        max_failures: u32,
    ) -> Result<Option<PutOff>, StoreError> {
        let error = self.sealer().handler_error(id, error);
        self.run("hand_over.put_off", async |connection| {
            put_off(connection, id, &error, cap, max_failures).await
        })
        .await
    }
}

/// An outcome whose handler has failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PutOff {
    pub(crate) failures: u32,
    /// It is not handed over any more.
    pub(crate) parked: bool,
}

async fn register(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH seen AS (
            INSERT INTO handler_heartbeats (channel_name, seen_at) VALUES ($1, now())
            ON CONFLICT (channel_name) DO UPDATE SET seen_at = now()
         )
         INSERT INTO handled_channels (channel_name) VALUES ($1) ON CONFLICT DO NOTHING",
    )
    .bind(channel)
    .execute(connection)
    .await?;
    Ok(())
}

async fn unregister(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH unseen AS (DELETE FROM handler_heartbeats WHERE channel_name = $1)
         DELETE FROM handled_channels WHERE channel_name = $1",
    )
    .bind(channel)
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets some of the outcomes that wait for a handler of a channel without one. Returns whether
/// there may be more.
async fn forget(connection: &mut PgConnection, channel: &str) -> Result<bool, sqlx::Error> {
    let forgotten = sqlx::query(
        "DELETE FROM unhandled d WHERE d.id = ANY (ARRAY(
            SELECT u.id FROM unhandled u
            WHERE u.channel_name = $1
                AND NOT EXISTS (SELECT FROM handled_channels h WHERE h.channel_name = $1)
            LIMIT $2 FOR UPDATE SKIP LOCKED
         ))",
    )
    .bind(channel)
    .bind(FORGOTTEN_AT_ONCE)
    .execute(connection)
    .await?;
    Ok(forgotten.rows_affected() >= FORGOTTEN_AT_ONCE.unsigned_abs())
}

/// The transaction's id tells its session from one that has the same process id later.
async fn end(connection: &mut PgConnection, xact: &Xact) -> Result<(), sqlx::Error> {
    sqlx::query(
        "SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a
         WHERE a.datname = current_database() AND a.backend_xid = $1::text::xid8::xid",
    )
    .bind(&xact.0)
    .execute(connection)
    .await?;
    Ok(())
}

async fn put_off(
    connection: &mut PgConnection,
    id: RequestId,
    error: &str,
    cap: Duration,
    max_failures: u32,
) -> Result<Option<PutOff>, sqlx::Error> {
    let put_off: Option<(i32, bool)> = sqlx::query_as(
        "UPDATE unhandled
         SET failures = least(failures, 2147483646) + 1, error = $2, parked_since = NULL,
             failing_since = coalesce(failing_since, clock_timestamp()),
             due_at = CASE WHEN failures::bigint + 1 >= $4 THEN 'infinity' ELSE clock_timestamp()
                + least(power(2, least(failures, 20)) * 1000, $3) * interval '1 millisecond' END
         WHERE id = $1
         RETURNING failures, due_at = 'infinity'",
    )
    .bind(Uuid::from(id))
    .bind(error)
    .bind(millis(cap))
    .bind(i64::from(max_failures))
    .fetch_optional(connection)
    .await?;
    Ok(put_off.map(|(failures, parked)| PutOff {
        failures: failures.max(0).unsigned_abs(),
        parked,
    }))
}

/// The process that has the outcome now, if there is one, decides: it may be able to read it.
async fn park(
    connection: &mut PgConnection,
    id: RequestId,
    cap: Duration,
) -> Result<bool, sqlx::Error> {
    let first: Option<bool> = sqlx::query_scalar(
        "WITH since AS MATERIALIZED (
            SELECT u.id, CASE WHEN isfinite(u.parked_since) THEN u.parked_since ELSE now() END
                AS since
            FROM unhandled u WHERE u.id = $1 FOR UPDATE SKIP LOCKED
         )
         UPDATE unhandled u
         SET parked_since = s.since,
             due_at = now()
                + least(greatest(now() - s.since, '5 s'), $2 * interval '1 millisecond')
         FROM since s WHERE u.id = s.id
         RETURNING s.since = now()",
    )
    .bind(Uuid::from(id))
    .bind(millis(cap))
    .fetch_optional(connection)
    .await?;
    Ok(first.unwrap_or(false))
}
