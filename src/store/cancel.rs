//! Cancelling requests that have not finished.

use sqlx::PgConnection;
use uuid::Uuid;

use super::{Store, millis};
use crate::error::Error;
use crate::id::RequestId;

/// How many requests one statement cancels: one statement for a whole channel could outlast its
/// timeout.
const BATCH: usize = 1000;

/// What a cancellation found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cancelled {
    Now,
    /// The request had finished already.
    Finished,
    Unknown,
}

impl Store {
    /// Cancels a request unless it has finished.
    pub(crate) async fn cancel(&self, id: RequestId) -> Result<Cancelled, Error> {
        let retention = millis(self.config().retention);
        let verdict = self
            .run_verified("cancel", async |connection| {
                cancel(connection, id, retention).await
            })
            .await?;
        Ok(match verdict.as_deref() {
            Some("cancelled") => Cancelled::Now,
            Some(_) => Cancelled::Finished,
            None => Cancelled::Unknown,
        })
    }

    /// Cancels a batch of unfinished requests of these channels, or of every channel for `None`.
    /// Returns their ids, and whether the batch was full, so that there may be more.
    pub(crate) async fn cancel_channels(
        &self,
        channels: Option<&[String]>,
    ) -> Result<(Vec<RequestId>, bool), Error> {
        let retention = millis(self.config().retention);
        let cancelled = self
            .run_verified("cancel.channels", async |connection| {
                cancel_channels(connection, channels, retention).await
            })
            .await?;
        let full = cancelled.len() == BATCH;
        Ok((cancelled.into_iter().map(RequestId::from).collect(), full))
    }
}

async fn cancel(
    connection: &mut PgConnection,
    id: RequestId,
    retention: i64,
) -> Result<Option<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT cancel_request($1, $2 * interval '1 millisecond')")
        .bind(Uuid::from(id))
        .bind(retention)
        .fetch_one(connection)
        .await
}

async fn cancel_channels(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    retention: i64,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar("SELECT cancel_channels($1, $2 * interval '1 millisecond', $3)")
        .bind(channels)
        .bind(retention)
        .bind(BATCH as i32)
        .fetch_one(connection)
        .await
}
