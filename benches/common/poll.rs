//! Polls as a runner makes them.

use std::time::{Duration, Instant};

use requeuest::sqlx::postgres::PgConnectOptions;
use requeuest::sqlx::{self, ConnectOptions, PgConnection};
use requeuest::testkit::TestDatabase;

use super::AnyError;

/// How many requests a poll asks for.
pub(crate) const BATCH: i32 = 256;
/// What the crate asks of its sessions.
const SESSION: [(&str, &str); 7] = [
    ("search_path", "requeuest"),
    ("requeuest.lease", r"1\ hour"),
    ("jit", "off"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// A session as the crate has them.
pub(crate) async fn session(database: &TestDatabase) -> Result<PgConnection, AnyError> {
    let options: PgConnectOptions = database.options().options(SESSION);
    Ok(options.connect().await?)
}

/// How many requests it claimed, and how long that took.
pub(crate) async fn poll(
    connection: &mut PgConnection,
    channel: &str,
) -> Result<(i64, Duration), AnyError> {
    let began = Instant::now();
    let claimed: i64 = sqlx::query_scalar("SELECT count(id) FROM mq_poll(ARRAY[$1], $2)")
        .bind(channel)
        .bind(BATCH)
        .fetch_one(connection)
        .await?;
    Ok((claimed, began.elapsed()))
}
