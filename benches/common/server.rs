//! A throwaway Postgres with `fsync` on, as in production.

use std::time::Duration;

use requeuest::sqlx::{self, PgPool, Row};
use requeuest::testkit::{self, Postgres};

use super::AnyError;

/// A name and its value.
pub(crate) type Setting = (String, String);

/// Parses the value of an argument `--set name=value`.
pub(crate) fn setting(argument: &str) -> Result<Setting, AnyError> {
    let (name, value) = argument.split_once('=').ok_or("--set takes name=value")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub(crate) async fn start(settings: &[Setting]) -> Result<Postgres, testkit::Error> {
    let mut server = Postgres::builder().config("fsync", "on");
    for (name, value) in settings {
        server = server.config(name, value);
    }
    server.start().await
}

/// The server's version and the settings that matter here.
pub(crate) async fn describe(pool: &PgPool) -> Result<String, AnyError> {
    let row = sqlx::query(
        "SELECT
            current_setting('server_version') AS version,
            current_setting('fsync') AS fsync,
            current_setting('synchronous_commit') AS commit,
            current_setting('shared_buffers') AS buffers",
    )
    .fetch_one(pool)
    .await?;
    Ok(format!(
        "Postgres {}, fsync {}, synchronous_commit {}, shared_buffers {}",
        row.get::<String, _>("version"),
        row.get::<String, _>("fsync"),
        row.get::<String, _>("commit"),
        row.get::<String, _>("buffers"),
    ))
}

/// The server's version, without the suffix that the system's packages add.
pub(crate) async fn version(pool: &PgPool) -> Result<String, AnyError> {
    let version = "SELECT split_part(current_setting('server_version'), ' ', 1)";
    Ok(sqlx::query_scalar(version).fetch_one(pool).await?)
}

/// Waits until no request is unfinished.
pub(crate) async fn settled(pool: &PgPool) -> Result<(), AnyError> {
    let unfinished = "SELECT count(*) FROM requeuest.mq_msgs";
    while sqlx::query_scalar::<_, i64>(unfinished)
        .fetch_one(pool)
        .await?
        > 0
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
