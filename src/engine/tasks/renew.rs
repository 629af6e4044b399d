//! Renewing the leases of this process's claims.

use std::sync::Arc;

use crate::engine::attempt::leases::Leases;
use crate::engine::telemetry::OwnCondition;
use crate::store::Store;

/// Renews leases until the task is aborted. A third of the lease leaves time for two more tries.
pub(crate) async fn run(store: Store, leases: Arc<Leases>) {
    let interval = store.config().lease / 3;
    // Checked more often than renewed, so that no lease is a whole interval late.
    let mut ticks = tokio::time::interval(interval / 3);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = OwnCondition::default();
    loop {
        ticks.tick().await;
        let due = leases.due(interval);
        if due.is_empty() {
            continue;
        }
        match store.renew(&due).await {
            Ok(()) => {
                if failing.ends() {
                    tracing::info!("leases are renewed again");
                }
            }
            Err(error) => {
                if failing.begins() {
                    tracing::warn!(
                        %error,
                        "leases can't be renewed; other processes may take over"
                    );
                }
            }
        }
    }
}
