//! Requests that wait in memory for a pass.
//!
//! They take room that requests to other destinations could have. So few of them wait, and not for
//! long, unless their destination answers fast.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::destination::REMEMBERED;
use super::pace::{Pace, SLOW};
use super::room::AHEAD;
use super::{Full, Gate, Pass, Turn};

/// How long a request waits in memory for a pass of a destination that is limited, or that has not
/// answered yet. Until then it takes room that requests to others could have.
const PATIENCE: Duration = Duration::from_secs(1);

/// A request that waits in memory for a pass.
#[derive(Debug)]
struct Waiting {
    gate: Arc<Gate>,
    name: Arc<str>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(destination) = self.gate.lock().destinations.get_mut(&self.name) {
            destination.waiting -= 1;
        }
    }
}

impl Gate {
    /// Waits for a pass of a destination that will have one soon.
    pub(in crate::engine::attempt) async fn enter(
        self: &Arc<Self>,
        name: &str,
        turn: Turn,
    ) -> Result<Pass, Full> {
        let began = Instant::now();
        let mut waiting = None;
        loop {
            let freed = Arc::clone(&self.entry(&mut self.lock(), name, began).freed);
            // Created before the attempt to enter: no pass that is freed after it is missed.
            let freed = freed.notified();
            match self.try_enter(name, turn) {
                Err(full @ (Full::Soon | Full::Short)) => {
                    if waiting.is_none() {
                        waiting = Some(self.wait(name, full)?);
                    }
                    // Looks again after a while: the destination may have become slow.
                    let _ = tokio::time::timeout(SLOW, freed).await;
                    // The request gives way to requests that this process could send.
                    if began.elapsed() > self.patience(name, full) {
                        return Err(Full::Lasting);
                    }
                }
                entered => return entered,
            }
        }
    }

    /// Counts a request that waits, unless more wait than will have a pass soon.
    fn wait(self: &Arc<Self>, name: &str, full: Full) -> Result<Waiting, Full> {
        let now = Instant::now();
        let mut inner = self.lock();
        let destination = self.entry(&mut inner, name, now);
        let limits = destination.limits(now);
        let most = limits
            .tokens_within(PATIENCE)
            .map_or(AHEAD, |tokens| tokens.clamp(1, AHEAD));
        if full == Full::Short && destination.waiting >= most {
            return Err(Full::Lasting);
        }
        destination.waiting += 1;
        Ok(Waiting {
            gate: Arc::clone(self),
            name: name.into(),
        })
    }

    /// How long a request waits.
    fn patience(&self, name: &str, full: Full) -> Duration {
        let now = Instant::now();
        let inner = self.lock();
        let is_fast = inner
            .destinations
            .get(name)
            .is_some_and(|destination| destination.pace.pace(now) == Pace::Fast);
        if full == Full::Soon && is_fast {
            REMEMBERED
        } else {
            PATIENCE
        }
    }
}
