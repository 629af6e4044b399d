//! Requests that ended without success. What changes them are functions of the schema; they say how they lock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::millis;
use crate::dead_letter::{DeadLetter, HaltedKey, Resolution, Wanted};
use crate::id::RequestId;
use crate::status::Status;

/// Which part of the kept requests the next statement is about.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) wanted: Wanted,
    /// In microseconds since 1970, by the database's clock: what ends later is not meant, or requests that fail again at once
    /// would be met for ever.
    pub(crate) now: i64,
    pub(crate) limit: u32,
}

/// The database's clock, in microseconds since 1970.
pub(crate) async fn now(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        .fetch_one(connection)
        .await
}

const COLUMNS: &str = r#"
    o.id, o.channel_name, o.status, o.attempts, o.http_status, o.error_class, o.error,
    CASE WHEN is_ordered(o.channel_args) THEN substr(o.channel_args, 8) END AS ordering_key,
    (extract(epoch FROM o.created_at) * 1000000)::bigint AS created_at,
    (extract(epoch FROM o.finished_at) * 1000000)::bigint AS finished_at,
    request_destination(p.head) AS destination,
    substring(p.head FROM '^\{"method":"([^"\\]*)"') AS method"#;

/// By the id's index of the partition, so that paging costs what it shows and not what came before.
const MATCHING: &str = "
    FROM outcomes o LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[o.id])
    WHERE o.slot = -1
        AND ($1::uuid IS NULL OR o.id > $1)
        AND ($2::text IS NULL OR o.channel_name = $2)
        AND ($3::text IS NULL OR o.status = $3)
        AND o.finished_at <= 'epoch'::timestamptz + ($4 - coalesce($5, 0)) * interval '1 microsecond'
        AND ($6::bigint IS NULL OR o.finished_at >= 'epoch'::timestamptz + ($4 - $6) * interval '1 microsecond')
        AND ($7::text IS NULL OR request_destination(p.head) = $7)
    ORDER BY o.id LIMIT $8";

async fn matching(
    connection: &mut PgConnection,
    columns: &str,
    page: &Page,
) -> Result<Vec<PgRow>, sqlx::Error> {
    let wanted = &page.wanted;
    sqlx::query(&format!("SELECT {columns} {MATCHING}"))
        .bind(wanted.after.map(Uuid::from))
        .bind(wanted.channel.as_deref())
        .bind(wanted.status.map(Status::as_str))
        .bind(page.now)
        .bind(wanted.finished_before.map(micros))
        .bind(wanted.finished_within.map(micros))
        .bind(wanted.destination.as_deref())
        .bind(i64::from(page.limit))
        .fetch_all(connection)
        .await
}

/// The kept requests of a page, in the order of their ids.
pub(crate) async fn list(
    connection: &mut PgConnection,
    page: &Page,
) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let rows = matching(connection, COLUMNS, page).await?;
    rows.iter().map(kept).collect()
}

/// The ids of a page. They may be kept no more when something is done with them.
pub(crate) async fn ids(
    connection: &mut PgConnection,
    page: &Page,
) -> Result<Vec<RequestId>, sqlx::Error> {
    let rows = matching(connection, "o.id", page).await?;
    rows.iter()
        .map(|row| Ok(row.try_get::<Uuid, _>("id")?.into()))
        .collect()
}

/// What came of a wish to change a kept request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    Done,
    /// A transaction has its ordering key; nothing was done.
    Busy,
    /// Unfinished requests of another channel have its ordering key; nothing was done.
    Elsewhere,
    /// Its payload is not there any more.
    Gone,
    /// It is not kept, or not so.
    NotKept(Standing),
}

/// Where a request stands that can't be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// `None`: there is no such request.
    pub(crate) status: Option<Status>,
    pub(crate) replayed_as: Option<RequestId>,
}

fn changed(verdict: Option<&str>, standing: Standing) -> Changed {
    match verdict {
        Some("busy") => Changed::Busy,
        Some("elsewhere") => Changed::Elsewhere,
        Some("gone") => Changed::Gone,
        Some(_) => Changed::Done,
        None => Changed::NotKept(standing),
    }
}

async fn standing(connection: &mut PgConnection, id: RequestId) -> Result<Standing, sqlx::Error> {
    let replayed_as: Option<Option<Uuid>> =
        sqlx::query_scalar("SELECT replayed_as FROM outcomes WHERE id = $1 LIMIT 1")
            .bind(Uuid::from(id))
            .fetch_optional(&mut *connection)
            .await?;
    Ok(Standing {
        status: super::outcome::status(connection, id).await?,
        replayed_as: replayed_as.flatten().map(RequestId::from),
    })
}

/// Makes new requests of kept ones, in one statement. Each is on its own: what can't be replayed is left as it is.
pub(crate) async fn replay(
    connection: &mut PgConnection,
    pairs: &[(RequestId, RequestId)],
    retention: Duration,
) -> Result<Vec<(RequestId, RequestId, Changed)>, sqlx::Error> {
    let (old, new): (Vec<Uuid>, Vec<Uuid>) = pairs
        .iter()
        .map(|(old, new)| (Uuid::from(*old), Uuid::from(*new)))
        .unzip();
    let rows: Vec<(Uuid, Uuid, Option<String>)> = sqlx::query_as(
        "SELECT i.old, i.new, replay_request(i.old, i.new, $3 * interval '1 millisecond')
         FROM unnest($1::uuid[], $2::uuid[]) AS i(old, new)",
    )
    .bind(old)
    .bind(new)
    .bind(millis(retention))
    .fetch_all(&mut *connection)
    .await?;
    let mut replayed = Vec::with_capacity(rows.len());
    for (old, new, verdict) in rows {
        let old = RequestId::from(old);
        let standing = match verdict {
            Some(_) => Standing {
                status: None,
                replayed_as: None,
            },
            None => standing(connection, old).await?,
        };
        replayed.push((old, new.into(), changed(verdict.as_deref(), standing)));
    }
    Ok(replayed)
}

/// Says of an ambiguous request whether it was sent; with `finished_at`, only if it is still the end that was asked about.
pub(crate) async fn resolve(
    connection: &mut PgConnection,
    id: RequestId,
    resolution: Resolution,
    finished_at: Option<i64>,
    retention: Duration,
) -> Result<Changed, sqlx::Error> {
    let verdict: Option<String> = sqlx::query_scalar(
        "SELECT resolve_request(
            $1, $2, 'epoch'::timestamptz + $3::bigint * interval '1 microsecond', $4 * interval '1 millisecond'
        )",
    )
    .bind(Uuid::from(id))
    .bind(resolution == Resolution::Sent)
    .bind(finished_at)
    .bind(millis(retention))
    .fetch_one(&mut *connection)
    .await?;
    let standing = standing(connection, id).await?;
    Ok(changed(verdict.as_deref(), standing))
}

/// Forgets kept requests. Returns how many there were.
pub(crate) async fn purge(
    connection: &mut PgConnection,
    ids: &[RequestId],
) -> Result<u64, sqlx::Error> {
    let purged: i64 = sqlx::query_scalar("SELECT purge_requests($1)")
        .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
        .fetch_one(connection)
        .await?;
    Ok(purged.unsigned_abs())
}

/// The requests that hold up their ordering keys, those of a key in its order.
pub(crate) async fn halted(connection: &mut PgConnection) -> Result<Vec<HaltedKey>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT m.channel_name, substr(m.channel_args, 8) AS key, m.id,
            (extract(epoch FROM coalesce(o.finished_at, clock_timestamp())) * 1000000)::bigint AS since
         FROM mq_msgs m LEFT JOIN outcomes o ON o.id = ANY (ARRAY[m.id]) AND o.slot = -1
         WHERE m.state = 3
         ORDER BY m.channel_name, m.channel_args, m.seq",
    )
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(HaltedKey {
                channel: row.try_get("channel_name")?,
                key: row.try_get("key")?,
                id: row.try_get::<Uuid, _>("id")?.into(),
                since: at(row.try_get("since")?),
            })
        })
        .collect()
}

/// Lets an ordering key go on. Returns whether it was held up.
pub(crate) async fn resume(
    connection: &mut PgConnection,
    channel: &str,
    group: &str,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT resume_key($1, $2)")
        .bind(channel)
        .bind(group)
        .fetch_one(connection)
        .await
}

/// An ambiguous request that the other side is to be asked about.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) kept: DeadLetter,
    /// How often it was asked, this time included: the fence.
    pub(crate) times: i32,
    /// In microseconds since 1970.
    pub(crate) finished_at: i64,
    pub(crate) head: Option<String>,
    pub(crate) body: Option<Bytes>,
}

/// Takes up to `limit` ambiguous requests to ask about, for as long as `lease`; nobody else takes them in the meantime.
pub(crate) async fn ask(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    lease: Duration,
    limit: i64,
) -> Result<Vec<Asked>, sqlx::Error> {
    let rows = sqlx::query(&format!(
        "WITH due AS MATERIALIZED (
            SELECT k.id FROM outcomes_kept k
            WHERE k.status = 'ambiguous' AND ($1::text[] IS NULL OR k.channel_name = ANY ($1))
                AND (k.reconcile_at IS NULL OR k.reconcile_at <= clock_timestamp())
            ORDER BY k.reconcile_at NULLS FIRST LIMIT $3
            FOR UPDATE SKIP LOCKED
        ), o AS (
            UPDATE outcomes_kept k
            SET reconcile_at = clock_timestamp() + $2 * interval '1 millisecond', reconciles = k.reconciles + 1
            FROM due WHERE k.id = ANY (ARRAY[due.id])
            RETURNING k.*
        )
        SELECT {COLUMNS}, o.reconciles, p.head, p.body FROM o LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[o.id])"
    ))
    .bind(channels)
    .bind(millis(lease))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Asked {
                kept: kept(row)?,
                times: row.try_get("reconciles")?,
                finished_at: row.try_get("finished_at")?,
                head: row.try_get("head")?,
                body: row.try_get::<Option<Vec<u8>>, _>("body")?.map(Bytes::from),
            })
        })
        .collect()
}

/// Has the other side asked again after a while.
pub(crate) async fn ask_again(
    connection: &mut PgConnection,
    id: RequestId,
    times: i32,
    delay: Duration,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE outcomes_kept SET reconcile_at = clock_timestamp() + $3 * interval '1 millisecond'
         WHERE id = $1 AND reconciles = $2",
    )
    .bind(Uuid::from(id))
    .bind(times)
    .bind(millis(delay))
    .execute(connection)
    .await?;
    Ok(())
}

fn kept(row: &PgRow) -> Result<DeadLetter, sqlx::Error> {
    let status: String = row.try_get("status")?;
    let attempts: i32 = row.try_get("attempts")?;
    let http_status: Option<i16> = row.try_get("http_status")?;
    Ok(DeadLetter {
        id: row.try_get::<Uuid, _>("id")?.into(),
        channel: row.try_get("channel_name")?,
        destination: row.try_get("destination")?,
        method: row.try_get("method")?,
        ordering_key: row.try_get("ordering_key")?,
        status: Status::from_name(&status).unwrap_or(Status::Discarded),
        attempts: attempts.unsigned_abs(),
        created_at: at(row.try_get("created_at")?),
        finished_at: at(row.try_get("finished_at")?),
        http_status: http_status.map(i16::unsigned_abs),
        error_class: row.try_get("error_class")?,
        error: row.try_get("error")?,
    })
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn at(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(micros.unsigned_abs())
}
