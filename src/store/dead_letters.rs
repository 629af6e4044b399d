//! Dead letters. Functions of the schema change them, and say how they lock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{PgConnection, Postgres, Row};
use uuid::Uuid;

use super::columns::{METHOD, ordering_key as ordering_key_of};
use super::{Store, StoreError, millis};
use crate::codec::{OUTCOME_FORMAT, Unreadable};
use crate::dead_letter::{DeadLetter, HaltedKey, Position, Resolution, Wanted};
use crate::destination::ordering_key;
use crate::error::Error;
use crate::id::RequestId;
use crate::metadata::Metadata;
use crate::sealer::Sealer;
use crate::status::Status;

/// Which dead letters the next statement is about.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) wanted: Wanted,
    /// When the call began, in microseconds since 1970 by the database's clock. Requests that
    /// finish later are left out, or a loop would meet those that fail again at once for ever.
    pub(crate) now: i64,
    pub(crate) limit: u32,
}

impl Store {
    /// The database's clock, in microseconds since 1970.
    pub(crate) async fn now(&self) -> Result<i64, Error> {
        self.run_verified("dead_letters.now", async |connection| now(connection).await)
            .await
    }

    /// The first dead letters that match, in the order in which they ended.
    pub(crate) async fn dead_letters(
        &self,
        wanted: Wanted,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, Error> {
        self.run_verified("dead_letters.list", async |connection| {
            let page = Page {
                now: now(&mut *connection).await?,
                limit,
                wanted,
            };
            list(connection, &page, self.sealer()).await
        })
        .await
    }

    /// How many dead letters match, counting no further than the limit.
    pub(crate) async fn count_dead_letters(
        &self,
        wanted: Wanted,
        limit: u32,
    ) -> Result<u64, Error> {
        self.run_verified("dead_letters.count", async |connection| {
            let page = Page {
                now: now(&mut *connection).await?,
                limit,
                wanted,
            };
            count(connection, &page).await
        })
        .await
    }

    /// The dead letters of a page. They may be none any more when they are used.
    pub(crate) async fn dead_letter_ids(&self, page: &Page) -> Result<Vec<Position>, Error> {
        self.run_verified("dead_letters.ids", async |connection| {
            ids(connection, page).await
        })
        .await
    }

    /// Replays dead letters under new ids, given as pairs of old and new. Each pair is independent:
    /// one that can't be replayed is left alone.
    pub(crate) async fn replay(
        &self,
        pairs: &[(RequestId, RequestId)],
    ) -> Result<Vec<Replayed>, StoreError> {
        let retention = self.config().retention;
        let (mut replayed, sealed) = self
            .run("dead_letters.replay", async |connection| {
                replay(connection, pairs, retention).await
            })
            .await?;
        for (old, new) in sealed {
            let bytes = self.config().max_request_body;
            let result = self
                .run_large("dead_letters.replay_sealed", bytes, async |connection| {
                    replay_sealed(connection, old, new, retention, self.sealer()).await
                })
                .await?;
            replayed.push((old, new, result));
        }
        Ok(replayed)
    }

    /// Records whether an ambiguous request was sent. With `finished_at`, only if the request still
    /// has the outcome of that time.
    pub(crate) async fn resolve(
        &self,
        id: RequestId,
        resolution: Resolution,
        finished_at: Option<i64>,
    ) -> Result<ChangeResult, Error> {
        let retention = self.config().retention;
        self.run_verified("dead_letters.resolve", async |connection| {
            resolve(connection, id, resolution, finished_at, retention).await
        })
        .await
    }

    /// Deletes dead letters. Returns how many there were.
    pub(crate) async fn purge(&self, ids: &[RequestId]) -> Result<u64, Error> {
        self.run_verified("dead_letters.purge", async |connection| {
            purge(connection, ids).await
        })
        .await
    }

    /// The requests that halt their ordering keys. Those of one key come in its order.
    pub(crate) async fn halted(&self) -> Result<Vec<HaltedKey>, Error> {
        self.run_verified("dead_letters.halted", async |connection| {
            halted(connection).await
        })
        .await
    }

    /// Resumes an ordering key. Returns whether it was halted.
    pub(crate) async fn resume(&self, channel: &str, group: &str) -> Result<bool, Error> {
        self.run_verified("dead_letters.resume", async |connection| {
            resume(connection, channel, group).await
        })
        .await
    }

    /// Takes up to `limit` ambiguous requests to ask their receivers about. No other process takes
    /// them for as long as `lease`.
    pub(crate) async fn take_ambiguous(
        &self,
        channels: Option<&[String]>,
        lease: Duration,
        limit: i64,
    ) -> Result<Vec<Question>, Error> {
        self.run_verified("reconcile.take", async |connection| {
            take_ambiguous(connection, channels, lease, limit, self.sealer()).await
        })
        .await
    }

    /// Makes an ambiguous request due for another question after `delay`.
    pub(crate) async fn ask_again(
        &self,
        id: RequestId,
        times: i32,
        delay: Duration,
    ) -> Result<(), StoreError> {
        self.run("reconcile.ask_again", async |connection| {
            ask_again(connection, id, times, delay).await
        })
        .await
    }
}

async fn now(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        .fetch_one(connection)
        .await
}

fn columns() -> String {
    let ordering_key = ordering_key_of("o.channel_args");
    format!(
        "o.id, o.channel_name, o.status, o.attempts, o.http_status, o.error_class, o.error,
    {ordering_key} AS ordering_key,
    epoch_us(o.created_at) AS created_at,
    epoch_us(o.finished_at) AS finished_at,
    o.destination,
    {METHOD} AS method,
    o.metadata::text AS metadata"
    )
}

/// The page of a filter, in the order in which the requests ended. Each combination of statuses,
/// channel and destination is one range of an index, so a page reads what it shows, for each of the
/// two statuses, and nothing else. What is filtered for is the expression of that index.
///
/// What a newer version keeps there is left out: this version would judge it.
macro_rules! page {
    ($filtered:literal, $wanted:literal) => {
        concat!(
            "SELECT page.id, page.finished_at
             FROM unnest(coalesce($1::text[], '{discarded,ambiguous}'))
                AS wanted(status), generate_series(1, $2) AS known(format), LATERAL (
                SELECT k.id, k.finished_at FROM outcomes_kept k
                WHERE ",
            $filtered,
            " = ",
            $wanted,
            " AND k.format = known.format
                    AND k.finished_at <= 'epoch'::timestamptz + $3 * interval '1 microsecond'
                    -- One lower bound: of two, a scan may begin at the wrong one.
                    AND (k.finished_at, k.id) > (
                        coalesce(
                            'epoch'::timestamptz + $4::bigint * interval '1 microsecond',
                            '-infinity'
                        ),
                        $5::uuid
                    )
                ORDER BY k.finished_at, k.id LIMIT $6
             ) page
             ORDER BY page.finished_at, page.id LIMIT $6"
        )
    };
}

fn page_of(wanted: &Wanted) -> &'static str {
    match (&wanted.channel, &wanted.destination) {
        (None, None) => page!("k.status", "wanted.status"),
        (Some(_), None) => page!(
            "(k.channel_name || ' ' || k.status)",
            "($7::text || ' ' || wanted.status)"
        ),
        (None, Some(_)) => page!(
            "(k.destination || ' ' || k.status)",
            "(left($7::text, 500) || ' ' || wanted.status)"
        ),
        (Some(_), Some(_)) => page!(
            "(k.channel_name || ' ' || k.destination || ' ' || k.status)",
            "($7::text || ' ' || left($8::text, 500) || ' ' || wanted.status)"
        ),
    }
}

fn bound<'q>(statement: &'q str, page: &'q Page) -> Query<'q, Postgres, PgArguments> {
    let wanted = &page.wanted;
    let latest = page.now - wanted.finished_before.map_or(0, micros);
    // Inclusive, because no dead letter has the nil id.
    let within = wanted.finished_within.map(|time| page.now - micros(time));
    let within = within.map(|earliest| (earliest, Uuid::nil()));
    let after = wanted
        .after
        .map(|after| (after.finished_at, after.id.into()));
    let from = within.max(after);
    let mut query = sqlx::query(statement)
        .bind(wanted.status.map(|status| vec![status.as_str()]))
        .bind(i32::from(OUTCOME_FORMAT))
        .bind(latest)
        .bind(from.map(|(finished_at, _)| finished_at))
        .bind(from.map_or(Uuid::nil(), |(_, id)| id))
        .bind(i64::from(page.limit))
        // Planned for the tables as they are now, which takes less than reading a page.
        .persistent(false);
    for filter in [&wanted.channel, &wanted.destination].into_iter().flatten() {
        query = query.bind(filter.as_str());
    }
    query
}

async fn count(connection: &mut PgConnection, page: &Page) -> Result<u64, sqlx::Error> {
    let statement = format!("SELECT count(*) FROM ({}) matching", page_of(&page.wanted));
    let row = bound(&statement, page).fetch_one(connection).await?;
    Ok(row.try_get::<i64, _>(0)?.unsigned_abs())
}

async fn list(
    connection: &mut PgConnection,
    page: &Page,
    sealer: &Sealer,
) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let statement = format!(
        "WITH page AS MATERIALIZED ({})
         SELECT {}
         FROM page JOIN outcomes_kept o ON o.id = ANY (ARRAY[page.id])
         LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[page.id])
         ORDER BY page.finished_at, page.id",
        page_of(&page.wanted),
        columns()
    );
    let rows = bound(&statement, page).fetch_all(connection).await?;
    rows.iter().map(|row| dead_letter(row, sealer)).collect()
}

pub(super) async fn ids(
    connection: &mut PgConnection,
    page: &Page,
) -> Result<Vec<Position>, sqlx::Error> {
    let statement = format!(
        "SELECT m.id, (extract(epoch FROM m.finished_at) * 1000000)::bigint AS finished_at
         FROM ({}) m ORDER BY m.finished_at, m.id",
        page_of(&page.wanted)
    );
    let rows = bound(&statement, page).fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            Ok(Position {
                finished_at: row.try_get("finished_at")?,
                id: row.try_get::<Uuid, _>("id")?.into(),
            })
        })
        .collect()
}

/// What a change of a dead letter did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ChangeResult {
    Done,
    /// Nothing: a transaction holds the ordering key.
    Busy,
    /// Nothing: unfinished requests of another channel have the ordering key.
    Elsewhere(KeyHolder),
    /// Nothing: the stored request is gone.
    Gone,
    /// Nothing: the stored request can't be read.
    Unreadable(Unreadable),
    /// Nothing: the request is no dead letter, or not of the right status.
    WrongState(CurrentState),
}

/// The state of a request that can't be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CurrentState {
    /// `None`: there is no such request.
    pub(crate) status: Option<Result<Status, Unreadable>>,
    pub(crate) replayed_as: Option<RequestId>,
}

/// An ordering key that a change needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyHolder {
    pub(crate) key: Box<str>,
    /// The channel that has the key, unless its requests finished meanwhile.
    pub(crate) channel: Option<Box<str>>,
}

/// What a function of the schema did with a request, by its verdict. Looks up why it did nothing.
async fn change_result(
    connection: &mut PgConnection,
    verdict: Option<&str>,
    id: RequestId,
) -> Result<ChangeResult, sqlx::Error> {
    Ok(match verdict {
        Some("busy") => ChangeResult::Busy,
        Some("elsewhere") => ChangeResult::Elsewhere(key_holder(connection, id).await?),
        Some("gone") => ChangeResult::Gone,
        Some(_) => ChangeResult::Done,
        None => ChangeResult::WrongState(current_state(connection, id).await?),
    })
}

async fn key_holder(
    connection: &mut PgConnection,
    id: RequestId,
) -> Result<KeyHolder, sqlx::Error> {
    let found: Option<(String, Option<String>)> = sqlx::query_as(
        "SELECT o.channel_args, ordered_elsewhere(o.channel_name, o.channel_args)
         FROM outcomes o WHERE o.id = $1 LIMIT 1",
    )
    .bind(Uuid::from(id))
    .fetch_optional(connection)
    .await?;
    let (group, channel) = found.unwrap_or_default();
    Ok(KeyHolder {
        key: ordering_key(&group).into(),
        channel: channel.map(Into::into),
    })
}

async fn current_state(
    connection: &mut PgConnection,
    id: RequestId,
) -> Result<CurrentState, sqlx::Error> {
    let replayed_as: Option<Option<Uuid>> =
        sqlx::query_scalar("SELECT replayed_as FROM outcomes WHERE id = $1 LIMIT 1")
            .bind(Uuid::from(id))
            .fetch_optional(&mut *connection)
            .await?;
    Ok(CurrentState {
        status: super::outcome::status(connection, id).await?,
        replayed_as: replayed_as.flatten().map(RequestId::from),
    })
}

/// Pairs of old and new ids of requests that are encrypted.
pub(super) type Sealed = Vec<(RequestId, RequestId)>;

/// The old id, the new id, and what the replay did.
pub(crate) type Replayed = (RequestId, RequestId, ChangeResult);

pub(super) async fn replay(
    connection: &mut PgConnection,
    pairs: &[(RequestId, RequestId)],
    retention: Duration,
) -> Result<(Vec<Replayed>, Sealed), sqlx::Error> {
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
    let (mut replayed, mut sealed) = (Vec::with_capacity(rows.len()), Vec::new());
    for (old, new, verdict) in rows {
        let (old, new) = (RequestId::from(old), RequestId::from(new));
        if verdict.as_deref() == Some(SEALED) {
            sealed.push((old, new));
            continue;
        }
        let result = change_result(&mut *connection, verdict.as_deref(), old).await?;
        replayed.push((old, new, result));
    }
    Ok((replayed, sealed))
}

/// The verdict about an encrypted request, whose content has to be encrypted for the new id.
const SEALED: &str = "sealed";

pub(super) async fn replay_sealed(
    connection: &mut PgConnection,
    old: RequestId,
    new: RequestId,
    retention: Duration,
    sealer: &Sealer,
) -> Result<ChangeResult, sqlx::Error> {
    let stored: Option<(String, Option<Vec<u8>>)> =
        sqlx::query_as("SELECT head, body FROM mq_payloads WHERE id = $1")
            .bind(Uuid::from(old))
            .fetch_optional(&mut *connection)
            .await?;
    let Some((head, body)) = stored else {
        return Ok(ChangeResult::Gone);
    };
    let (head, body) = match sealer.reseal_request(old, new, &head, body) {
        Ok(resealed) => resealed,
        Err(reason) => return Ok(ChangeResult::Unreadable(reason)),
    };
    let verdict: Option<String> =
        sqlx::query_scalar("SELECT replay_request($1, $2, $3 * interval '1 millisecond', $4, $5)")
            .bind(Uuid::from(old))
            .bind(Uuid::from(new))
            .bind(millis(retention))
            .bind(head)
            .bind(body.as_deref())
            .fetch_one(&mut *connection)
            .await?;
    change_result(connection, verdict.as_deref(), old).await
}

pub(super) async fn resolve(
    connection: &mut PgConnection,
    id: RequestId,
    resolution: Resolution,
    finished_at: Option<i64>,
    retention: Duration,
) -> Result<ChangeResult, sqlx::Error> {
    let verdict: Option<String> = sqlx::query_scalar(
        "SELECT resolve_request(
            $1, $2, 'epoch'::timestamptz + $3::bigint * interval '1 microsecond',
            $4 * interval '1 millisecond'
        )",
    )
    .bind(Uuid::from(id))
    .bind(resolution == Resolution::Sent)
    .bind(finished_at)
    .bind(millis(retention))
    .fetch_one(&mut *connection)
    .await?;
    change_result(connection, verdict.as_deref(), id).await
}

pub(super) async fn purge(
    connection: &mut PgConnection,
    ids: &[RequestId],
) -> Result<u64, sqlx::Error> {
    let purged: i64 = sqlx::query_scalar("SELECT purge_requests($1)")
        .bind(ids.iter().copied().map(Uuid::from).collect::<Vec<_>>())
        .fetch_one(connection)
        .await?;
    Ok(purged.unsigned_abs())
}

async fn halted(connection: &mut PgConnection) -> Result<Vec<HaltedKey>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT m.channel_name, substr(m.channel_args, 8) AS key, m.id,
            epoch_us(coalesce(o.finished_at, clock_timestamp())) AS since
         FROM mq_msgs m LEFT JOIN outcomes o ON o.id = ANY (ARRAY[m.id]) AND o.slot = -1
         WHERE m.state = 'halted'
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

pub(super) async fn resume(
    connection: &mut PgConnection,
    channel: &str,
    group: &str,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT resume_halted($1, $2)")
        .bind(channel)
        .bind(group)
        .fetch_one(connection)
        .await
}

/// An ambiguous request to ask its receiver about.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) dead_letter: DeadLetter,
    /// How often the receiver was asked, this time included. Fences the answer.
    pub(crate) times: i32,
    /// When the request finished, in microseconds since 1970.
    pub(crate) finished_at: i64,
    pub(crate) head: Option<String>,
    pub(crate) body: Option<Vec<u8>>,
}

async fn take_ambiguous(
    connection: &mut PgConnection,
    channels: Option<&[String]>,
    lease: Duration,
    limit: i64,
    sealer: &Sealer,
) -> Result<Vec<Question>, sqlx::Error> {
    let rows = sqlx::query(&format!(
        "WITH due AS MATERIALIZED (
            SELECT k.id FROM outcomes_kept k
            WHERE k.status = 'ambiguous' AND k.format BETWEEN 1 AND $4
                AND ($1::text[] IS NULL OR k.channel_name = ANY ($1))
                AND (k.reconcile_at IS NULL OR k.reconcile_at <= clock_timestamp())
            ORDER BY k.reconcile_at NULLS FIRST LIMIT $3
            FOR UPDATE SKIP LOCKED
        ), o AS (
            UPDATE outcomes_kept k
            SET reconcile_at = clock_timestamp() + $2 * interval '1 millisecond',
                reconciles = least(k.reconciles, 2147483646) + 1
            FROM due WHERE k.id = ANY (ARRAY[due.id])
            RETURNING k.*
        )
        SELECT {}, o.reconciles, p.head, p.body
        FROM o LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[o.id])",
        columns()
    ))
    .bind(channels)
    .bind(millis(lease))
    .bind(limit)
    .bind(OUTCOME_FORMAT)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Question {
                dead_letter: dead_letter(row, sealer)?,
                times: row.try_get("reconciles")?,
                finished_at: row.try_get("finished_at")?,
                head: row.try_get("head")?,
                body: row.try_get("body")?,
            })
        })
        .collect()
}

async fn ask_again(
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

/// The sentence for a request that was given up because of its last response.
pub(super) fn answered(status: u16) -> Option<String> {
    let status = StatusCode::from_u16(status).ok()?;
    Some(format!("answered with {status}"))
}

fn dead_letter(row: &PgRow, sealer: &Sealer) -> Result<DeadLetter, sqlx::Error> {
    let status: String = row.try_get("status")?;
    let attempts: i32 = row.try_get("attempts")?;
    let http_status: Option<i16> = row.try_get("http_status")?;
    let http_status = http_status.map(i16::unsigned_abs);
    let id = RequestId::from(row.try_get::<Uuid, _>("id")?);
    let error: Option<String> = row.try_get("error")?;
    let error_class: Option<String> = row.try_get("error_class")?;
    let class = error_class.as_deref().unwrap_or_default();
    let error = error.map(|text| sealer.shown_error_text(id, class, text));
    Ok(DeadLetter {
        id,
        channel: row.try_get("channel_name")?,
        destination: row.try_get("destination")?,
        method: row.try_get("method")?,
        ordering_key: row.try_get("ordering_key")?,
        status: Status::from_name(&status).unwrap_or(Status::Discarded),
        attempts: attempts.unsigned_abs(),
        created_at: at(row.try_get("created_at")?),
        finished_at: at(row.try_get("finished_at")?),
        http_status,
        error_class,
        error: error.or_else(|| answered(http_status?)),
        metadata: row
            .try_get::<Option<String>, _>("metadata")?
            .and_then(|json| Metadata::stored(json).value().cloned()),
    })
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A time of the database's.
pub(super) fn at(micros: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(micros.unsigned_abs())
}
