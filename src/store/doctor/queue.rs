//! What waits, and for what: due requests, channels, destinations, handlers, expired outcomes.
//!
//! Each statement looks at the beginning of an index, and at a bounded number of rows.

use sqlx::PgConnection;

use super::{listed, spoken};
use crate::destination::{DestinationState, DestinationStatus};
use crate::finding::{Check, Finding};
use crate::health::HANDLER_GONE_AFTER;
use crate::store::db::FORMATS;
use crate::store::destinations::closed_destinations;
use crate::store::millis;

/// How many channels are looked at.
const CHANNELS: i32 = 200;
/// How many rows are counted.
const COUNTED: i64 = 1000;
/// How many closed destinations are looked at.
const DESTINATIONS: i64 = 200;
/// A due request waits for a moment in a healthy system, and for this long in one with too little
/// capacity.
const LAGGING: f64 = 60.0;
const LAGGING_FAR: f64 = 900.0;
/// The ring is emptied by the slot, so some outcomes stay for up to a quarter of their retention.
const PRUNED_WITHIN: f64 = 120.0;

/// A channel with due requests.
#[derive(Debug, sqlx::FromRow)]
struct DueChannel {
    channel: String,
    /// For how many seconds its first request has been due.
    due: f64,
    is_delivered: bool,
}

/// Channels with due requests of the formats that this release knows, without paused ones. A
/// channel is found by its first entry of an index, and its oldest request by another one.
async fn due_channels(connection: &mut PgConnection) -> Result<Vec<DueChannel>, sqlx::Error> {
    sqlx::query_as(
        "WITH RECURSIVE queued(number, channel) AS (
            SELECT 0, '' COLLATE \"C\"
            UNION ALL
            SELECT q.number + 1, least(
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state = 'waiting' AND m.channel_name > q.channel
                    ORDER BY m.channel_name LIMIT 1
                ),
                (
                    SELECT m.channel_name FROM mq_msgs m
                    WHERE m.state IN ('claimed', 'held', 'sending_once')
                        AND m.channel_name > q.channel
                    ORDER BY m.channel_name LIMIT 1
                )
            )
            FROM queued q WHERE q.number < $1 AND q.channel IS NOT NULL
        ), found AS (
            SELECT q.channel, known.format, least(
                (
                    SELECT min(first.attempt_at)
                    FROM unnest('{high,normal,low}'::mq_priority[]) AS kind(priority), LATERAL (
                        SELECT m.attempt_at FROM mq_msgs m
                        WHERE m.channel_name = q.channel AND m.format = known.format
                            AND m.priority = kind.priority AND m.state = 'waiting'
                        ORDER BY m.attempt_at LIMIT 1
                    ) first
                ),
                (
                    SELECT m.attempt_at FROM mq_msgs m
                    WHERE m.channel_name = q.channel AND m.format = known.format
                        AND m.state IN ('claimed', 'held', 'sending_once')
                    ORDER BY m.attempt_at LIMIT 1
                )
            ) AS due_at
            FROM queued q, unnest($2::text::smallint[]) AS known(format)
            WHERE q.number > 0 AND q.channel IS NOT NULL
        )
        SELECT
            f.channel, extract(epoch FROM clock_timestamp() - f.due_at)::float8 AS due,
            EXISTS (
                SELECT FROM runners r
                WHERE r.expires_at > clock_timestamp() AND f.format = ANY (r.formats)
                    AND (r.channels IS NULL OR f.channel = ANY (r.channels))
            ) AS is_delivered
        FROM found f
        WHERE f.due_at <= clock_timestamp() AND NOT EXISTS (
            SELECT FROM paused_channels p
            WHERE p.channel_name = f.channel AND p.resumed_at IS NULL
        )
        ORDER BY due DESC",
    )
    .bind(CHANNELS)
    .bind(FORMATS)
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// How long due requests have waited in channels that have a runner.
pub(super) async fn lag(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    Ok(vec![lag_finding(&due_channels(connection).await?)])
}

fn lag_finding(channels: &[DueChannel]) -> Finding {
    let check = Check::Lag;
    let Some(first) = channels.iter().find(|channel| channel.is_delivered) else {
        return check.ok("no request that a runner could send is due");
    };
    let summary = format!(
        "the oldest due request of the channel `{}` has waited for {}",
        first.channel,
        spoken(first.due)
    );
    let finding = if first.due < LAGGING {
        return check.ok(summary);
    } else if first.due < LAGGING_FAR {
        check.warning(summary)
    } else {
        check.problem(summary)
    };
    finding.advise(
        "add runners or raise their concurrency; look for destinations that answer slowly, and \
         for dead rows",
    )
}

/// Whether runners deliver the channels that have due requests.
pub(super) async fn runners(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Runners;
    let due = due_channels(&mut *connection).await?;
    let abandoned: Vec<String> = due
        .iter()
        .filter(|channel| !channel.is_delivered)
        .map(|channel| {
            let (name, time) = (&channel.channel, spoken(channel.due));
            format!("`{name}` (due for {time})")
        })
        .collect();
    if !abandoned.is_empty() {
        let summary = format!("no runner delivers due requests of {}", listed(&abandoned));
        return Ok(vec![check.problem(summary).advise(
            "start a process whose handle delivers the channel, or `requeuest work`",
        )]);
    }
    let alive: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (
            SELECT FROM runners r WHERE r.expires_at > clock_timestamp() LIMIT $1
         ) a",
    )
    .bind(COUNTED)
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(vec![match alive {
        0 => check.note("no runner is alive, and no request is due"),
        1 => check.ok("1 runner is alive, and it delivers all that is due"),
        alive => check.ok(format!(
            "{alive} runners are alive, and they deliver all that is due"
        )),
    }])
}

/// Requests that a process could not read.
pub(super) async fn parked(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Parked;
    let parked: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (
            SELECT FROM mq_payloads p WHERE p.parked_since IS NOT NULL LIMIT $1
         ) x",
    )
    .bind(COUNTED)
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(vec![if parked == 0 {
        check.ok("no request is parked")
    } else {
        let summary = format!("{} parked: no process could read them", requests(parked));
        check.warning(summary).advise(
            "Durable::parked lists them with the reasons; a process of the version or with the \
             keys that wrote them reads them",
        )
    }])
}

fn requests(number: i64) -> String {
    match number {
        1 => "1 request is".to_owned(),
        COUNTED.. => format!("{COUNTED} or more requests are"),
        number => format!("{number} requests are"),
    }
}

/// Destinations that take no requests.
pub(super) async fn destinations(
    connection: &mut PgConnection,
) -> Result<Vec<Finding>, sqlx::Error> {
    let closed = closed_destinations(connection, DESTINATIONS).await?;
    let closed: Vec<DestinationStatus> = closed
        .iter()
        .map(|found| {
            found
                .state
                .status(&found.name, found.policy.as_ref(), found.now)
        })
        .collect();
    Ok(destination_findings(&closed))
}

fn destination_findings(closed: &[DestinationStatus]) -> Vec<Finding> {
    let check = Check::Destinations;
    let named = |state| {
        let of_state = closed.iter().filter(|status| status.state == state);
        let names: Vec<String> = of_state.map(|status| status.name.clone()).collect();
        (!names.is_empty()).then(|| listed(&names))
    };
    let mut findings = Vec::new();
    if let Some(names) = named(DestinationState::Disabled) {
        findings.push(
            check
                .warning(format!("disabled destinations: {names}"))
                .advise("their requests wait until DestinationHandle::enable is called"),
        );
    }
    if let Some(names) = named(DestinationState::CircuitOpen) {
        findings.push(check.warning(format!("destinations that fail: {names}")).advise(
            "their circuit breakers are open; find out why attempts fail, and requests are sent \
             again by themselves once the receiver works",
        ));
    }
    if let Some(names) = named(DestinationState::Paused) {
        findings.push(check.note(format!("paused destinations: {names}")).advise(
            "their requests wait until the pause ends or DestinationHandle::resume is called",
        ));
    }
    if let Some(names) = named(DestinationState::Throttled) {
        findings.push(check.note(format!("destinations that asked to wait: {names}")));
    }
    if findings.is_empty() {
        findings.push(check.ok("all destinations take requests"));
    }
    findings
}

/// Outcomes that wait for a handler that no process has, or that a handler has refused for good.
pub(super) async fn handlers(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let check = Check::Handlers;
    let without: Vec<String> = sqlx::query_scalar(
        "SELECT h.channel_name
         FROM handled_channels h LEFT JOIN handler_heartbeats b USING (channel_name)
         WHERE coalesce(b.seen_at < now() - $1 * interval '1 millisecond', true)
            AND EXISTS (
                SELECT FROM unhandled u
                WHERE u.channel_name = h.channel_name AND u.due_at < 'infinity' OFFSET 0
            )
         ORDER BY 1 LIMIT $2",
    )
    .bind(millis(HANDLER_GONE_AFTER))
    .bind(COUNTED)
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let given_up: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (
            SELECT u.parked_since FROM unhandled u
            WHERE u.failures > 0 OR u.parked_since IS NOT NULL LIMIT $1
         ) f WHERE f.parked_since IS NOT NULL",
    )
    .bind(COUNTED)
    .persistent(false)
    .fetch_one(connection)
    .await?;
    let mut findings = Vec::new();
    if !without.is_empty() {
        let summary = format!(
            "outcomes wait for a handler, and no process has one: {}",
            listed(&without)
        );
        findings.push(check.problem(summary).advise(
            "start a process that calls Durable::on_outcome for the channel, or end the \
             subscription with Durable::unsubscribe_outcomes",
        ));
    }
    if given_up > 0 {
        let summary = format!("handlers failed for {given_up} outcomes until these were parked");
        findings.push(check.warning(summary).advise(
            "Durable::failed_hand_overs lists them with the errors; mend the handler, and call \
             Durable::retry_hand_overs",
        ));
    }
    if findings.is_empty() {
        findings.push(check.ok("no outcome waits for a handler that is gone"));
    }
    Ok(findings)
}

/// An outcome of a slot that should have gone, and the session that keeps it.
#[derive(Debug, sqlx::FromRow)]
struct Overdue {
    slot: i32,
    late: f64,
    /// Sessions that have locked the slot against changes.
    holders: Vec<String>,
}

/// The oldest expired outcomes of the ring.
pub(super) async fn prune_lag(connection: &mut PgConnection) -> Result<Vec<Finding>, sqlx::Error> {
    let slots: Vec<String> = (0..16)
        .map(|slot| {
            format!(
                "(SELECT {slot} AS slot, o.expires_at, o.finished_at FROM outcomes_{slot} o
                  WHERE o.expires_at <= now() ORDER BY o.expires_at LIMIT 1)"
            )
        })
        .collect();
    let statement = format!(
        "SELECT
            x.slot,
            extract(epoch FROM
                clock_timestamp() - x.expires_at - (x.expires_at - x.finished_at) / 4
            )::float8 AS late,
            ARRAY(
                SELECT DISTINCT coalesce('session ' || l.pid, 'a prepared transaction')
                FROM pg_locks l
                WHERE l.relation = to_regclass('outcomes_' || x.slot) AND l.granted
                    AND l.pid IS DISTINCT FROM pg_backend_pid()
                    AND l.database = (
                        SELECT d.oid FROM pg_database d WHERE d.datname = current_database()
                    )
            ) AS holders
         FROM ({}) x
         WHERE isfinite(x.expires_at) AND isfinite(x.finished_at)
         ORDER BY late DESC LIMIT 1",
        slots.join(" UNION ALL ")
    );
    let oldest: Option<Overdue> = sqlx::query_as(&statement)
        .persistent(false)
        .fetch_optional(connection)
        .await?;
    Ok(vec![prune_finding(oldest.as_ref())])
}

fn prune_finding(oldest: Option<&Overdue>) -> Finding {
    let check = Check::PruneLag;
    let Some(oldest) = oldest.filter(|oldest| oldest.late > PRUNED_WITHIN) else {
        return check.ok("expired outcomes are removed in time");
    };
    let late = spoken(oldest.late);
    let slot = oldest.slot;
    let summary = format!("outcomes of the partition outcomes_{slot} should have gone {late} ago");
    if oldest.holders.is_empty() {
        return check.warning(summary).advise(
            "processes with a runner remove them: Durable::sweep_parts says why one doesn't",
        );
    }
    let holders = listed(&oldest.holders);
    check
        .warning(format!("{summary}; it is used by {holders}"))
        .advise("end these transactions; while they are open, the partition can't be emptied")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finding::Severity;

    #[test]
    fn a_lag_is_that_of_the_oldest_request_with_a_runner() {
        let channel = |name: &str, due, is_delivered| DueChannel {
            channel: name.to_owned(),
            due,
            is_delivered,
        };
        let severity = |due| lag_finding(&[channel("c", due, true)]).severity;
        assert_eq!(severity(5.0), Severity::Ok);
        assert_eq!(severity(61.0), Severity::Warning);
        assert_eq!(severity(1000.0), Severity::Problem);
        let of_two = lag_finding(&[channel("a", 9000.0, false), channel("b", 90.0, true)]);
        assert_eq!(
            of_two.summary,
            "the oldest due request of the channel `b` has waited for 90 s"
        );
    }
}
