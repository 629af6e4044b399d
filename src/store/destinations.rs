//! What all processes know of destinations.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::changes::record;
use super::{Store, StoreError, millis};
use crate::change::{Entry, Signed};
use crate::destination::{DestinationPolicy, Millis, State, Until, millis as to_millis};
use crate::error::Error;
use crate::id::RequestId;

/// A destination as the database has it.
#[derive(Clone, Debug)]
pub(crate) struct StoredDestination {
    pub(crate) name: String,
    pub(crate) state: State,
    /// A policy that was set at run time.
    pub(crate) policy: Option<DestinationPolicy>,
    /// The database's time.
    pub(crate) now: Millis,
    /// Processes have leased permits or tokens of it.
    pub(crate) is_leased: bool,
    /// Whether this version understands what is stored.
    pub(crate) is_readable: bool,
}

impl StoredDestination {
    /// Whether it is limited, has a policy, or its state says anything.
    pub(crate) fn is_noted(&self) -> bool {
        self.is_leased || self.policy.is_some() || !self.state.is_idle(self.now)
    }
}

/// What a process asks of a destination's limits.
#[derive(Clone, Debug)]
pub(crate) struct LeaseRequest {
    pub(crate) name: Arc<str>,
    /// The attempts at the same time, of all processes.
    pub(crate) limit: Option<u32>,
    /// How many permits are in use.
    pub(crate) used: u32,
    /// How many permits the process could use.
    pub(crate) permits: u32,
    /// Tokens a second, and the most that the bucket holds.
    pub(crate) rate: Option<(f64, u32)>,
    /// How many tokens the process could use.
    pub(crate) tokens: u32,
}

/// What the process got.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grant {
    pub(crate) permits: u32,
    pub(crate) tokens: u32,
    /// After how long there will be a token, if there is none.
    pub(crate) wait: Duration,
}

/// How far back changes are looked for again. A change is stamped when it is made, and another
/// process sees it once it is committed.
const OVERLAP: Duration = Duration::from_secs(5);

impl Store {
    /// The names of destinations with deferred requests, in order: those after `after`.
    pub(crate) async fn deferred_destinations(
        &self,
        after: &str,
        limit: usize,
    ) -> Result<Vec<String>, StoreError> {
        self.run("destinations.deferred", async |connection| {
            sqlx::query_scalar("SELECT deferred_destinations($1, $2)")
                .bind(after)
                .bind(limit as i32)
                .fetch_one(connection)
                .await
        })
        .await
    }

    /// The destinations that have changed since a time of the database, or none for `None`. The
    /// first row has no name: it is there for the database's time.
    pub(crate) async fn changed_destinations(
        &self,
        since: Option<Millis>,
    ) -> Result<Vec<StoredDestination>, StoreError> {
        self.run("destinations.changed", async |connection| {
            let since = since.map(|since| since.saturating_sub(to_millis(OVERLAP)));
            let rows = sqlx::query(CHANGED)
                .bind(since)
                .fetch_all(connection)
                .await?;
            rows.iter().map(stored).collect()
        })
        .await
    }

    /// Up to `limit` of all destinations in the database, in order: those after `after`.
    pub(crate) async fn known_destinations(
        &self,
        after: &str,
        limit: usize,
    ) -> Result<Vec<StoredDestination>, StoreError> {
        self.run("destinations.known", async |connection| {
            let rows = sqlx::query(KNOWN)
                .bind(after)
                .bind(limit as i64)
                .fetch_all(connection)
                .await?;
            rows.iter().map(stored).collect()
        })
        .await
    }

    /// One destination.
    pub(crate) async fn destination(&self, name: &str) -> Result<StoredDestination, Error> {
        self.run_verified("destinations.one", async |connection| {
            let row = sqlx::query(ONE).bind(name).fetch_one(connection).await?;
            stored(&row)
        })
        .await
    }

    /// Changes destinations under their row locks. The names must be sorted, so that two such calls
    /// don't deadlock. `change` gets each destination and returns whether it has changed it.
    pub(crate) async fn change_destinations(
        &self,
        names: &[&str],
        mut change: impl FnMut(&mut StoredDestination) -> bool + Send,
    ) -> Result<Vec<StoredDestination>, StoreError> {
        self.run("destinations.change", async |connection| {
            change_all(connection, names, &mut change, None).await
        })
        .await
    }

    /// Changes a destination as [`change_destinations`](Self::change_destinations), on the record.
    pub(crate) async fn change_destination_recorded(
        &self,
        name: &str,
        mut change: impl FnMut(&mut StoredDestination) -> bool + Send,
        author: &Signed,
        entry: &Entry,
    ) -> Result<Vec<StoredDestination>, StoreError> {
        self.run("destinations.recorded", async |connection| {
            change_all(connection, &[name], &mut change, Some((author, entry))).await
        })
        .await
    }

    /// Leases permits and tokens.
    pub(crate) async fn lease_destinations(
        &self,
        instance: Uuid,
        requests: &[LeaseRequest],
    ) -> Result<HashMap<String, Grant>, StoreError> {
        let lease = self.config().lease;
        self.run("destinations.lease", async |connection| {
            lease_all(connection, instance, requests, lease).await
        })
        .await
    }

    /// Gives up those of these requests that wait for their destinations.
    pub(crate) async fn give_up_deferred(&self, ids: &[RequestId]) -> Result<(), StoreError> {
        let ids: Vec<Uuid> = ids.iter().copied().map(Uuid::from).collect();
        self.run("destinations.give_up", async |connection| {
            sqlx::query("SELECT give_up_deferred($1)")
                .bind(&ids)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Gives all permits of a process back.
    pub(crate) async fn release_destinations(&self, instance: Uuid) -> Result<(), StoreError> {
        self.run("destinations.release", async |connection| {
            sqlx::query("DELETE FROM destination_leases WHERE instance = $1")
                .bind(instance)
                .execute(connection)
                .await?;
            Ok(())
        })
        .await
    }

    /// Empties the states of destinations that haven't changed for long and whose states say
    /// nothing any more. Looks at a bounded number of rows, those after `after`. Returns where to
    /// continue, and whether most of them said nothing.
    pub(crate) async fn settle_destinations(
        &self,
        after: &str,
    ) -> Result<(Option<String>, bool), StoreError> {
        const LIMIT: usize = 1000;
        self.run("destinations.settle", async |connection| {
            let rows = sqlx::query(UNCHANGED)
                .bind(after)
                .bind(LIMIT as i64)
                .fetch_all(&mut *connection)
                .await?;
            let rows: Vec<_> = rows.iter().map(stored).collect::<Result<_, _>>()?;
            let forget = |row: &mut StoredDestination| {
                row.is_readable && row.policy.is_none() && row.state.forget(row.now)
            };
            let settled: Vec<&str> = rows
                .iter()
                .filter(|row| forget(&mut (*row).clone()))
                .map(|row| &*row.name)
                .collect();
            if !settled.is_empty() {
                change_all(connection, &settled, &mut |row| forget(row), None).await?;
            }
            let is_fruitful = settled.len() * 2 > rows.len();
            let last = rows.last().filter(|_| rows.len() == LIMIT);
            Ok((last.map(|row| row.name.clone()), is_fruitful))
        })
        .await
    }

    /// Removes rows of destinations that say nothing any more. Returns whether there may be more.
    pub(crate) async fn forget_destinations(&self) -> Result<bool, StoreError> {
        const LIMIT: i32 = 1000;
        self.run("destinations.forget", async |connection| {
            let removed: i32 =
                sqlx::query_scalar("SELECT forget_destinations(interval '10 minutes', $1)")
                    .bind(LIMIT)
                    .fetch_one(connection)
                    .await?;
            Ok(removed == LIMIT)
        })
        .await
    }
}

macro_rules! columns {
    ($rest:literal) => {
        concat!(
            "SELECT
                i.name, d.state::text, d.policy::text,
                (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now,
                d.filled_at IS NOT NULL OR EXISTS (
                    SELECT FROM destination_leases l WHERE l.name = d.name OFFSET 0
                ) AS is_leased ",
            $rest
        )
    };
}

const ONE: &str = columns!(
    "FROM (SELECT $1::text AS name) i LEFT JOIN destinations d ON d.name = ANY (ARRAY[i.name])"
);

/// The first row has no name, so that the database's time comes even if nothing has changed.
const CHANGED: &str = columns!(
    "FROM (
        SELECT '' AS name
        UNION ALL
        SELECT c.name FROM destinations c WHERE c.changed_at > to_timestamp($1::bigint / 1000.0)
    ) i LEFT JOIN destinations d ON d.name = ANY (ARRAY[i.name])"
);

const KNOWN: &str = columns!(
    "FROM (
        SELECT c.name FROM destinations c WHERE c.name > $1 ORDER BY c.name LIMIT $2
    ) i JOIN destinations d ON d.name = ANY (ARRAY[i.name]) ORDER BY i.name"
);

/// Those that are closed now.
const CLOSED: &str = columns!(
    "FROM (
        SELECT c.name FROM destinations c
        WHERE c.closed_until IS NOT NULL AND c.closed_until > clock_timestamp()
        ORDER BY c.name LIMIT $1
    ) i JOIN destinations d ON d.name = ANY (ARRAY[i.name]) ORDER BY i.name"
);

/// Those of which something is stored that may have ended.
const UNCHANGED: &str = columns!(
    "FROM (
        SELECT c.name FROM destinations c
        WHERE c.name > $1 AND c.policy IS NULL AND c.state::text <> '{}'
            AND c.changed_at <= clock_timestamp() - interval '10 minutes'
            AND coalesce(c.closed_until, '-infinity') <= clock_timestamp()
        ORDER BY c.name LIMIT $2
    ) i JOIN destinations d ON d.name = ANY (ARRAY[i.name]) ORDER BY i.name"
);

const LOCKED: &str = columns!(
    "FROM unnest($1::text[]) WITH ORDINALITY AS i(name, number)
     JOIN destinations d ON d.name = ANY (ARRAY[i.name])
     ORDER BY i.number FOR NO KEY UPDATE OF d"
);

/// Destinations that are closed now, up to this many.
pub(super) async fn closed_destinations(
    connection: &mut PgConnection,
    limit: i64,
) -> Result<Vec<StoredDestination>, sqlx::Error> {
    let rows = sqlx::query(CLOSED)
        .bind(limit)
        .persistent(false)
        .fetch_all(connection)
        .await?;
    rows.iter().map(stored).collect()
}

fn stored(row: &PgRow) -> Result<StoredDestination, sqlx::Error> {
    let name: String = row.try_get("name")?;
    let state: Option<String> = row.try_get("state")?;
    let policy: Option<String> = row.try_get("policy")?;
    let now = row.try_get("now")?;
    // A newer version or an operator may have written another form. It is left alone.
    let state: Option<Result<State, _>> = state.map(|state| serde_json::from_str(&state));
    let policy = policy.map(|policy| serde_json::from_str(&policy));
    let is_readable = !matches!(state, Some(Err(_))) && !matches!(policy, Some(Err(_)));
    let state = state.and_then(Result::ok).unwrap_or_default();
    let policy = policy.and_then(Result::ok);
    Ok(StoredDestination {
        is_readable,
        is_leased: row.try_get("is_leased")?,
        name,
        state,
        policy,
        now,
    })
}

async fn change_all(
    connection: &mut PgConnection,
    names: &[&str],
    change: &mut (impl FnMut(&mut StoredDestination) -> bool + Send),
    on_record: Option<(&Signed, &Entry)>,
) -> Result<Vec<StoredDestination>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    sqlx::query(
        "INSERT INTO destinations (name) SELECT i.name FROM unnest($1::text[]) AS i(name)
         ON CONFLICT DO NOTHING",
    )
    .bind(names)
    .execute(&mut *transaction)
    .await?;
    let rows = sqlx::query(LOCKED)
        .bind(names)
        .fetch_all(&mut *transaction)
        .await?;
    let mut changed = Vec::new();
    let mut all = Vec::new();
    for row in &rows {
        let mut destination = stored(row)?;
        if destination.is_readable && change(&mut destination) {
            changed.push(all.len());
            if destination.state.is_idle(destination.now) {
                // The sweep removes the row once all processes have read it.
                destination.state = State::default();
            }
        }
        all.push(destination);
    }
    if changed.is_empty() {
        // No row is left of what was only looked for.
        transaction.rollback().await?;
        return Ok(all);
    }
    let column = || changed.iter().map(|&number| &all[number]);
    let (mut closed, mut states, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    for destination in column() {
        let state = &destination.state;
        closed.push(match state.closed_until(destination.now) {
            None => None,
            Some(Until::At(at)) => Some(at),
            Some(Until::Forever) => Some(Millis::MAX),
        });
        states.push(encode(state)?);
        policies.push(destination.policy.as_ref().map(encode).transpose()?);
    }
    sqlx::query(
        "UPDATE destinations d
         SET state = i.state::json, policy = i.policy::json,
            closed_until = CASE
                WHEN i.closed = 9223372036854775807 THEN 'infinity'
                -- A NULL would be ignored by `least`.
                WHEN i.closed IS NOT NULL
                THEN to_timestamp(least(i.closed, 253402300799000) / 1000.0)
            END,
            changed_at = clock_timestamp()
         FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[])
            AS i(name, state, policy, closed)
         WHERE d.name = ANY (ARRAY[i.name])",
    )
    .bind(column().map(|d| &*d.name).collect::<Vec<_>>())
    .bind(states)
    .bind(policies)
    .bind(closed)
    .execute(&mut *transaction)
    .await?;
    if let Some((author, entry)) = on_record {
        record(&mut transaction, author, entry, None).await?;
    }
    transaction.commit().await?;
    Ok(all)
}

fn encode(value: &impl serde::Serialize) -> Result<String, sqlx::Error> {
    serde_json::to_string(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

async fn lease_all(
    connection: &mut PgConnection,
    instance: Uuid,
    requests: &[LeaseRequest],
    lease: Duration,
) -> Result<HashMap<String, Grant>, sqlx::Error> {
    let column = requests.iter();
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    let rows = sqlx::query(
        "SELECT destination, permits, tokens, wait_ms FROM lease_destinations(
            $1, $2, $3, $4, $5, $6, $7, $8, $9 * interval '1 millisecond'
         )",
    )
    .bind(instance)
    .bind(column.clone().map(|r| &*r.name).collect::<Vec<_>>())
    .bind(
        column
            .clone()
            .map(|r| r.limit.map(number))
            .collect::<Vec<_>>(),
    )
    .bind(column.clone().map(|r| number(r.used)).collect::<Vec<_>>())
    .bind(
        column
            .clone()
            .map(|r| number(r.permits))
            .collect::<Vec<_>>(),
    )
    .bind(
        column
            .clone()
            .map(|r| r.rate.map(|(rate, _)| rate))
            .collect::<Vec<_>>(),
    )
    .bind(
        column
            .clone()
            .map(|r| r.rate.map(|(_, bucket)| number(bucket)))
            .collect::<Vec<_>>(),
    )
    .bind(column.map(|r| number(r.tokens)).collect::<Vec<_>>())
    .bind(millis(lease))
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let count = |name| row.try_get::<i32, _>(name).map(|n| n.max(0) as u32);
            let wait: i64 = row.try_get("wait_ms")?;
            let grant = Grant {
                permits: count("permits")?,
                tokens: count("tokens")?,
                wait: Duration::from_millis(wait.max(0) as u64),
            };
            Ok((row.try_get("destination")?, grant))
        })
        .collect()
}
