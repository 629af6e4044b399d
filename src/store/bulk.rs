//! Persisting many requests in one transaction.

use sqlx::{Executor, PgConnection, Row};
use uuid::Uuid;

use super::enqueue::{Inserting, MESSAGE_NAME, NewRequest, bind_columns};
use super::{BoxFuture, quoted};
use crate::id::RequestId;

/// Begins a transaction whose connection is thrown away if it is not committed.
pub(crate) fn begin(connection: &mut PgConnection) -> BoxFuture<'_, Result<(), sqlx::Error>> {
    say(connection, "BEGIN")
}

pub(crate) fn commit(connection: &mut PgConnection) -> BoxFuture<'_, Result<(), sqlx::Error>> {
    say(connection, "COMMIT")
}

fn say<'c>(
    connection: &'c mut PgConnection,
    statement: &'static str,
) -> BoxFuture<'c, Result<(), sqlx::Error>> {
    Box::pin(async move {
        connection.execute(statement).await?;
        Ok(())
    })
}

/// Inserts requests without a key of the caller's, in their order, through the schema's own function. Returns one whose ordering key
/// another channel has: then nothing was done.
pub(crate) async fn insert_many(
    connection: &mut PgConnection,
    schema: &str,
    requests: &[NewRequest],
    how: Inserting,
) -> Result<Option<RequestId>, sqlx::Error> {
    let call = format!(
        "SELECT {}.enqueue_many($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        quoted(schema)
    );
    let notify = how.notify && requests.iter().any(NewRequest::needs_runner);
    let row = bind_columns(sqlx::query(&call), requests)
        .bind(requests.iter().map(|r| r.ordered).collect::<Vec<_>>())
        .bind(requests.iter().map(|r| r.halts).collect::<Vec<_>>())
        .bind(MESSAGE_NAME)
        .bind(notify)
        .persistent(how.prepared)
        .fetch_one(connection)
        .await?;
    let elsewhere: Option<Uuid> = row.try_get(0)?;
    Ok(elsewhere.map(RequestId::from))
}
