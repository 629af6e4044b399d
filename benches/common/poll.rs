//! Polls like those of a runner.

use std::time::{Duration, Instant};

use requeuest::sqlx::postgres::PgConnectOptions;
use requeuest::sqlx::{self, ConnectOptions, PgConnection};
use requeuest::testkit::TestDatabase;

use super::AnyError;

/// Requests that a poll asks for.
pub(crate) const BATCH: i32 = 256;
/// The crate's session settings that affect plans, and a lease that outlasts the bench.
const SESSION: [(&str, &str); 7] = [
    ("search_path", "requeuest"),
    ("requeuest.lease", r"1\ hour"),
    ("jit", "off"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// Opens a session with these settings.
pub(crate) async fn session(database: &TestDatabase) -> Result<PgConnection, AnyError> {
    let options: PgConnectOptions = database.options().options(SESSION);
    Ok(options.connect().await?)
}

/// Polls this channel, or all of them, once. Returns how many requests the poll claimed and how
/// long it took.
pub(crate) async fn poll(
    connection: &mut PgConnection,
    channel: impl Into<Option<&str>>,
) -> Result<(i64, Duration), AnyError> {
    let channels = channel.into().map(|channel| vec![channel]);
    let began = Instant::now();
    let claimed: i64 = sqlx::query_scalar("SELECT count(id) FROM mq_poll($1, $2)")
        .bind(channels)
        .bind(BATCH)
        .fetch_one(connection)
        .await?;
    Ok((claimed, began.elapsed()))
}
