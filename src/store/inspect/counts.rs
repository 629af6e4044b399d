//! How many requests there are of each status and state.

use sqlx::{Connection, PgConnection};

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

/// The states whose rows an index finds without reading others.
const INDEXED: [&[RequestState]; 6] = [
    &[RequestState::Waiting],
    &[
        RequestState::Claimed,
        RequestState::Held,
        RequestState::SendingOnce,
    ],
    &[RequestState::Behind],
    &[RequestState::Deferred],
    &[RequestState::Parked],
    &[RequestState::Halted],
];

/// The condition of such an index.
fn condition(states: &[RequestState]) -> String {
    match states {
        [RequestState::Waiting] => "m.state = 'waiting'".to_owned(),
        [state] => {
            format!("m.state IN ('behind', 'deferred', 'parked', 'halted') AND m.state = '{state}'")
        }
        _ => "m.state IN ('claimed', 'held', 'sending_once')".to_owned(),
    }
}

async fn counts(connection: &mut PgConnection) -> Result<Counts, sqlx::Error> {
    let mut by_status: Vec<_> = Status::ALL
        .map(|status| (status, Count::new(0, true)))
        .into();
    let mut add = |status: Status, count: Count| {
        for (known, sum) in &mut by_status {
            if *known == status {
                *sum = sum.and(count);
            }
        }
    };
    let mut by_state = Vec::new();
    // The conditions of states of which all rows, or not all, are looked at.
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for states in INDEXED {
        let condition = condition(states);
        let rows = format!("SELECT m.state FROM mq_msgs m WHERE {condition}");
        let found = grouped(connection, "m.state::text", &rows, "m").await?;
        let looked_at: u64 = found.iter().map(|(_, number)| number).sum();
        let is_exact = looked_at <= WINDOW as u64;
        for state in states {
            let number = found.iter().find(|(name, _)| name == state.as_str());
            let number = number.map_or(0, |(_, number)| *number);
            by_state.push((*state, Count::new(number, is_exact)));
        }
        // A halted request is counted among the outcomes.
        if looked_at > 0 && states != [RequestState::Halted] {
            if is_exact { &mut few } else { &mut many }.push(states);
        }
    }
    for states in few {
        let rows = format!("WHERE {}", condition(states));
        for (status, number) in statuses(connection, &rows).await? {
            add(status, Count::new(number, true));
        }
    }
    let many = many.concat();
    if !many.is_empty() {
        // In the order of the ids, in which neighbours are stored side by side.
        let names: Vec<_> = many.iter().map(|state| format!("'{state}'")).collect();
        let rows = format!("WHERE m.state IN ({}) ORDER BY m.id DESC", names.join(", "));
        let found = statuses(connection, &rows).await?;
        for status in Status::ALL {
            let number = found.iter().find(|(name, _)| *name == status);
            if many.iter().any(|state| may_be(*state, status)) {
                add(
                    status,
                    Count::new(number.map_or(0, |(_, number)| *number), false),
                );
            }
        }
    }
    for status in [Status::Discarded, Status::Ambiguous] {
        let rows = format!("FROM outcomes_kept k WHERE k.status = '{status}'");
        add(status, limited(connection, &rows).await?);
    }
    // The condition on the id, which all fulfil, has each partition read by its index.
    let found = grouped(
        connection,
        "o.status",
        "SELECT o.status FROM outcomes o
         WHERE o.slot <> -1 AND o.id > '00000000-0000-0000-0000-000000000000'",
        "o",
    )
    .await?;
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

/// Counts rows as far as [`WINDOW`].
async fn limited(connection: &mut PgConnection, rows: &str) -> Result<Count, sqlx::Error> {
    let limit = WINDOW + 1;
    let number: i64 = sqlx::query_scalar(&format!(
        "SELECT count(*) FROM (SELECT {rows} LIMIT {limit}) k"
    ))
    .persistent(false)
    .fetch_one(connection)
    .await?;
    Ok(Count::new(number.unsigned_abs(), true))
}

/// How many of the rows in the queue have each status.
async fn statuses(
    connection: &mut PgConnection,
    rows: &str,
) -> Result<Vec<(Status, u64)>, sqlx::Error> {
    let rows = format!("SELECT m.state, m.attempt_at, m.attempts FROM mq_msgs m {rows}");
    let found = grouped(connection, QUEUED_STATUS, &rows, "m").await?;
    let known = |(name, number): (String, u64)| Some((Status::from_name(&name)?, number));
    Ok(found.into_iter().filter_map(known).collect())
}

/// Counts rows by a text, as far as [`WINDOW`].
async fn grouped(
    connection: &mut PgConnection,
    by: &str,
    rows: &str,
    alias: &str,
) -> Result<Vec<(String, u64)>, sqlx::Error> {
    let limit = WINDOW + 1;
    let counted: Vec<(String, i64)> = sqlx::query_as(&format!(
        "SELECT {by}, count(*) FROM ({rows} LIMIT {limit}) {alias} GROUP BY 1"
    ))
    .persistent(false)
    .fetch_all(connection)
    .await?;
    let counted = counted.into_iter();
    Ok(counted
        .map(|(name, number)| (name, number.unsigned_abs()))
        .collect())
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
