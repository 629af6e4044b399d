//! Which runners of a handle may be polling.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::engine::attempt::gate::Gate;
use crate::store::Store;
use crate::store::runner_pool::RunnerPool;

/// The time from a poll's connection being free to its claims being known: another thread may be
/// about to register them.
const REGISTRATION: Duration = Duration::from_millis(50);

/// The pools of all runners of a handle. A runner that is being replaced may still poll.
#[derive(Debug, Default)]
pub(crate) struct Polls {
    pools: Mutex<Vec<Weak<RunnerPool>>>,
}

impl Polls {
    /// Opens the pool of a new runner. Must be called within a tokio runtime.
    pub(super) fn open(&self, store: &Store, gate: &Arc<Gate>) -> Arc<RunnerPool> {
        let gate = Arc::clone(gate);
        let pool = Arc::new(store.runner_pool(Arc::new(move || gate.room())));
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(Arc::downgrade(&pool));
        pool
    }

    /// Waits until every request that was claimed before the call is known here.
    pub(crate) async fn wait_for_polls(&self) {
        let pools: Vec<_> = {
            let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
            pools.iter().filter_map(Weak::upgrade).collect()
        };
        for pool in pools {
            pool.wait_for_poll().await;
        }
        tokio::time::sleep(REGISTRATION).await;
    }
}
