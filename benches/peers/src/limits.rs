//! What bounds every peer on this machine: the exchange without a queue, and commits without an
//! exchange.
//!
//! Measured in the same run, these limits tell a slow queue from a slow machine. The exchange
//! bounds every queue. Commits bound the queues that commit each request separately; a queue that
//! shares commits among callers can exceed them.

use std::sync::Arc;
use std::time::Duration;

use sqlx08::postgres::PgPoolOptions;

use crate::callers::each;
use crate::peer::{AnyError, CONNECTIONS, Site, body};
use crate::receiver::Receiver;

/// Requests that are sent and answered, but not persisted.
pub(crate) async fn exchange(
    callers: usize,
    requests: u64,
    site: &Site,
    receiver: &Receiver,
) -> Result<Duration, AnyError> {
    let site = Arc::new(site.clone());
    let numbers = receiver.expect(requests);
    each(callers, numbers, move |number| {
        let site = Arc::clone(&site);
        async move { site.call(number).post(&site.http).await }
    })
    .await
}

/// Rows the size of a request, each with its own commit.
pub(crate) async fn commits(
    callers: usize,
    requests: u64,
    site: &Site,
) -> Result<Duration, AnyError> {
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .connect(&site.database_url)
        .await?;
    sqlx08::query("CREATE TABLE bare (id uuid PRIMARY KEY, body text)")
        .execute(&pool)
        .await?;
    let theirs = pool.clone();
    let took = each(callers, 0..requests, move |number| {
        let pool = theirs.clone();
        async move {
            sqlx08::query("INSERT INTO bare VALUES (gen_random_uuid(), $1)")
                .bind(body(number))
                .execute(&pool)
                .await?;
            Ok(())
        }
    })
    .await?;
    pool.close().await;
    Ok(took)
}
