//! Results that the database refuses by the row, whatever their data: a partition is gone, a
//! trigger raises, a right was revoked.
//!
//! They are held as in an outage, and their leases renewed: their requests have been answered, and
//! must not be sent again. They are held beside the lane, because others may be accepted.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::Settlement;

/// After so many rows in a row, the database is taken to refuse all of them: batches aren't split
/// any more, and one row at a time is tried.
const ENOUGH: usize = 8;
/// The time until a refused result is written again. It doubles with each refusal.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The time until a result is written again that was not tried alone.
const PAUSE_UNTRIED: Duration = Duration::from_secs(1);
/// How many results are written again at once.
const MAX_ROWS: usize = 256;
const MAX_BYTES: usize = 8 * 1024 * 1024;
/// So many held results give the room back that they take in sqlxmq's runner, so that single rows
/// don't stop it. Further ones keep it, which bounds them.
const ROOMLESS: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Held {
    results: Mutex<Vec<Due>>,
    added: Notify,
    /// How many rows were refused for the first time since one was accepted.
    refused: AtomicUsize,
}

struct Due {
    at: Instant,
    settlement: Settlement,
}

impl std::fmt::Debug for Due {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.settlement.lease.id)
    }
}

impl Held {
    pub(super) fn note_accepted(&self) {
        self.refused.store(0, Ordering::Relaxed);
    }

    /// Whether the database refuses all rows, for all that is known.
    pub(super) fn are_all_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed) >= ENOUGH
    }

    /// Holds a result that was refused alone.
    pub(super) fn add_refused(&self, mut settlement: Settlement) {
        if settlement.refusals == 0 {
            // A few rows, refused again and again, say nothing of the others.
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        let pause = PAUSE_MIN * (1 << settlement.refusals.min(10));
        settlement.refusals = settlement.refusals.saturating_add(1);
        let mut results = self.lock();
        if results.len() < ROOMLESS && !self.are_all_refused() {
            settlement.current = None;
        }
        results.push(Due {
            at: Instant::now() + pause.min(PAUSE_MAX),
            settlement,
        });
        drop(results);
        self.added.notify_one();
    }

    /// Holds results that were refused together, while all are.
    pub(super) fn add_all(&self, settlements: Vec<Settlement>) {
        let at = Instant::now() + PAUSE_UNTRIED;
        let due = settlements
            .into_iter()
            .map(|settlement| Due { at, settlement });
        self.lock().extend(due);
        self.added.notify_one();
    }

    pub(super) fn clear(&self) {
        let cleared = std::mem::take(&mut *self.lock());
        // Outside of the lock: the last result may own what others wait for.
        drop(cleared);
    }

    /// Waits for results that are to be written again, and takes as many as one statement takes:
    /// those first that were refused least, so that a few bad ones don't keep the others.
    pub(super) async fn due(&self) -> Vec<Settlement> {
        loop {
            let added = self.added.notified();
            let due = self.take_due();
            if !due.is_empty() {
                return due;
            }
            let first = self.lock().iter().map(|due| due.at).min();
            let timer = async {
                match first {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = added => {}
                () = timer => {}
            }
        }
    }

    fn take_due(&self) -> Vec<Settlement> {
        let now = Instant::now();
        let mut results = self.lock();
        results.sort_by_key(|due| (due.at > now, due.settlement.refusals));
        let mut bytes = 0;
        let taken = results
            .iter()
            .take(MAX_ROWS)
            .take_while(|due| {
                let first = bytes == 0;
                bytes += due.settlement.unsettled.bytes();
                due.at <= now && (first || bytes <= MAX_BYTES)
            })
            .count();
        let taken = results.drain(..taken);
        taken.map(|due| due.settlement).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Due>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
