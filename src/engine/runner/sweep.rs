//! Forgetting what has outlived its retention.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::Shared;
use crate::store::inspect;

/// Often enough for the shortest retention to be of use, seldom enough to cost nothing.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// As many as one batch of the store's removes.
const FULL_BATCH: u64 = 1000;

pub(crate) async fn run(shared: Arc<Shared>) {
    let retention = shared.config.retention;
    let interval = (retention / 12).clamp(Duration::from_secs(1), MAX_INTERVAL);
    loop {
        // Spread over the fleet, which is of one mind otherwise.
        tokio::time::sleep(interval.mul_f64(0.5 + fastrand::f64())).await;
        loop {
            let pruned = shared
                .db
                .run(move |connection| {
                    Box::pin(async move { inspect::prune(connection, retention).await })
                })
                .await;
            match pruned {
                Ok(FULL_BATCH..) => {}
                Ok(_) => break,
                Err(error) => {
                    log::debug!("pruning failed: {}", error.error);
                    break;
                }
            }
        }
    }
}
