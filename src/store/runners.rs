//! Which runners there are, and which channels have none.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::dead_letters::at;
use super::{Store, StoreError, millis};
use crate::error::Error;
use crate::health::RunnerInfo;

/// What a runner says of itself.
#[derive(Debug)]
pub(crate) struct Announcement<'a> {
    /// The handle that the runner belongs to.
    pub(crate) instance: Uuid,
    /// `None` for all channels.
    pub(crate) channels: Option<&'a [Arc<str>]>,
    pub(crate) host: Option<&'a str>,
    /// How many requests the process has claimed.
    pub(crate) in_flight: usize,
    /// How long the runner counts as alive without another announcement.
    pub(crate) alive_for: Duration,
}

impl Store {
    /// Registers a runner, or renews its registration.
    pub(crate) async fn announce(&self, runner: &Announcement<'_>) -> Result<(), StoreError> {
        self.run("runners.announce", async |connection| {
            announce(connection, runner).await
        })
        .await
    }

    /// Removes a runner's registration.
    pub(crate) async fn withdraw(&self, instance: Uuid) -> Result<(), StoreError> {
        self.run("runners.withdraw", async |connection| {
            sqlx::query("DELETE FROM runners WHERE id = $1")
                .bind(instance)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// The runners that are alive, those that started first first.
    pub(crate) async fn runners(&self) -> Result<Vec<RunnerInfo>, Error> {
        self.run_verified("runners.list", async |connection| runners(connection).await)
            .await
    }

    /// Which of these channels no runner delivers.
    pub(crate) async fn without_runner(
        &self,
        channels: &[Arc<str>],
    ) -> Result<Vec<String>, StoreError> {
        self.run("runners.missing", async |connection| {
            let channels: Vec<&str> = channels.iter().map(|channel| &**channel).collect();
            sqlx::query_scalar(
                "SELECT c.name
                 FROM unnest($1::text[]) AS c(name), unnest(known_formats()) AS known(format)
                 WHERE NOT is_delivered(c.name, known.format)
                 GROUP BY c.name ORDER BY c.name",
            )
            .bind(channels)
            .fetch_all(connection)
            .await
        })
        .await
    }
}

/// Channels that had no runner have one from now on, also if no sweep comes by while it lives.
async fn announce(
    connection: &mut PgConnection,
    runner: &Announcement<'_>,
) -> Result<(), sqlx::Error> {
    let channels: Option<Vec<&str>> = runner
        .channels
        .map(|channels| channels.iter().map(|channel| &**channel).collect());
    sqlx::query(
        "WITH announced AS (
            INSERT INTO runners AS r (
                id, channels, formats, version, host, pid, expires_at, in_flight
            )
            VALUES (
                $1, $2, known_formats(), $3, $4, $5,
                clock_timestamp() + $6 * interval '1 millisecond', $7
            )
            ON CONFLICT (id) DO UPDATE
            SET seen_at = clock_timestamp(), expires_at = excluded.expires_at,
                in_flight = excluded.in_flight
        )
        UPDATE undelivered_channels u SET since = NULL
        WHERE u.since IS NOT NULL AND ($2 IS NULL OR u.channel_name = ANY ($2))
            AND u.format = ANY (known_formats())",
    )
    .bind(runner.instance)
    .bind(channels)
    .bind(env!("CARGO_PKG_VERSION"))
    .bind(runner.host)
    .bind(i64::from(std::process::id()))
    .bind(millis(runner.alive_for))
    .bind(i32::try_from(runner.in_flight).unwrap_or(i32::MAX))
    .execute(connection)
    .await?;
    Ok(())
}

async fn runners(connection: &mut PgConnection) -> Result<Vec<RunnerInfo>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT
            r.id, r.channels, r.version, r.host, r.pid, r.in_flight,
            (extract(epoch FROM r.started_at) * 1000000)::bigint AS started_at,
            (extract(epoch FROM r.seen_at) * 1000000)::bigint AS seen_at
         FROM runners r WHERE r.expires_at > clock_timestamp()
         ORDER BY r.started_at, r.id",
    )
    .fetch_all(connection)
    .await?;
    rows.iter().map(runner).collect()
}

fn runner(row: &PgRow) -> Result<RunnerInfo, sqlx::Error> {
    let pid: i64 = row.try_get("pid")?;
    let in_flight: i32 = row.try_get("in_flight")?;
    Ok(RunnerInfo {
        id: row.try_get("id")?,
        channels: row.try_get("channels")?,
        version: row.try_get("version")?,
        host: row.try_get("host")?,
        pid: u32::try_from(pid).unwrap_or_default(),
        in_flight: in_flight.unsigned_abs(),
        started_at: at(row.try_get("started_at")?),
        seen_at: at(row.try_get("seen_at")?),
    })
}
