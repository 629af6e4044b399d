//! What all processes know of destinations.

use super::{Store, StoreError};

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
}
