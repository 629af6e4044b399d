//! How the engine logs.
//!
//! Every event is a fixed sentence with fields. The levels are:
//!
//! - `error`: a fault of this crate, or stored data that can't be used.
//! - `warn`: an operator should look. A condition that lasts is logged once when it begins, not for
//!   each retry. A request that is given up is logged once. Where one condition may concern many
//!   requests, a [`LineLimit`] bounds their lines, and the rest are `debug`.
//! - `info`: starts and stops, and the end of a condition.
//! - `debug`: failed attempts, failed operations of the store, retries.
//!
//! No event has a header value, or the credentials, path or query of a URL.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::id::RequestId;

/// A condition that lasts, such as an unreachable database. Several tasks may meet it at once.
#[derive(Debug, Default)]
pub(crate) struct Condition {
    holders: AtomicUsize,
}

/// One task's share of a [`Condition`].
#[derive(Debug)]
pub(crate) struct Lasting<'a>(&'a Condition);

impl Condition {
    /// Notes that the condition holds for one more task. `true` if it holds for no other.
    pub(crate) fn begins(&self) -> (Lasting<'_>, bool) {
        let first = self.holders.fetch_add(1, Ordering::Relaxed) == 0;
        (Lasting(self), first)
    }
}

impl Lasting<'_> {
    /// Notes that the condition is over for this task. `true` if it is over for all.
    pub(crate) fn ends(self) -> bool {
        let last = self.0.holders.fetch_sub(1, Ordering::Relaxed) == 1;
        std::mem::forget(self);
        last
    }
}

impl Drop for Lasting<'_> {
    fn drop(&mut self) {
        self.0.holders.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A condition that only one task meets.
#[derive(Debug, Default)]
pub(crate) struct OwnCondition {
    lasts: bool,
}

impl OwnCondition {
    /// Notes that the condition holds. `true` if it has just begun.
    pub(crate) fn begins(&mut self) -> bool {
        !std::mem::replace(&mut self.lasts, true)
    }

    /// Notes that the condition is over. `true` if it held until now.
    pub(crate) fn ends(&mut self) -> bool {
        std::mem::take(&mut self.lasts)
    }
}

/// How many lines of one topic are logged in a [`WINDOW`], and how many of all topics.
const LINES: u32 = 10;
const ALL_LINES: u32 = 100;
const WINDOW: Duration = Duration::from_secs(60);

/// Bounds lines of one sentence that may come for many requests at once: those to a receiver that
/// is down, or those that a handler refuses. The lines of a topic, such as a destination, don't
/// keep those of another one out.
#[derive(Debug, Default)]
pub(crate) struct LineLimit {
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    topics: HashMap<Box<str>, u32>,
    lines: u32,
    left_out: u64,
}

impl LineLimit {
    /// Whether a line may be logged, and how many lines were left out since the last one.
    pub(crate) fn allows(&self, topic: &str) -> Option<u64> {
        self.allows_at(topic, Instant::now())
    }

    fn allows_at(&self, topic: &str, now: Instant) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |began| now.saturating_duration_since(began) >= WINDOW;
        if window.began.is_none_or(is_over) {
            *window = Window {
                began: Some(now),
                left_out: window.left_out,
                ..Window::default()
            };
        }
        let of_topic = window.topics.get(topic).copied().unwrap_or(0);
        if of_topic >= LINES || window.lines >= ALL_LINES {
            window.left_out += 1;
            return None;
        }
        window.topics.insert(topic.into(), of_topic + 1);
        window.lines += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

/// How many failing requests are remembered.
const MAX_FAILING: usize = 1000;

/// The requests for which something fails again and again. Only the first failure of each is worth
/// a warning, and only so many of them.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    failing: Mutex<HashSet<RequestId>>,
    lines: LineLimit,
}

impl Failures {
    /// Notes a failure. `true` if it should be logged: it is the first one of its request, and few
    /// others were logged lately.
    pub(crate) fn is_news(&self, id: RequestId) -> bool {
        self.is_first(id) && self.lines.allows("").is_some()
    }

    fn is_first(&self, id: RequestId) -> bool {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if failing.len() >= MAX_FAILING {
            failing.clear();
        }
        failing.insert(id)
    }

    /// Notes that it fails no more.
    pub(crate) fn recovers(&self, id: RequestId) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_begins_with_the_first_task_and_ends_with_the_last() {
        let condition = Condition::default();
        let (one, first) = condition.begins();
        assert!(first);
        let (two, first) = condition.begins();
        assert!(!first);
        let (three, _) = condition.begins();
        drop(three);
        assert!(!one.ends());
        assert!(two.ends());
        assert!(condition.begins().1);
    }

    #[test]
    fn a_condition_of_one_task_begins_and_ends_once() {
        let mut condition = OwnCondition::default();
        assert!(!condition.ends());
        assert!(condition.begins());
        assert!(!condition.begins());
        assert!(condition.ends());
        assert!(!condition.ends());
    }

    #[test]
    fn lines_are_bounded_for_each_topic_and_in_all() {
        let (limit, now) = (LineLimit::default(), Instant::now());
        let lines = |topic: &str, now| {
            let allowed = (0..200).filter(|_| limit.allows_at(topic, now).is_some());
            allowed.count()
        };
        assert_eq!(lines("a", now), 10);
        assert_eq!(lines("b", now), 10);
        assert_eq!(limit.allows_at("c", now), Some(190));
        let topics = 0..200;
        let all: usize = topics.map(|topic| lines(&topic.to_string(), now)).sum();
        assert_eq!(all, 79);
        assert_eq!(lines("a", now + WINDOW), 10);
    }

    #[test]
    fn only_the_first_failure_of_a_request_is_news() {
        let failures = Failures::default();
        let (one, other) = (RequestId::generate(), RequestId::generate());
        assert!(failures.is_first(one));
        assert!(failures.is_first(other));
        assert!(!failures.is_first(one));
        failures.recovers(one);
        assert!(failures.is_first(one));
    }
}
