//! Persisting many requests in one transaction.

use sqlx::{Executor, PgConnection};
use uuid::Uuid;

use super::enqueue::{MESSAGE_NAME, NewRequest};
use super::{BoxFuture, millis, quoted};
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
    notify: bool,
    prepared: bool,
) -> Result<Option<RequestId>, sqlx::Error> {
    let call = format!(
        "SELECT {}.enqueue_many($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        quoted(schema)
    );
    let column = requests.iter();
    let elsewhere: Option<Uuid> = sqlx::query_scalar(&call)
        .bind(column.clone().map(|r| r.id.into()).collect::<Vec<Uuid>>())
        .bind(column.clone().map(|r| &*r.channel).collect::<Vec<_>>())
        .bind(column.clone().map(|r| &*r.group).collect::<Vec<_>>())
        .bind(column.clone().map(|r| r.ordered).collect::<Vec<_>>())
        .bind(column.clone().map(|r| r.halts).collect::<Vec<_>>())
        .bind(column.clone().map(|r| millis(r.delay)).collect::<Vec<_>>())
        .bind(
            column
                .clone()
                .map(|r| r.deadline.map(millis))
                .collect::<Vec<_>>(),
        )
        .bind(MESSAGE_NAME)
        .bind(column.clone().map(|r| &*r.head).collect::<Vec<_>>())
        .bind(column.map(|r| r.body.as_deref()).collect::<Vec<_>>())
        .bind(notify)
        .persistent(prepared)
        .fetch_one(connection)
        .await?;
    Ok(elsewhere.map(RequestId::from))
}
