//! How many requests there are of each status and state.

use sqlx::{Connection, PgConnection, Row};

use super::list::SNAPSHOT;
use super::source::WINDOW;
use crate::error::Error;
use crate::inspection::{Count, Counts, RequestState};
use crate::status::Status;
use crate::store::Store;
use crate::store::columns::QUEUED_STATUS;

impl Store {
    /// Counts requests, each kind as far as a bounded number of rows tells.
    pub(crate) async fn counts(&self) -> Result<Counts, Error> {
        self.run_verified("inspect.counts", async |connection| {
            let mut snapshot = connection.begin_with(SNAPSHOT).await?;
            let counts = counts(&mut snapshot).await?;
            snapshot.commit().await?;
            Ok(counts)
        })
        .await
    }
}

const STATUSES: [Status; 10] = [
    Status::Scheduled,
    Status::Available,
    Status::Deferred,
    Status::Running,
    Status::Retryable,
    Status::Parked,
    Status::Completed,
    Status::Discarded,
    Status::Cancelled,
    Status::Ambiguous,
];

/// The conditions of the indexes by state.
fn index_of(state: RequestState) -> &'static str {
    match state {
        RequestState::Waiting => "m.state = 'waiting'",
        RequestState::Claimed | RequestState::Held | RequestState::SendingOnce => {
            "m.state IN ('claimed', 'held', 'sending_once')"
        }
        _ => "m.state IN ('behind', 'deferred', 'parked', 'halted')",
    }
}

async fn counts(connection: &mut PgConnection) -> Result<Counts, sqlx::Error> {
    let mut by_state = Vec::new();
    let mut by_status: Vec<_> = STATUSES.map(|status| (status, Count::new(0, true))).into();
    let mut add = |status: Status, count: Count| {
        for (known, sum) in &mut by_status {
            if *known == status {
                *sum = sum.and(count);
            }
        }
    };
    for state in RequestState::ALL {
        let rows = sqlx::query(&format!(
            "SELECT {QUEUED_STATUS} AS status, count(*) FROM (
                SELECT m.state, m.attempt_at, m.attempts FROM mq_msgs m
                WHERE {} AND m.state = '{state}' LIMIT {}
             ) m GROUP BY 1",
            index_of(state),
            WINDOW + 1
        ))
        .persistent(false)
        .fetch_all(&mut *connection)
        .await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in rows {
            let number: i64 = row.try_get(1)?;
            found.push((row.try_get::<String, _>(0)?, number.unsigned_abs()));
        }
        let looked_at: u64 = found.iter().map(|(_, number)| number).sum();
        let is_exact = looked_at <= WINDOW as u64;
        by_state.push((state, Count::new(looked_at, is_exact)));
        // The outcomes have it too.
        if state == RequestState::Halted {
            continue;
        }
        for status in STATUSES.into_iter().filter(|status| !status.is_terminal()) {
            let number = found.iter().find(|(name, _)| name == status.as_str());
            let number = number.map_or(0, |(_, number)| *number);
            if number > 0 || !is_exact && may_be(state, status) {
                add(status, Count::new(number, is_exact));
            }
        }
    }
    for status in [Status::Discarded, Status::Ambiguous] {
        let number: i64 = sqlx::query_scalar(&format!(
            "SELECT count(*) FROM (
                SELECT FROM outcomes_kept k WHERE k.status = '{status}' LIMIT {}
             ) k",
            WINDOW + 1
        ))
        .persistent(false)
        .fetch_one(&mut *connection)
        .await?;
        add(status, Count::new(number.unsigned_abs(), true));
    }
    let rows = sqlx::query(&format!(
        "SELECT o.status, count(*) FROM (
            SELECT o.status FROM outcomes o WHERE o.slot <> -1 ORDER BY o.id DESC LIMIT {}
         ) o GROUP BY 1",
        WINDOW + 1
    ))
    .persistent(false)
    .fetch_all(&mut *connection)
    .await?;
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let number: i64 = row.try_get(1)?;
        found.push((row.try_get::<String, _>(0)?, number.unsigned_abs()));
    }
    let looked_at: u64 = found.iter().map(|(_, number)| number).sum();
    for status in [Status::Completed, Status::Cancelled] {
        let number = found.iter().find(|(name, _)| name == status.as_str());
        let number = number.map_or(0, |(_, number)| *number);
        add(status, Count::new(number, looked_at <= WINDOW as u64));
    }
    Ok(Counts {
        by_status,
        by_state,
    })
}

/// Whether a request in this state can have this status.
fn may_be(state: RequestState, status: Status) -> bool {
    let due = matches!(
        status,
        Status::Scheduled | Status::Available | Status::Retryable
    );
    match state {
        RequestState::Waiting | RequestState::Behind => due,
        RequestState::Claimed | RequestState::SendingOnce | RequestState::Held => {
            due || status == Status::Running
        }
        RequestState::Deferred => due || status == Status::Deferred,
        RequestState::Parked => status == Status::Parked,
        RequestState::Halted => false,
    }
}
