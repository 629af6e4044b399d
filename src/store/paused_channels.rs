//! Channels of which no process begins an attempt.

use sqlx::{PgConnection, Row};

use super::dead_letters::at;
use super::{Store, StoreError};
use crate::change::{Entry, Signed};
use crate::error::Error;
use crate::inspection::PausedChannel;

/// How many channels can be paused. Each poll, and each process once a second, reads them all.
pub(crate) const MAX_PAUSED_CHANNELS: i32 = 1000;

/// What a pause did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Paused {
    Now,
    Already,
    /// Nothing: as many channels as can be are paused.
    TooMany,
}

impl Store {
    /// The names of the paused channels.
    pub(crate) async fn paused_names(&self) -> Result<Vec<String>, StoreError> {
        self.run("paused_channels.names", async |connection| {
            sqlx::query_scalar(
                "SELECT c.channel_name FROM paused_channels c WHERE c.resumed_at IS NULL",
            )
            .fetch_all(connection)
            .await
        })
        .await
    }

    /// The paused channels, by name.
    pub(crate) async fn paused_channels(&self) -> Result<Vec<PausedChannel>, Error> {
        self.run_verified("paused_channels.list", async |connection| {
            list(connection).await
        })
        .await
    }

    /// Pauses a channel. From the commit on, no poll that begins claims a request of it.
    pub(crate) async fn pause_channel(
        &self,
        channel: &str,
        author: &Signed,
    ) -> Result<Paused, Error> {
        self.recorded_verified("paused_channels.pause", author, async |connection| {
            let verdict: String = sqlx::query_scalar("SELECT pause_channel($1, $2, $3, $4)")
                .bind(channel)
                .bind(&author.actor)
                .bind(&author.reason)
                .bind(MAX_PAUSED_CHANNELS)
                .fetch_one(connection)
                .await?;
            Ok(match &*verdict {
                "paused" => (Paused::Now, Some(Entry::new("pause_channel", channel))),
                "already" => (Paused::Already, None),
                _ => (Paused::TooMany, None),
            })
        })
        .await
    }

    /// Resumes a channel. Returns whether it was paused.
    pub(crate) async fn resume_channel(
        &self,
        channel: &str,
        author: &Signed,
    ) -> Result<bool, Error> {
        self.recorded_verified("paused_channels.resume", author, async |connection| {
            let resumed: bool = sqlx::query_scalar("SELECT resume_channel($1)")
                .bind(channel)
                .fetch_one(connection)
                .await?;
            let entry = resumed.then(|| Entry::new("resume_channel", channel));
            Ok((resumed, entry))
        })
        .await
    }
}

async fn list(connection: &mut PgConnection) -> Result<Vec<PausedChannel>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT c.channel_name, epoch_us(c.since) AS since, c.actor, c.reason
         FROM paused_channels c WHERE c.resumed_at IS NULL ORDER BY c.channel_name",
    )
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(PausedChannel {
                channel: row.try_get("channel_name")?,
                since: at(row.try_get("since")?),
                by: row.try_get("actor")?,
                reason: row.try_get("reason")?,
            })
        })
        .collect()
}
