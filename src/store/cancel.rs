//! Cancelling requests that have not finished.

use sqlx::PgConnection;
use uuid::Uuid;

use super::{Store, millis};
use crate::change::{Entry, Signed};
use crate::error::Error;
use crate::id::RequestId;

/// How many requests one statement cancels: one statement for a whole channel could outlast its
/// timeout.
const BATCH: usize = 1000;

/// What a cancellation found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Cancelled {
    /// With the request's channel.
    Now(String),
    /// The request had finished already.
    Finished,
    Unknown,
}

impl Store {
    /// Cancels a request unless it has finished.
    pub(crate) async fn cancel(&self, id: RequestId) -> Result<Cancelled, Error> {
        let retention = millis(self.config().retention);
        let (verdict, channel) = self
            .run_verified("cancel", async |connection| {
                cancel(connection, id, retention).await
            })
            .await?;
        Ok(cancelled(verdict.as_deref(), channel))
    }

    /// As [`cancel`](Self::cancel), on the record.
    pub(crate) async fn cancel_recorded(
        &self,
        id: RequestId,
        author: &Signed,
    ) -> Result<Cancelled, Error> {
        let retention = millis(self.config().retention);
        self.recorded_verified("cancel.recorded", author, async |connection| {
            let (verdict, channel) = cancel(connection, id, retention).await?;
            let verdict = cancelled(verdict.as_deref(), channel);
            let is_now = matches!(verdict, Cancelled::Now(_));
            Ok((
                verdict,
                is_now.then(|| Entry::new("cancel", id.to_string())),
            ))
        })
        .await
    }

    /// Cancels a batch of unfinished requests of these channels, or of every channel for `None`.
    /// Returns their ids with their channels, and whether the batch was full, so that there may be
    /// more.
    pub(crate) async fn cancel_channels(
        &self,
        channels: Option<&[String]>,
    ) -> Result<(Vec<(RequestId, String)>, bool), Error> {
        let retention = millis(self.config().retention);
        let cancelled = self
            .run_verified("cancel.channels", async |connection| {
                cancel_channels(connection, channels, retention).await
            })
            .await?;
        let full = cancelled.len() == BATCH;
        let cancelled = cancelled
            .into_iter()
            .map(|(id, channel)| (RequestId::from(id), channel.unwrap_or_default()));
        Ok((cancelled.collect(), full))
    }
}

fn cancelled(verdict: Option<&str>, channel: Option<String>) -> Cancelled {
    match verdict {
        Some("cancelled") => Cancelled::Now(channel.unwrap_or_default()),
        Some(_) => Cancelled::Finished,
        None => Cancelled::Unknown,
    }
}

/// The channel is that of the row as it was before the statement.
async fn cancel(
    connection: &mut PgConnection,
    id: RequestId,
    retention: i64,
) -> Result<(Option<String>, Option<String>), sqlx::Error> {
    let cancel = "
        SELECT
            cancel_request($1, $2 * interval '1 millisecond'),
            (SELECT m.channel_name FROM mq_msgs m WHERE m.id = $1)";
    sqlx::query_as(cancel)
        .bind(Uuid::from(id))
        .bind(retention)
        .fetch_one(connection)
        .await
}

/// As for [`cancel`].
async fn cancel_channels(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    retention: i64,
) -> Result<Vec<(Uuid, Option<String>)>, sqlx::Error> {
    let cancel = "
        SELECT c.id, (SELECT m.channel_name FROM mq_msgs m WHERE m.id = c.id)
        FROM unnest(cancel_channels($1, $2 * interval '1 millisecond', $3)) AS c(id)";
    sqlx::query_as(cancel)
        .bind(channels)
        .bind(retention)
        .bind(BATCH as i32)
        .fetch_all(connection)
        .await
}
