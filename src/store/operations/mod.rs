//! Changes of many requests. Any process drives them, a chunk after the other.
//!
//! A chunk is one transaction: it locks the row of its operation, changes some requests, and notes
//! in the row how far it is. So no crash of any process loses or repeats a change, and no two
//! processes work at one operation at the same time.

mod apply;
mod drive;
mod matches;

use std::collections::HashMap;
use std::time::SystemTime;

use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use self::matches::{Search, resolved};
use super::Store;
use super::changes::record;
use super::columns::named_by_group;
use super::dead_letters::at;
use crate::change::{Entry, Signed};
use crate::error::Error;
use crate::inspection::{Count, MAX_COUNT, RequestFilter};
use crate::operation::{
    Action, MAX_PREVIEWED, NewOperation, Operation, OperationFilter, OperationId, OperationState,
    Preview,
};

pub(crate) use self::drive::Driven;

/// The format of actions and filters that this version writes. It drives operations of this one and
/// of earlier ones.
const FORMAT: i16 = 1;
/// How many rows a preview looks at.
const MAX_LOOKED: u64 = 50_000;

impl Store {
    /// What an operation would do.
    pub(crate) async fn preview(
        &self,
        action: Action,
        filter: &RequestFilter,
    ) -> Result<Preview, Error> {
        self.run_verified("operations.preview", async |connection| {
            let mut snapshot = connection
                .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                .await?;
            let preview = self.preview_in(&mut snapshot, action, filter).await?;
            snapshot.commit().await?;
            Ok(preview)
        })
        .await
    }

    async fn preview_in(
        &self,
        connection: &mut PgConnection,
        action: Action,
        filter: &RequestFilter,
    ) -> Result<Preview, sqlx::Error> {
        let filter = resolved(connection, filter).await?;
        let search = Search {
            action,
            filter: &filter,
            until: now(connection).await?,
        };
        let (mut after, mut number, mut looked) = (None, 0, 0);
        let mut sum = Sum::default();
        let is_exact = loop {
            let left = (MAX_COUNT + 1).saturating_sub(number);
            let found = search
                .look(connection, after, left as usize, self.sealer())
                .await?;
            number += found.matching.len() as u64;
            looked += found.looked;
            let ids: Vec<Uuid> = found.matching.iter().map(|row| row.id.into()).collect();
            sum.add(connection, action, &ids).await?;
            after = found.next;
            if after.is_none() {
                break true;
            }
            if number > MAX_COUNT || looked >= MAX_LOOKED {
                break false;
            }
        };
        Ok(sum.preview(Count::new(number, is_exact)))
    }

    /// Starts an operation, on the record. One that matches nothing has finished at once.
    pub(crate) async fn start_operation(
        &self,
        new: &NewOperation,
        filter: &RequestFilter,
        author: &Signed,
    ) -> Result<OperationId, Error> {
        let id = OperationId::generate();
        self.recorded_verified("operations.start", author, async |connection| {
            let filter = resolved(connection, filter).await?;
            let search = Search {
                action: new.action,
                filter: &filter,
                until: now(connection).await?,
            };
            let found = search.look(connection, None, 1, self.sealer()).await?;
            let is_over = found.matching.is_empty() && found.next.is_none();
            insert(connection, id, new, &filter, author, is_over).await?;
            Ok((id, Some(new.entry(id))))
        })
        .await
    }

    /// Cancels an operation unless it has ended, on the record. A chunk under way ends first.
    /// `None` if there is no such operation.
    pub(crate) async fn cancel_operation(
        &self,
        id: OperationId,
        author: &Signed,
    ) -> Result<Option<bool>, Error> {
        self.recorded_verified("operations.cancel", author, async |connection| {
            let cancelled = sqlx::query(
                "UPDATE operations SET state = 'cancelled', finished_at = clock_timestamp()
                 WHERE id = $1 AND state = 'running'",
            )
            .bind(Uuid::from(id))
            .execute(&mut *connection)
            .await?;
            if cancelled.rows_affected() > 0 {
                let entry = Entry::new("cancel_operation", id.to_string());
                return Ok((Some(true), Some(entry)));
            }
            let exists = sqlx::query("SELECT FROM operations WHERE id = $1")
                .bind(Uuid::from(id))
                .fetch_optional(connection)
                .await?;
            Ok((exists.map(|_row| false), None))
        })
        .await
    }

    /// One operation.
    pub(crate) async fn operation(&self, id: OperationId) -> Result<Option<Operation>, Error> {
        self.run_verified("operations.one", async |connection| {
            let row = sqlx::query(&format!("{COLUMNS} WHERE o.id = $1"))
                .bind(Uuid::from(id))
                .fetch_optional(connection)
                .await?;
            row.map(|row| operation(&row)).transpose()
        })
        .await
    }

    /// A page of operations, the newest first.
    pub(crate) async fn operations(
        &self,
        filter: &OperationFilter,
        limit: u32,
    ) -> Result<Vec<Operation>, Error> {
        let running = if filter.is_running {
            "AND o.state = 'running'"
        } else {
            ""
        };
        self.run_verified("operations.list", async |connection| {
            let rows = sqlx::query(&format!(
                "{COLUMNS} WHERE o.id < $1 {running} ORDER BY o.id DESC LIMIT $2"
            ))
            .bind(filter.before.map_or(Uuid::max(), Uuid::from))
            .bind(i64::from(limit))
            .fetch_all(connection)
            .await?;
            rows.iter().map(operation).collect()
        })
        .await
    }
}

async fn insert(
    connection: &mut PgConnection,
    id: OperationId,
    new: &NewOperation,
    filter: &RequestFilter,
    author: &Signed,
    is_over: bool,
) -> Result<(), sqlx::Error> {
    let filter = serde_json::to_string(filter);
    sqlx::query(
        "INSERT INTO operations (
            id, format, action, filter, actor, reason, rate, state, finished_at
         )
         VALUES (
            $1, $2, $3, $4::json, $5, $6, $7, CASE WHEN $8 THEN 'finished' ELSE 'running' END,
            CASE WHEN $8 THEN clock_timestamp() END
         )",
    )
    .bind(Uuid::from(id))
    .bind(FORMAT)
    .bind(new.action.as_str())
    .bind(filter.map_err(|error| sqlx::Error::Encode(error.into()))?)
    .bind(&author.actor)
    .bind(&author.reason)
    .bind(new.rate)
    .bind(is_over)
    .execute(connection)
    .await?;
    Ok(())
}

async fn now(connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT epoch_us(clock_timestamp())")
        .fetch_one(connection)
        .await
}

const COLUMNS: &str = "
    SELECT
        o.id, o.format, o.action, o.filter::text AS filter, o.actor, o.reason, o.rate, o.state,
        epoch_us(o.started_at) AS started_at, epoch_us(o.finished_at) AS finished_at,
        epoch_us(o.driven_at) AS driven_at,
        EXISTS (SELECT FROM runners r WHERE r.expires_at > clock_timestamp()) AS is_driven,
        o.looked, o.done, o.skipped, o.failed, cardinality(o.busy)::bigint AS busy,
        o.last_skipped, o.last_error
    FROM operations o";

fn operation(row: &PgRow) -> Result<Operation, sqlx::Error> {
    let number = |name| Ok::<_, sqlx::Error>(row.try_get::<i64, _>(name)?.unsigned_abs());
    let time = |name| Ok::<_, sqlx::Error>(row.try_get::<Option<i64>, _>(name)?.map(at));
    let (action, filter) = read(row)?;
    let state: String = row.try_get("state")?;
    Ok(Operation {
        id: row.try_get::<Uuid, _>("id")?.into(),
        action,
        filter,
        actor: row.try_get("actor")?,
        reason: row.try_get("reason")?,
        rate: row.try_get("rate")?,
        state: OperationState::from_name(&state),
        started_at: at(row.try_get("started_at")?),
        finished_at: time("finished_at")?,
        driven_at: time("driven_at")?,
        is_driven: row.try_get("is_driven")?,
        looked: number("looked")?,
        done: number("done")?,
        skipped: number("skipped")?,
        failed: number("failed")?,
        busy: number("busy")?,
        last_skipped: row.try_get("last_skipped")?,
        last_error: row.try_get("last_error")?,
    })
}

/// What the operation does, and with which requests, as far as this version knows.
fn read(row: &PgRow) -> Result<(Option<Action>, Option<RequestFilter>), sqlx::Error> {
    let format: i16 = row.try_get("format")?;
    if format > FORMAT {
        return Ok((None, None));
    }
    let action: String = row.try_get("action")?;
    let filter: String = row.try_get("filter")?;
    Ok((action.parse().ok(), serde_json::from_str(&filter).ok()))
}

/// What a preview adds up.
#[derive(Debug, Default)]
struct Sum {
    oldest: Option<SystemTime>,
    newest: Option<SystemTime>,
    by_destination: HashMap<String, u64>,
}

impl Sum {
    async fn add(
        &mut self,
        connection: &mut PgConnection,
        action: Action,
        ids: &[Uuid],
    ) -> Result<(), sqlx::Error> {
        if ids.is_empty() {
            return Ok(());
        }
        let table = match action {
            Action::Cancel => "mq_msgs",
            _ => "outcomes_kept",
        };
        let named = named_by_group("m.channel_args");
        let rows = sqlx::query(&format!(
            "SELECT coalesce(m.destination, {named}) AS destination, count(*) AS number,
                epoch_us(min(m.created_at)) AS oldest, epoch_us(max(m.created_at)) AS newest
             FROM unnest($1::uuid[]) AS i(id) JOIN {table} m ON m.id = ANY (ARRAY[i.id])
             GROUP BY 1"
        ))
        .bind(ids)
        .persistent(false)
        .fetch_all(connection)
        .await?;
        for row in rows {
            let oldest = at(row.try_get("oldest")?);
            let newest = at(row.try_get("newest")?);
            self.oldest = Some(self.oldest.map_or(oldest, |known| known.min(oldest)));
            self.newest = self.newest.max(Some(newest));
            let number: i64 = row.try_get("number")?;
            if let Some(name) = row.try_get::<Option<String>, _>("destination")? {
                *self.by_destination.entry(name).or_default() += number.unsigned_abs();
            }
        }
        Ok(())
    }

    fn preview(self, count: Count) -> Preview {
        let mut most: Vec<_> = self.by_destination.into_iter().collect();
        most.sort_unstable_by(|(a, one), (b, other)| other.cmp(one).then_with(|| a.cmp(b)));
        most.truncate(MAX_PREVIEWED);
        let counted = |(name, number)| (name, Count::new(number, count.is_exact));
        Preview {
            oldest: self.oldest,
            newest: self.newest,
            by_destination: most.into_iter().map(counted).collect(),
            count,
        }
    }
}

/// Records what a chunk did.
async fn record_chunk(
    connection: &mut PgConnection,
    author: &Signed,
    entry: &Entry,
    id: OperationId,
) -> Result<(), sqlx::Error> {
    record(connection, author, entry, Some(id)).await
}
