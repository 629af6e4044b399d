//! The record of changes: each is written in the transaction of what it records.

use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::dead_letters::at;
use super::{Store, StoreError};
use crate::change::{Change, ChangeFilter, Entry, Signed};
use crate::error::Error;
use crate::operation::OperationId;

/// How many old changes, and finished operations, one statement deletes.
const BATCH: i32 = 1000;

impl Store {
    /// Runs statements in one transaction, with the record of what they did. Without an entry they
    /// did nothing, and are rolled back.
    pub(super) async fn recorded<T>(
        &self,
        operation: &'static str,
        author: &Signed,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Entry>), sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.recorded_large(operation, 0, author, statements).await
    }

    /// As [`recorded`](Self::recorded), for statements that may move this many bytes.
    pub(super) async fn recorded_large<T>(
        &self,
        operation: &'static str,
        bytes: usize,
        author: &Signed,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Entry>), sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.run_large(operation, bytes, async |connection| {
            let mut transaction = connection.begin().await?;
            let (result, entry) = statements(&mut transaction).await?;
            match entry {
                Some(entry) => {
                    record(&mut transaction, author, &entry, None).await?;
                    transaction.commit().await?;
                }
                None => transaction.rollback().await?,
            }
            Ok(result)
        })
        .await
    }

    /// As [`recorded`](Self::recorded), once the schema is verified, with an error for the caller.
    pub(super) async fn recorded_verified<T>(
        &self,
        operation: &'static str,
        author: &Signed,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<(T, Option<Entry>), sqlx::Error>,
    ) -> Result<T, Error> {
        self.verify().await?;
        match self.recorded(operation, author, statements).await {
            Ok(result) => Ok(result),
            Err(error) => Err(self.refused(error).await),
        }
    }

    /// A page of changes, the newest first.
    pub(crate) async fn changes(
        &self,
        filter: &ChangeFilter,
        limit: u32,
    ) -> Result<Vec<Change>, Error> {
        self.run_verified("changes.list", async |connection| {
            list(connection, filter, limit).await
        })
        .await
    }

    /// Deletes a batch of old changes and of operations that finished as long ago. Returns whether
    /// there may be more.
    pub(crate) async fn prune_operations(&self) -> Result<bool, StoreError> {
        self.run("sweep.operations", async |connection| {
            sqlx::query_scalar("SELECT prune_operations($1)")
                .bind(BATCH)
                .fetch_one(connection)
                .await
        })
        .await
    }
}

/// Writes what was done. Of a try that may have been committed and is repeated, the second record
/// says the same as the first, and is left out.
pub(super) async fn record(
    connection: &mut PgConnection,
    author: &Signed,
    entry: &Entry,
    operation: Option<OperationId>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO changes (actor, reason, action, target, detail, operation)
         SELECT $1, $2, $3, $4, $5::json, $6
         WHERE $5 IS NULL OR $6 IS NOT NULL OR NOT EXISTS (
            SELECT FROM changes c
            WHERE c.target = $4 AND c.action = $3 AND c.detail::text = $5
                AND c.at > clock_timestamp() - interval '1 minute'
            OFFSET 0
         )",
    )
    .bind(&author.actor)
    .bind(&author.reason)
    .bind(entry.action)
    .bind(&entry.target)
    .bind(&entry.detail)
    .bind(operation.map(Uuid::from))
    .execute(connection)
    .await?;
    Ok(())
}

/// Both statements read a page's rows from the end of an index.
async fn list(
    connection: &mut PgConnection,
    filter: &ChangeFilter,
    limit: u32,
) -> Result<Vec<Change>, sqlx::Error> {
    let before = filter.before.unwrap_or(u64::MAX);
    let before = i64::try_from(before).unwrap_or(i64::MAX);
    let statement = match filter.target {
        None => {
            "SELECT c.id, epoch_us(c.at) AS at, c.actor, c.reason, c.action, c.target,
                c.detail::text AS detail, c.operation
             FROM changes c WHERE c.id < $1 ORDER BY c.id DESC LIMIT $2"
        }
        Some(_) => {
            "SELECT c.id, epoch_us(c.at) AS at, c.actor, c.reason, c.action, c.target,
                c.detail::text AS detail, c.operation
             FROM changes c WHERE c.id < $1 AND c.target = $3
             ORDER BY c.target DESC, c.id DESC LIMIT $2"
        }
    };
    let mut query = sqlx::query(statement).bind(before).bind(i64::from(limit));
    if let Some(target) = &filter.target {
        query = query.bind(target);
    }
    let rows = query.fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            let number: i64 = row.try_get("id")?;
            let operation: Option<Uuid> = row.try_get("operation")?;
            Ok(Change {
                number: number.unsigned_abs(),
                at: at(row.try_get("at")?),
                actor: row.try_get("actor")?,
                reason: row.try_get("reason")?,
                action: row.try_get("action")?,
                target: row.try_get("target")?,
                detail: row.try_get("detail")?,
                operation: operation.map(OperationId::from),
            })
        })
        .collect()
}
