//! Measuring what no single operation shows, for the application's recorder: what the handle is
//! doing, and what all processes have before them.
//!
//! Without a recorder the task doesn't run.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use crate::engine::Engine;
use crate::recorder::{HandleState, QueueState};
use crate::store::Store;

/// How often the recorder is told what the handle is doing.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often it is told what all processes have before them.
const QUEUE_INTERVAL: Duration = Duration::from_secs(15);

/// Measures until the engine is gone.
pub(crate) async fn run(engine: Weak<Engine>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next_look = Instant::now();
    let mut observes = false;
    loop {
        ticks.tick().await;
        let Some(engine) = engine.upgrade() else {
            return;
        };
        let driver = Arc::clone(engine.driver());
        driver.meter.handle_state(&HandleState {
            in_flight: driver.slots.in_use(),
            concurrency: driver.config.concurrency,
            unsettled: driver.slots.unsettled(),
            queued: engine.budget.requests(),
            sweep: engine.sweep_parts(),
        });
        if Instant::now() < next_look || driver.lifecycle.is_closing() {
            continue;
        }
        next_look = Instant::now() + QUEUE_INTERVAL;
        let (store, meter, instance) = (
            driver.store.clone(),
            Arc::clone(&driver.meter),
            driver.instance,
        );
        // Not held meanwhile: the last handle may go.
        drop((engine, driver));
        if store.verify().await.is_err() || !store.may_insert() {
            continue;
        }
        // The store logs failures.
        let Ok(is_mine) = store.observe_queue(instance, 3 * QUEUE_INTERVAL).await else {
            continue;
        };
        if is_mine {
            if let Some(state) = look(&store).await {
                meter.queue_state(Some(state));
                observes = true;
            }
        } else if std::mem::take(&mut observes) {
            meter.queue_state(None);
        }
    }
}

async fn look(store: &Store) -> Option<QueueState> {
    // The store logs failures.
    let mut state = store.queue_depth().await.ok()?;
    state.destinations = store.closed_destinations().await.ok()?;
    Some(state)
}
