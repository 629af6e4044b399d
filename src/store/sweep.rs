//! Removing rows that have outlived the retention.

use sqlx::PgConnection;

use super::{Store, StoreError, millis};

/// How many attempts or keys one statement deletes. A delete of everything at once would hold back
/// vacuum and the write-ahead log.
const BATCH: u64 = 1000;

impl Store {
    /// Gives up requests past their deadline, in case no runner polls; empties outcome partitions
    /// that have outlived the retention; and deletes a batch of failed attempts and keys whose
    /// requests are gone. Returns whether the batch was full, so that there may be more.
    pub(crate) async fn sweep(&self) -> Result<bool, StoreError> {
        let retention = millis(self.config().retention);
        let deleted = self
            .run("sweep", async |connection| {
                sweep(connection, retention).await
            })
            .await?;
        Ok(deleted >= BATCH)
    }
}

async fn sweep(connection: &mut PgConnection, retention: i64) -> Result<u64, sqlx::Error> {
    sqlx::query("SELECT expire_requests(1000)")
        .execute(&mut *connection)
        .await?;
    sqlx::query("SELECT prune_outcomes($1 * interval '1 millisecond')")
        .bind(retention)
        .execute(&mut *connection)
        .await?;
    let pruned = sqlx::query(
        "DELETE FROM attempts a USING (
            SELECT old.id, old.number FROM attempts old
            WHERE old.ended_at < clock_timestamp() - $1 * interval '1 millisecond'
                AND NOT EXISTS (SELECT FROM mq_payloads p WHERE p.id = old.id OFFSET 0)
            ORDER BY old.ended_at LIMIT 1000
        ) gone
        WHERE a.id = gone.id AND a.number = gone.number",
    )
    .bind(retention)
    .execute(&mut *connection)
    .await?;
    // The key of a request that is just being inserted is too young to look abandoned.
    let keys = sqlx::query(
        "DELETE FROM request_keys k USING (
            SELECT old.channel_name, old.key FROM request_keys old
            WHERE old.created_at < clock_timestamp() - $1 * interval '1 millisecond'
                AND NOT EXISTS (SELECT FROM mq_msgs m WHERE m.id = old.id OFFSET 0)
                AND NOT EXISTS (SELECT FROM outcomes o WHERE o.id = old.id OFFSET 0)
            ORDER BY old.created_at LIMIT 1000
        ) gone
        WHERE k.channel_name = gone.channel_name AND k.key = gone.key
            AND k.created_at < clock_timestamp() - $1 * interval '1 millisecond'",
    )
    .bind(retention)
    .execute(connection)
    .await?;
    Ok(pruned.rows_affected().max(keys.rows_affected()))
}
