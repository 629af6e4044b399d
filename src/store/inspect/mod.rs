//! Reading requests for an operator.
//!
//! Each statement reads a bounded number of rows, however many requests there are.

mod content;
mod counts;
mod list;
mod source;
mod summary;

use std::time::{Duration, SystemTime};

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::Store;
use super::columns::{METHOD, named_by_group, ordering_key};
use super::dead_letters::{answered, at};
use super::outcome::status;
use crate::codec::Unreadable;
use crate::error::Error;
use crate::id::RequestId;
use crate::inspection::{FailedAttempt, Owner, PausedChannel, RequestInfo, RequestState};
use crate::sealer::Sealer;
use crate::status::Status;

/// A request, and what says why it is not being sent.
#[derive(Debug)]
pub(crate) struct Inspected {
    pub(crate) info: RequestInfo,
    /// `None` once it has ended.
    pub(crate) place: Option<Place>,
}

/// Where an unfinished request stands in the queue. Times are by the database's clock.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) now: SystemTime,
    /// When it is due; if a process has it, when that must have renewed its lease.
    pub(crate) due_at: SystemTime,
    pub(crate) state: State,
    /// The first request of its ordering key, if that is another one.
    pub(crate) first: Option<RequestId>,
    /// The first request has ended and halts the key.
    pub(crate) is_halted: bool,
    /// Its channel is paused.
    pub(crate) paused: Option<PausedChannel>,
    /// A runner that is alive claims its channel and its format.
    pub(crate) is_delivered: bool,
    /// Since when it is parked, and why.
    pub(crate) parked: Option<(SystemTime, String)>,
}

/// What a row's state says of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// An attempt is under way, or its process died.
    Sending,
    Deferred,
    Parked,
    /// For a claim, or for the process that made the last attempt and makes the next one.
    Waiting,
}

impl Store {
    /// One request with its failed attempts. Without a destination's state, which is in another
    /// table: `hold` is `None`.
    pub(crate) async fn inspect(&self, id: RequestId) -> Result<Option<Inspected>, Error> {
        let found = self
            .run_verified("inspect.request", async |connection| {
                inspect(connection, id, self.sealer()).await
            })
            .await?;
        found
            .transpose()
            .map_err(|unreadable| Error::from(unreadable).with_id(id))
    }
}

type Found<T> = Option<Result<T, Unreadable>>;

async fn inspect(
    connection: &mut PgConnection,
    id: RequestId,
    sealer: &Sealer,
) -> Result<Found<Inspected>, sqlx::Error> {
    // In an order in which a request that ends meanwhile is read as ended, and never as unknown.
    let attempts = failed_attempts(connection, id, sealer).await?;
    let row = sqlx::query(&statement())
        .bind(Uuid::from(id))
        .fetch_optional(&mut *connection)
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let status = match status(connection, id).await? {
        Some(Ok(status)) => status,
        Some(Err(unreadable)) => return Ok(Some(Err(unreadable))),
        None => return Ok(None),
    };
    let time = |name: &str| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(name)?.map(at));
    let http_status: Option<i16> = row.try_get("http_status")?;
    let http_status = http_status.map(i16::unsigned_abs);
    let class: Option<String> = row.try_get("error_class")?;
    let error: Option<String> = row.try_get("error")?;
    let shown = |text| sealer.shown_error_text(id, class.as_deref().unwrap_or_default(), text);
    let error = error.map(shown);
    let begun: i32 = row.try_get("attempts")?;
    let answered = || answered(http_status.filter(|_| status != Status::Completed)?);
    let place = if row.try_get("is_queued")? && !status.is_terminal() {
        Some(place(&row)?)
    } else {
        None
    };
    let replayed_as: Option<Uuid> = row.try_get("replayed_as")?;
    let state: Option<String> = row.try_get("state")?;
    let is_leased =
        place.is_some() && matches!(state.as_deref(), Some("claimed" | "held" | "sending_once"));
    let waits = place.as_ref().filter(|place| place.state != State::Sending);
    Ok(Some(Ok(Inspected {
        info: RequestInfo {
            id,
            channel: row.try_get("channel_name")?,
            status,
            state: state.as_deref().and_then(RequestState::from_name),
            method: row.try_get("method")?,
            destination: row.try_get("destination")?,
            ordering_key: row.try_get("ordering_key")?,
            attempts: begun.unsigned_abs(),
            created_at: at(row.try_get("created_at")?),
            due_at: waits.map(|place| place.due_at),
            deadline: time("deadline")?,
            finished_at: time("finished_at")?,
            http_status,
            error_class: class,
            error: error.or_else(answered),
            replayed_as: replayed_as.map(RequestId::from),
            failed_attempts: attempts,
            owner: if is_leased { owner(&row)? } else { None },
            leased_until: if is_leased {
                time("leased_until")?
            } else {
                None
            },
            has_metadata: row.try_get("has_metadata")?,
            hold: None,
        },
        place,
    })))
}

/// A halted request is in the queue and among the outcomes. `first` is the first request of the
/// ordering key, by the index that has that order.
fn statement() -> String {
    let (ordering_key, named) = (ordering_key("g.name"), named_by_group("g.name"));
    format!(
        "
    SELECT
        m.id IS NOT NULL AS is_queued,
        coalesce(o.channel_name, m.channel_name) AS channel_name,
        coalesce(o.attempts, m.attempts) AS attempts,
        epoch_us(coalesce(o.created_at, m.created_at)) AS created_at,
        epoch_us(o.finished_at) AS finished_at,
        o.http_status, o.error_class, o.error, o.replayed_as,
        epoch_us(m.deadline) AS deadline,
        {ordering_key} AS ordering_key,
        coalesce(
            o.destination, m.destination,
            -- The older API's group of an ended request is not where it went.
            CASE WHEN o.id IS NULL OR strpos({named}, '://') > 0 THEN {named} END
        ) AS destination,
        {METHOD} AS method,
        m.state::text AS state,
        -- A held row's due time includes a lease.
        epoch_us(
            m.attempt_at - CASE WHEN m.state = 'held'
                THEN current_setting('requeuest.lease')::interval ELSE interval '0' END
        ) AS due_at,
        epoch_us(clock_timestamp()) AS now,
        epoch_us(m.attempt_at) AS leased_until,
        m.owner, r.host AS owner_host, r.pid AS owner_pid, r.version AS owner_version,
        o.metadata IS NOT NULL OR p.metadata IS NOT NULL AS has_metadata,
        first.id AS first,
        first.state = 'halted' AS is_halted,
        m.id IS NOT NULL AND is_delivered(m.channel_name, m.format) AS is_delivered,
        epoch_us(c.since) AS paused_since, c.actor AS paused_by, c.reason AS paused_because,
        epoch_us(p.parked_since) AS parked_since,
        p.parked_reason
    FROM (SELECT $1::uuid AS id) i
    LEFT JOIN mq_msgs m ON m.id = ANY (ARRAY[i.id])
    LEFT JOIN outcomes o ON o.id = ANY (ARRAY[i.id])
    LEFT JOIN mq_payloads p ON p.id = ANY (ARRAY[i.id])
    LEFT JOIN paused_channels c ON c.channel_name = m.channel_name AND c.resumed_at IS NULL
    CROSS JOIN LATERAL (SELECT coalesce(o.channel_args, m.channel_args) AS name) g
    LEFT JOIN LATERAL (
        SELECT ahead.id, ahead.state FROM mq_msgs ahead
        WHERE m.seq IS NOT NULL
            AND ahead.channel_name = m.channel_name AND ahead.channel_args = m.channel_args
            AND ahead.seq IS NOT NULL
        ORDER BY ahead.seq LIMIT 1
    ) first ON first.id <> m.id
    LEFT JOIN runners r ON r.id = m.owner
    WHERE m.id IS NOT NULL OR o.id IS NOT NULL"
    )
}

fn owner(row: &PgRow) -> Result<Option<Owner>, sqlx::Error> {
    let Some(id) = row.try_get("owner")? else {
        return Ok(None);
    };
    let pid: Option<i64> = row.try_get("owner_pid")?;
    Ok(Some(Owner {
        id,
        host: row.try_get("owner_host")?,
        pid: pid.and_then(|pid| u32::try_from(pid).ok()),
        version: row.try_get("owner_version")?,
    }))
}

fn place(row: &PgRow) -> Result<Place, sqlx::Error> {
    let first: Option<Uuid> = row.try_get("first")?;
    let is_halted: Option<bool> = row.try_get("is_halted")?;
    let paused_since: Option<i64> = row.try_get("paused_since")?;
    let paused = match paused_since {
        Some(since) => Some(PausedChannel {
            channel: row.try_get("channel_name")?,
            since: at(since),
            by: row.try_get("paused_by")?,
            reason: row.try_get("paused_because")?,
        }),
        None => None,
    };
    let since: Option<i64> = row.try_get("parked_since")?;
    let reason: Option<String> = row.try_get("parked_reason")?;
    Ok(Place {
        now: at(row.try_get("now")?),
        due_at: at(row.try_get("due_at")?),
        state: match row.try_get("state")? {
            "claimed" | "sending_once" => State::Sending,
            "deferred" => State::Deferred,
            "parked" => State::Parked,
            _ => State::Waiting,
        },
        first: first.map(RequestId::from),
        is_halted: is_halted.unwrap_or_default(),
        paused,
        is_delivered: row.try_get("is_delivered")?,
        parked: since.map(|since| (at(since), reason.unwrap_or_default())),
    })
}

async fn failed_attempts(
    connection: &mut PgConnection,
    id: RequestId,
    sealer: &Sealer,
) -> Result<Vec<FailedAttempt>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT a.number, epoch_us(a.ended_at) AS ended_at, a.duration_ms, a.http_status,
            a.error_class, a.error
         FROM attempts a WHERE a.id = $1 ORDER BY a.number",
    )
    .bind(Uuid::from(id))
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let number: i32 = row.try_get("number")?;
            let millis: i32 = row.try_get("duration_ms")?;
            let http_status: Option<i16> = row.try_get("http_status")?;
            let class: String = row.try_get("error_class")?;
            let error = sealer.shown_error_text(id, &class, row.try_get("error")?);
            Ok(FailedAttempt {
                number: number.unsigned_abs(),
                ended_at: at(row.try_get("ended_at")?),
                duration: Duration::from_millis(u64::from(millis.unsigned_abs())),
                http_status: http_status.map(i16::unsigned_abs),
                error_class: class,
                error,
            })
        })
        .collect()
}
