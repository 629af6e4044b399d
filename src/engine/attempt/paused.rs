//! Which channels are paused, as this process knows it.
//!
//! The database has the truth, and polls obey it by themselves. This copy, which is read anew each
//! second, is for attempts that no poll comes before: first attempts of new requests, held retries,
//! and requests that were claimed just before the pause.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
pub(crate) struct PausedChannels {
    /// Whether there are any. While there are none, an attempt costs one look at this.
    any: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    names: HashSet<String>,
    /// When this process paused or resumed a channel itself. What was read earlier is out of date.
    changed: Option<Instant>,
}

impl PausedChannels {
    pub(crate) fn contains(&self, channel: &str) -> bool {
        self.any.load(Ordering::Acquire) && self.lock().names.contains(channel)
    }

    /// Takes over what the database said to a statement that began then.
    pub(crate) fn learn(&self, began: Instant, names: Vec<String>) {
        let mut inner = self.lock();
        if inner.changed.is_none_or(|changed| changed < began) {
            inner.names = names.into_iter().collect();
            self.note(&inner);
        }
    }

    /// Notes a change that this process has made.
    pub(crate) fn set(&self, channel: &str, paused: bool) {
        let mut inner = self.lock();
        if paused {
            inner.names.insert(channel.to_owned());
        } else {
            inner.names.remove(channel);
        }
        inner.changed = Some(Instant::now());
        self.note(&inner);
    }

    fn note(&self, inner: &Inner) {
        self.any.store(!inner.names.is_empty(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_this_process_is_not_undone_by_what_was_read_before_it() {
        let paused = PausedChannels::default();
        let before = Instant::now();
        paused.set("a", true);
        paused.learn(before, Vec::new());
        assert!(paused.contains("a") && !paused.contains("b"));
        paused.learn(Instant::now(), vec!["b".to_owned()]);
        assert!(!paused.contains("a") && paused.contains("b"));
        paused.set("b", false);
        assert!(!paused.contains("b"));
    }
}
