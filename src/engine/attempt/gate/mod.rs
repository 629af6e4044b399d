//! How many attempts each destination may have now.
//!
//! In this process, one destination takes at most a share of the slots while there is work for
//! others. Destinations that answer slowly, or that have not answered yet, have that share among
//! them, so that attempts that hang leave room for attempts that don't. Each of them may take three
//! times as many slots of the share as are left free: one alone gets three quarters of it, and many
//! get equal parts. Without work for others, one destination takes all slots but a few, which are
//! for the first requests to others.
//!
//! A destination of which most attempts fail is asked at a bounded rate until it answers: 100 times
//! a second, and 50 times if all of them fail.
//!
//! What the processes have in common (limits, pauses, breakers) is in the database. A task copies
//! it from there to here, and what attempts have shown from here to there. So an attempt asks only
//! this memory.

mod destination;
mod exchange;
mod leased;
mod pace;
mod reports;
mod room;
mod share;
#[cfg(test)]
mod tests;
mod waiting;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::destination::{Destination, REMEMBERED};
use self::leased::Lack;
use self::pace::Pace;
pub(crate) use self::reports::{Blame, Seen};
use crate::destination::{DestinationPolicy, Policies};
use crate::engine::config::Config;

/// How many idle destinations are remembered.
const MAX_IDLE: usize = 10_000;
/// The longest delay of a retry for which there is no budget.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(600);

/// How long the first attempts wait for what the database knows of destinations.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// The settings of a gate.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) slots: usize,
    /// The share of the slots that one destination takes at most.
    pub(crate) share: f64,
    pub(crate) policies: Policies,
    /// The policy of destinations that no pattern matches.
    pub(crate) policy: DestinationPolicy,
    /// For how long permits are leased.
    pub(crate) lease: Duration,
}

impl Rules {
    pub(crate) fn of(config: &Config, lease: Duration) -> Self {
        Self {
            slots: config.concurrency,
            share: config.max_share,
            policies: config.policies.clone(),
            policy: config.destination_policy.clone(),
            lease,
        }
    }
}

/// The passes of all destinations.
#[derive(Debug)]
pub(crate) struct Gate {
    rules: Rules,
    /// The most passes that one destination has, and that all slow ones have together.
    most: usize,
    /// The most passes that one destination has while there is work for no other.
    most_alone: usize,
    default_policy: Arc<DestinationPolicy>,
    inner: Mutex<Inner>,
    /// Notified when permits or tokens are wanted.
    pub(crate) wanting: Notify,
    /// Notified when other processes should know soon what an attempt has shown.
    pub(crate) urgent: Notify,
    /// Whether the task has looked at what the database knows, and notified when it has.
    looked: AtomicBool,
    first_look: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    destinations: HashMap<Arc<str>, Destination>,
    /// Passes of destinations that are not known to be fast.
    slow_passes: usize,
    /// When the idle destinations were last looked for.
    swept: Option<Instant>,
    /// Whether anything was sent or polled for.
    used: bool,
    /// Whether the engine shuts down.
    closed: bool,
    /// Whether the next poll comes soon, because of what the last one was told.
    polls_soon: bool,
    /// The destination that was asked for last, and when the last one before it was another.
    last: Option<Arc<str>>,
    switched: Option<Instant>,
}

/// Which attempt of its request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    First,
    Retry,
}

/// A destination takes no more attempts of this process now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// A pass will soon be free, so the request waits here.
    Soon,
    /// As `Soon`, once the database has answered or another attempt has ended.
    Short,
    /// No pass will be free for a while, so the request is deferred.
    Lasting,
    /// There is no budget for a retry. The retry is made after this delay.
    Later(Duration),
}

/// The permit for one attempt at a destination.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    name: Arc<str>,
    began: Option<Instant>,
    /// Whether a half-open breaker let the attempt pass. An attempt that began before says nothing
    /// of the destination as it is now.
    is_probe: bool,
    /// Whether this process didn't know yet what others know of the destination.
    is_early: bool,
}

impl Pass {
    /// The attempt has its slot.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        self.began = Some(now);
        if let Some(destination) = self.gate.lock().destinations.get_mut(&*self.name) {
            destination.pace.begin(now);
        }
    }

    pub(super) fn is_early(&self) -> bool {
        self.is_early
    }

    /// Notes what the attempt has shown.
    pub(super) fn note(&self, seen: Seen) {
        self.gate.note(&self.name, self.is_probe, seen);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave(&self.name, self.began, Instant::now());
    }
}

impl Inner {
    /// Whether there has been work for one destination only.
    fn is_alone(&self, now: Instant) -> bool {
        self.switched
            .is_none_or(|at| now.saturating_duration_since(at) > REMEMBERED)
    }

    /// Counts the destination's passes as slow or as fast, by its present pace.
    fn recount(&mut self, name: &str, now: Instant) -> Pace {
        let Some(destination) = self.destinations.get_mut(name) else {
            return Pace::Unknown;
        };
        let pace = destination.pace.pace(now);
        let slow = pace != Pace::Fast;
        if slow != destination.counted_slow {
            destination.counted_slow = slow;
            if slow {
                self.slow_passes += destination.passes;
            } else {
                self.slow_passes -= destination.passes;
            }
        }
        pace
    }

    fn forget_idle(&mut self, now: Instant) {
        self.destinations
            .retain(|_, destination| !destination.is_idle(now));
        if self.destinations.len() > MAX_IDLE {
            self.destinations.retain(|_, destination| {
                destination.passes > 0
                    || destination.waiting > 0
                    || destination.has_stored_policy
                    || destination.deferred.is_some()
                    || destination.shared.is_some()
                    || !destination.report.is_empty()
            });
        }
        self.swept = Some(now);
    }
}

impl Gate {
    pub(crate) fn new(rules: Rules) -> Arc<Self> {
        Arc::new(Self {
            most: share::of_one(&rules),
            most_alone: share::of_one_alone(&rules),
            default_policy: Arc::new(rules.policy.clone()),
            rules,
            inner: Mutex::default(),
            wanting: Notify::new(),
            urgent: Notify::new(),
            looked: AtomicBool::new(false),
            first_look: Notify::new(),
        })
    }

    /// At the first use, the task learns at once what other processes know.
    fn note_use(&self, inner: &mut Inner) {
        if !std::mem::replace(&mut inner.used, true) {
            self.urgent.notify_one();
        }
    }

    /// Whether it is known here what other processes know, if the database could tell.
    pub(crate) fn has_looked(&self) -> bool {
        self.looked.load(Ordering::Acquire)
    }

    pub(crate) fn note_look(&self) {
        if !self.looked.swap(true, Ordering::AcqRel) {
            self.first_look.notify_waiters();
        }
    }

    /// Waits for that before the first attempts of this process: their destinations may be paused,
    /// or limited at run time.
    pub(crate) async fn looks(&self) {
        self.note_use(&mut self.lock());
        let first_look = self.first_look.notified();
        if !self.has_looked() {
            let _ = tokio::time::timeout(LOOK_TIMEOUT, first_look).await;
        }
    }

    fn policy_of(&self, name: &str) -> Arc<DestinationPolicy> {
        match self.rules.policies.of(name) {
            Some(policy) => Arc::new(policy.clone()),
            None => Arc::clone(&self.default_policy),
        }
    }

    /// The shared copy of the name. Adds a destination that is new.
    fn name_of(&self, inner: &mut Inner, name: &str, now: Instant) -> Arc<str> {
        if let Some((name, _)) = inner.destinations.get_key_value(name) {
            return Arc::clone(name);
        }
        let new: Arc<str> = name.into();
        let destination = Destination::new(self.policy_of(name), now);
        inner.destinations.insert(Arc::clone(&new), destination);
        new
    }

    /// What is known of a destination, nothing at first.
    fn entry<'a>(&self, inner: &'a mut Inner, name: &str, now: Instant) -> &'a mut Destination {
        let destination = || Destination::new(self.policy_of(name), now);
        let entry = inner.destinations.entry(name.into());
        entry.or_insert_with(destination)
    }

    /// Takes a pass if the destination has one free.
    pub(super) fn try_enter(self: &Arc<Self>, name: &str, turn: Turn) -> Result<Pass, Full> {
        self.try_enter_at(name, turn, Instant::now())
    }

    fn try_enter_at(self: &Arc<Self>, name: &str, turn: Turn, now: Instant) -> Result<Pass, Full> {
        let mut inner = self.lock();
        self.note_use(&mut inner);
        let due = inner
            .swept
            .is_none_or(|swept| now.saturating_duration_since(swept) > REMEMBERED);
        if due || inner.destinations.len() > 2 * MAX_IDLE {
            inner.forget_idle(now);
        }
        let name = self.name_of(&mut inner, name, now);
        let pace = inner.recount(&name, now);
        if inner.last.as_ref() != Some(&name) && inner.last.replace(Arc::clone(&name)).is_some() {
            inner.switched = Some(now);
        }
        let free = self.free_slots(&inner, &name, pace, now);
        let inner = &mut *inner;
        let Some(destination) = inner.destinations.get_mut(&*name) else {
            return Err(Full::Soon);
        };
        if destination.is_closed(now) {
            return Err(Full::Lasting);
        }
        if free == 0 {
            // With no pass at all, it waits for others that are slow.
            let is_lasting = pace == Pace::Slow || pace == Pace::Unknown && destination.passes == 0;
            return Err(if is_lasting {
                Full::Lasting
            } else {
                Full::Soon
            });
        }
        if destination.failing.free(now) == 0 {
            return Err(Full::Lasting);
        }
        let limits = destination.limits(now);
        if !limits.is_none() {
            let passes = destination.passes as u32;
            let lack = destination.leased.lacks(limits, passes, now);
            if lack != Lack::Nothing {
                if destination.leased.is_wanted() {
                    self.wanting.notify_one();
                }
                return Err(match lack {
                    // Where attempts are short, the wait is short too.
                    Lack::Some
                        if pace == Pace::Slow
                            || destination.is_half_open(now)
                            || destination.leased.is_far(now) =>
                    {
                        Full::Lasting
                    }
                    _ => Full::Short,
                });
            }
        }
        if let Some(meter) = &mut destination.retries {
            match turn {
                Turn::First => meter.note_first(now),
                Turn::Retry if meter.try_retry(now) => {}
                Turn::Retry => {
                    let per_second = destination
                        .policy
                        .retry_budget
                        .as_ref()
                        .map_or(1, |budget| budget.per_second.max(1));
                    let next = destination.next_retry.map_or(now, |next| next.max(now))
                        + Duration::from_secs(1) / per_second;
                    destination.next_retry = Some(next.min(now + MAX_RETRY_DELAY));
                    return Err(Full::Later(next - now));
                }
            }
        }
        let is_probe = destination.is_half_open(now);
        destination.failing.spend(now);
        destination.leased.spend(limits);
        if destination.leased.is_wanted() {
            self.wanting.notify_one();
        }
        destination.passes += 1;
        if destination.counted_slow {
            inner.slow_passes += 1;
        }
        Ok(Pass {
            gate: Arc::clone(self),
            name,
            began: None,
            is_probe,
            is_early: !self.has_looked(),
        })
    }

    fn leave(&self, name: &str, began: Option<Instant>, now: Instant) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Some(destination) = inner.destinations.get_mut(name) else {
            return;
        };
        destination.passes -= 1;
        if destination.counted_slow {
            inner.slow_passes -= 1;
        }
        if let Some(began) = began {
            let took = now.saturating_duration_since(began);
            destination.pace.end(took, now);
        } else {
            let limits = destination.limits(now);
            destination.leased.give_back(limits);
        }
        let freed = Arc::clone(&destination.freed);
        let pace = inner.recount(name, now);
        // A destination that turns out to be fast suddenly has many free passes.
        if pace == Pace::Fast && began.is_some() {
            freed.notify_waiters();
        }
        freed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
