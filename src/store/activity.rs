//! The table of what the fleet does: adding to it, and reading it.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::dead_letters::at;
use super::{Store, StoreError};
use crate::activity::{Activity, BUCKETS, Counts, Step, Window};
use crate::error::Error;

/// How many rows one read takes at most: more than 101 channels have in a day of ten minutes each.
const MAX_ROWS: i64 = 20_000;
/// How many rows one statement deletes.
const DELETES: i64 = 1000;

impl Store {
    /// Adds what this process has counted, by channel. An empty name stands for further channels.
    pub(crate) async fn note_activity(&self, counted: &[(&str, Counts)]) -> Result<(), StoreError> {
        self.run("activity.note", async |connection| {
            note(connection, counted).await
        })
        .await
    }

    /// What all processes have done in this window.
    pub(crate) async fn activity(&self, window: Window) -> Result<Activity, Error> {
        self.run_verified("activity.read", async |connection| {
            read(connection, window).await
        })
        .await
    }

    /// Deletes old rows. Returns whether there may be more.
    pub(crate) async fn sweep_activity(&self) -> Result<bool, StoreError> {
        self.run("sweep.activity", async |connection| {
            let deleted = sqlx::query(SWEEP).bind(DELETES).execute(connection).await?;
            Ok(deleted.rows_affected() >= DELETES as u64)
        })
        .await
    }
}

/// One short statement that locks a row for each channel, in the order of their names.
async fn note(
    connection: &mut PgConnection,
    counted: &[(&str, Counts)],
) -> Result<(), sqlx::Error> {
    let column = |number: fn(&Counts) -> u64| {
        let numbers = counted.iter().map(|(_, counts)| stored(number(counts)));
        numbers.collect::<Vec<i64>>()
    };
    let latency = counted.iter().flat_map(|(_, counts)| counts.latency);
    sqlx::query("SELECT note_activity($1, $2, $3, $4, $5, $6, $7, $8, $9)")
        .bind(counted.iter().map(|(name, _)| *name).collect::<Vec<_>>())
        .bind(column(|counts| counts.enqueued))
        .bind(column(|counts| counts.attempts))
        .bind(column(|counts| counts.failed_attempts))
        .bind(column(|counts| counts.completed))
        .bind(column(|counts| counts.discarded))
        .bind(column(|counts| counts.cancelled))
        .bind(column(|counts| counts.ambiguous))
        .bind(latency.map(stored).collect::<Vec<_>>())
        .execute(connection)
        .await?;
    Ok(())
}

fn stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Reads a range of the primary key, backwards. The first row has the time, also without any other.
const READ: &str = "
    WITH clock AS MATERIALIZED (
        SELECT date_bin(
            $1 * interval '1 minute', clock_timestamp(), '2000-01-01 UTC'
        ) AS last
    )
    SELECT
        epoch_us(c.last) AS last,
        (extract(epoch FROM c.last - a.began_at) / 60 / $1)::bigint AS ago,
        a.channel_name, a.enqueued, a.attempts, a.failed_attempts, a.completed, a.discarded,
        a.cancelled, a.ambiguous, a.latency
    FROM clock c LEFT JOIN LATERAL (
        SELECT * FROM activity a
        WHERE a.minutes = $1::smallint
            AND a.began_at > c.last - $2 * $1 * interval '1 minute' AND a.began_at <= c.last
        ORDER BY a.began_at DESC LIMIT $3
    ) a ON true";

/// A row of a minute is read for an hour only.
const SWEEP: &str = "
    DELETE FROM activity a WHERE a.ctid = ANY (ARRAY(
        (
            SELECT o.ctid FROM activity o
            WHERE o.minutes = 1 AND o.began_at < clock_timestamp() - interval '2 hours'
            ORDER BY o.began_at LIMIT $1
        ) UNION ALL (
            SELECT o.ctid FROM activity o
            WHERE o.minutes = 10 AND o.began_at < clock_timestamp() - interval '25 hours'
            ORDER BY o.began_at LIMIT $1
        )
    ))";

async fn read(connection: &mut PgConnection, window: Window) -> Result<Activity, sqlx::Error> {
    let rows = sqlx::query(READ)
        .bind(i32::from(window.minutes()))
        .bind(window.points() as i32)
        .bind(MAX_ROWS)
        .fetch_all(connection)
        .await?;
    let last = match rows.first() {
        Some(row) => row.try_get("last")?,
        None => 0,
    };
    let steps = rows.iter().map(step).collect::<Result<Vec<_>, _>>()?;
    let steps = steps.into_iter().flatten().collect();
    Ok(Activity::of(window, at(last), steps))
}

fn step(row: &PgRow) -> Result<Option<Step>, sqlx::Error> {
    let Some(ago) = row.try_get::<Option<i64>, _>("ago")? else {
        return Ok(None);
    };
    let number = |name: &str| Ok::<_, sqlx::Error>(read_back(row.try_get(name)?));
    let name: String = row.try_get("channel_name")?;
    let stored: Vec<i64> = row.try_get("latency")?;
    let mut latency = [0; BUCKETS];
    for (bucket, number) in latency.iter_mut().zip(stored) {
        *bucket = read_back(number);
    }
    Ok(Some(Step {
        ago: usize::try_from(ago).unwrap_or(usize::MAX),
        channel: (!name.is_empty()).then_some(name),
        counts: Counts {
            enqueued: number("enqueued")?,
            attempts: number("attempts")?,
            failed_attempts: number("failed_attempts")?,
            completed: number("completed")?,
            discarded: number("discarded")?,
            cancelled: number("cancelled")?,
            ambiguous: number("ambiguous")?,
            latency,
        },
    }))
}

fn read_back(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
