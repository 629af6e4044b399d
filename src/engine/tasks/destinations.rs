//! Keeping this process's view of destinations current.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::attempt::gate::Gate;
use crate::store::Store;

/// How often the destinations with deferred requests are looked for.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many are looked at in one step. The next step continues from there.
const STEP: usize = 256;

/// Looks until the task is aborted.
pub(crate) async fn run(store: Store, gate: Arc<Gate>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut after = String::new();
    loop {
        ticks.tick().await;
        // Other processes, or earlier ones, have deferred requests too. The store logs failures.
        if let Ok(names) = store.deferred_destinations(&after, STEP).await {
            for name in &names {
                gate.note_deferred(name);
            }
            after = match names.last() {
                Some(last) if names.len() == STEP => last.clone(),
                _ => String::new(),
            };
        }
    }
}
