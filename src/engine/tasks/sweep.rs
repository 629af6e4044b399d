//! Removing rows that have outlived the retention.

use std::time::Duration;

use crate::store::Store;

/// Often enough for the shortest retention, seldom enough to cost nothing.
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Sweeps until the task is aborted.
pub(crate) async fn run(store: Store) {
    let interval = (store.config().retention / 12).clamp(Duration::from_secs(1), MAX_INTERVAL);
    loop {
        // The jitter spreads the processes of a fleet, which may have started together.
        tokio::time::sleep(interval.mul_f64(0.5 + fastrand::f64())).await;
        // A failed sweep is logged by the store and left to the next round.
        while store.sweep().await.is_ok_and(|more| more) {}
    }
}
