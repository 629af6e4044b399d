//! Handing outcomes to the application, in a transaction of its own database.

mod handler;

use std::time::Duration;

use sqlx::{PgConnection, PgExecutor, Postgres, Transaction};
use uuid::Uuid;

use super::outcome::Found;
use super::{Store, StoreError, millis, quoted};
use crate::codec::Unreadable;
use crate::error::{BoxError, Error};
use crate::id::RequestId;
use crate::outcome::Outcome;

pub use self::handler::{OutcomeFn, OutcomeFnWith, OutcomeHandler, outcome_fn, outcome_fn_with};

/// How many outcomes one statement forgets.
const FORGOTTEN_AT_ONCE: i64 = 5000;

/// An outcome that is due, inside a transaction of the caller's pool.
#[derive(Debug)]
pub(crate) struct HandOver {
    transaction: Transaction<'static, Postgres>,
    outcome: Outcome,
}

impl HandOver {
    pub(crate) fn id(&self) -> RequestId {
        self.outcome.id
    }

    /// Calls the handler and commits. Anything else rolls back.
    pub(crate) async fn run(mut self, handler: &dyn OutcomeHandler) -> Result<(), BoxError> {
        handler.handle(&mut self.transaction, &self.outcome).await?;
        self.transaction.commit().await?;
        Ok(())
    }
}

/// What there was to hand over.
#[derive(Debug)]
pub(crate) enum Taken {
    Nothing,
    /// An outcome was due but has expired. It is not due any more.
    Expired,
    /// An outcome was due that this version can't read. It was put off.
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

    /// Takes an outcome that is due, in a new transaction on the caller's pool. A commit marks the
    /// outcome as handled. One that can't be read is due again after a delay of up to `cap`.
    pub(crate) async fn take_unhandled(
        &self,
        channel: &str,
        cap: Duration,
    ) -> Result<Taken, StoreError> {
        let failed = |error| StoreError::new("hand_over.take", error);
        let mut transaction = self.caller_pool().begin().await.map_err(failed)?;
        let (schema, prepared) = (&self.config().schema, self.caller_keeps_sessions());
        let due = take(&mut *transaction, schema, channel, prepared)
            .await
            .map_err(failed)?;
        let Some(id) = due else {
            return Ok(Taken::Nothing);
        };
        // On one of the crate's own connections: the handler may work for long, and a lock on the
        // outcome's partition until then would delay pruning.
        let found = self.find(&[id]).await?.into_iter().next();
        match found {
            Some((_, Found::Finished(outcome))) => Ok(Taken::HandOver(Box::new(HandOver {
                transaction,
                outcome: *outcome,
            }))),
            Some((_, Found::Unreadable(reason))) => {
                transaction.rollback().await.map_err(failed)?;
                let first = self.park_unhandled(id, cap).await?;
                Ok(Taken::Unreadable { id, reason, first })
            }
            // One outcome alone is always fetched.
            Some((_, Found::Pending | Found::Unknown | Found::Unfetched)) | None => {
                transaction.commit().await.map_err(failed)?;
                Ok(Taken::Expired)
            }
        }
    }

    /// Makes an outcome due again that can't be read, after as long as it has been put off, from 5
    /// seconds up to `cap`. Returns whether it was not put off before.
    async fn park_unhandled(&self, id: RequestId, cap: Duration) -> Result<bool, StoreError> {
        self.run("hand_over.park", async |connection| {
            park(connection, id, cap).await
        })
        .await
    }

    /// Makes an outcome due again after a delay that doubles with each failure, from one second up
    /// to `cap`.
    pub(crate) async fn put_off(
        &self,
        id: RequestId,
        error: &str,
        cap: Duration,
    ) -> Result<(), Error> {
        self.run_verified("hand_over.put_off", async |connection| {
            put_off(connection, id, error, cap).await
        })
        .await
    }
}

async fn register(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO handled_channels (channel_name) VALUES ($1) ON CONFLICT DO NOTHING")
        .bind(channel)
        .execute(connection)
        .await?;
    Ok(())
}

async fn unregister(connection: &mut PgConnection, channel: &str) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM handled_channels WHERE channel_name = $1")
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

/// The outcome that is due. Its row stays locked until the transaction ends.
async fn take<'c>(
    executor: impl PgExecutor<'c>,
    schema: &str,
    channel: &str,
    prepared: bool,
) -> Result<Option<RequestId>, sqlx::Error> {
    // On the caller's connection nothing may depend on the search_path.
    let call = format!("SELECT {}.take_unhandled($1)", quoted(schema));
    let id: Option<Uuid> = sqlx::query_scalar(&call)
        .bind(channel)
        .persistent(prepared)
        .fetch_one(executor)
        .await?;
    Ok(id.map(RequestId::from))
}

async fn put_off(
    connection: &mut PgConnection,
    id: RequestId,
    error: &str,
    cap: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE unhandled
         SET failures = failures + 1, error = $2, parked_since = NULL,
             due_at = clock_timestamp()
                + least(power(2, least(failures, 20)) * 1000, $3) * interval '1 millisecond'
         WHERE id = $1",
    )
    .bind(Uuid::from(id))
    .bind(error)
    .bind(millis(cap))
    .execute(connection)
    .await?;
    Ok(())
}

/// The process that has the outcome now, if there is one, decides: it may be able to read it.
async fn park(
    connection: &mut PgConnection,
    id: RequestId,
    cap: Duration,
) -> Result<bool, sqlx::Error> {
    let first: Option<bool> = sqlx::query_scalar(
        "WITH since AS MATERIALIZED (
            SELECT u.id, coalesce(u.parked_since, now()) AS since
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
