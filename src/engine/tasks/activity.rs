//! Adding what this process has counted to the table that all processes share.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::meter::Meter;
use crate::store::Store;

/// How often counts are added. What a process has counted since is lost with it.
const INTERVAL: Duration = Duration::from_secs(10);

/// Adds counts until the task is aborted.
pub(crate) async fn run(store: Store, meter: Arc<Meter>) {
    loop {
        // The jitter spreads the processes of a fleet, which may have started together.
        tokio::time::sleep(INTERVAL.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
        flush(&store, &meter).await;
    }
}

/// Adds what was counted since the last time, if there is anything. After a failure, which the
/// store logs, it is added the next time.
pub(crate) async fn flush(store: &Store, meter: &Meter) {
    let counted = meter.take();
    if counted.is_empty() {
        return;
    }
    if store.verify().await.is_err() {
        return meter.restore(&counted);
    }
    let by_name: Vec<_> = counted
        .iter()
        .map(|(channel, counts)| (&**channel, counts.clone()))
        .collect();
    match store.note_activity(&by_name).await {
        // Twice would be worse than never.
        Ok(()) => {}
        Err(error) if error.is_unknown() => {}
        Err(_) => meter.restore(&counted),
    }
}
