//! How many attempts each destination may have in this process.
//!
//! One destination takes at most half of the slots. Destinations that answer slowly, or that have
//! not answered yet, share one half of all slots among them, so that attempts that hang leave room
//! for those that don't. Each of them may take three times as many slots of that half as are left
//! free: one alone gets three quarters of it, and many get equal parts.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::store::runner_pool::Room;

/// A destination whose attempts take longer than this is slow.
const SLOW: Duration = Duration::from_millis(250);
/// How much one attempt's duration counts in the average.
const WEIGHT: f64 = 0.2;
/// How many times the free slots of the slow half one slow destination may take.
const GREED: usize = 3;
/// The fraction of all slots from which every slow destination may take its first one.
const FIRST_SHARE: f64 = 0.75;
/// How long a destination is remembered after its last attempt.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How many idle destinations are remembered.
const MAX_IDLE: usize = 10_000;
/// How many requests beyond its free passes a poll may bring for a fast destination.
const AHEAD: usize = 64;

/// The passes of all destinations.
#[derive(Debug)]
pub(crate) struct Gate {
    slots: usize,
    /// The most passes that one destination has.
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    destinations: HashMap<Arc<str>, Destination>,
    /// Passes of destinations that are not known to be fast.
    slow_passes: usize,
    /// When the idle destinations were last looked for.
    swept: Option<Instant>,
}

/// What this process knows of a destination.
#[derive(Debug)]
struct Destination {
    /// Attempts under way, and those that wait for their slot.
    passes: usize,
    /// Attempts that have a slot.
    sending: usize,
    /// When the last attempt ended, or the first of those under way began.
    moved: Instant,
    /// The average duration of attempts in seconds, if any has ended.
    average: Option<f64>,
    /// Whether its passes count among the slow ones.
    counted_slow: bool,
    /// When deferred requests of it were last known to exist.
    deferred: Option<Instant>,
    /// Told when a pass is free.
    freed: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Fast,
    /// No attempt has ended yet.
    Unknown,
    Slow,
}

/// A destination takes no more attempts of this process now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// It won't for a while, so the request is deferred and doesn't wait here.
    pub(crate) lasting: bool,
}

/// The permit for one attempt at a destination.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    name: Arc<str>,
    began: Option<Instant>,
}

impl Pass {
    /// The attempt has its slot.
    pub(crate) fn begin(&mut self) {
        let now = Instant::now();
        self.began = Some(now);
        self.gate.begin(&self.name, now);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave(&self.name, self.began, Instant::now());
    }
}

impl Destination {
    fn new(now: Instant) -> Self {
        Self {
            passes: 0,
            sending: 0,
            moved: now,
            average: None,
            counted_slow: true,
            deferred: None,
            freed: Arc::default(),
        }
    }

    fn pace(&self, now: Instant) -> Pace {
        let stalled = self.sending > 0 && now.saturating_duration_since(self.moved) > SLOW;
        match self.average {
            _ if stalled => Pace::Slow,
            Some(average) if average > SLOW.as_secs_f64() => Pace::Slow,
            Some(_) => Pace::Fast,
            None => Pace::Unknown,
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        self.passes == 0
            && now.saturating_duration_since(self.moved) > REMEMBERED
            && self
                .deferred
                .is_none_or(|seen| now.saturating_duration_since(seen) > REMEMBERED)
    }
}

impl Inner {
    /// Counts the destination's passes among the slow ones, or no longer.
    fn recount(&mut self, name: &str, now: Instant) -> Option<Pace> {
        let destination = self.destinations.get_mut(name)?;
        let pace = destination.pace(now);
        let slow = pace != Pace::Fast;
        if slow != destination.counted_slow {
            destination.counted_slow = slow;
            if slow {
                self.slow_passes += destination.passes;
            } else {
                self.slow_passes -= destination.passes;
            }
        }
        Some(pace)
    }

    fn forget_idle(&mut self, now: Instant) {
        self.destinations
            .retain(|_, destination| !destination.is_idle(now));
        if self.destinations.len() > MAX_IDLE {
            self.destinations
                .retain(|_, destination| destination.passes > 0 || destination.deferred.is_some());
        }
        self.swept = Some(now);
    }
}

impl Gate {
    pub(crate) fn new(slots: usize, share: f64) -> Arc<Self> {
        Arc::new(Self {
            slots,
            most: ((slots as f64 * share) as usize).clamp(1, slots),
            inner: Mutex::default(),
        })
    }

    /// A pass, if the destination has one free.
    pub(super) fn try_enter(self: &Arc<Self>, name: &str) -> Result<Pass, Full> {
        self.try_enter_at(name, Instant::now())
    }

    fn try_enter_at(self: &Arc<Self>, name: &str, now: Instant) -> Result<Pass, Full> {
        let mut inner = self.lock();
        let due = inner
            .swept
            .is_none_or(|swept| now.saturating_duration_since(swept) > REMEMBERED);
        if due || inner.destinations.len() > 2 * MAX_IDLE {
            inner.forget_idle(now);
        }
        let name = match inner.destinations.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None => {
                let name: Arc<str> = name.into();
                let destination = Destination::new(now);
                inner.destinations.insert(Arc::clone(&name), destination);
                name
            }
        };
        let pace = inner.recount(&name, now).unwrap_or(Pace::Unknown);
        let free = self.free(&inner, &name, pace);
        let inner = &mut *inner;
        let Some(destination) = inner.destinations.get_mut(&*name) else {
            return Err(Full { lasting: false });
        };
        if free == 0 {
            return Err(Full {
                lasting: pace == Pace::Slow,
            });
        }
        destination.passes += 1;
        if destination.counted_slow {
            inner.slow_passes += 1;
        }
        Ok(Pass {
            gate: Arc::clone(self),
            name,
            began: None,
        })
    }

    /// Waits for a pass of a destination that will have one soon.
    pub(super) async fn enter(self: &Arc<Self>, name: &str) -> Result<Pass, Full> {
        loop {
            let freed = {
                let inner = self.lock();
                inner
                    .destinations
                    .get(name)
                    .map(|destination| Arc::clone(&destination.freed))
            };
            // Before the look, so that no pass that is freed after it is missed.
            let freed = freed.as_ref().map(|freed| freed.notified());
            match self.try_enter(name) {
                Err(full) if !full.lasting => {
                    // Looks again after a while: the destination may have become slow.
                    let _ = match freed {
                        Some(freed) => tokio::time::timeout(SLOW, freed).await.is_ok(),
                        None => continue,
                    };
                }
                entered => return entered,
            }
        }
    }

    /// How many passes the destination may still take.
    fn free(&self, inner: &Inner, name: &str, pace: Pace) -> usize {
        let Some(destination) = inner.destinations.get(name) else {
            return 0;
        };
        let own = self.most.saturating_sub(destination.passes);
        if pace == Pace::Fast {
            return own;
        }
        let half = self.slots.div_ceil(2);
        let unused = half.saturating_sub(inner.slow_passes);
        let fair = (GREED * unused).saturating_sub(destination.passes);
        let first_limit = ((self.slots as f64 * FIRST_SHARE) as usize).max(1);
        let first = destination.passes == 0 && inner.slow_passes < first_limit;
        own.min(unused).min(fair).max(usize::from(first))
    }

    fn begin(&self, name: &str, now: Instant) {
        if let Some(destination) = self.lock().destinations.get_mut(name) {
            if destination.sending == 0 {
                destination.moved = now;
            }
            destination.sending += 1;
        }
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
            destination.sending -= 1;
            destination.moved = now;
            let took = now.saturating_duration_since(began).as_secs_f64();
            destination.average = Some(match destination.average {
                Some(average) => average + WEIGHT * (took - average),
                None => took,
            });
        }
        let freed = Arc::clone(&destination.freed);
        let pace = inner.recount(name, now);
        // A destination that turns out to be fast has many passes at once.
        if pace == Some(Pace::Fast) && began.is_some() {
            freed.notify_waiters();
        }
        freed.notify_one();
    }

    /// Notes that deferred requests of a destination exist. Returns whether that is news.
    pub(crate) fn note_deferred(&self, name: &str) -> bool {
        let now = Instant::now();
        let mut inner = self.lock();
        if let Some(destination) = inner.destinations.get_mut(name) {
            return destination.deferred.replace(now).is_none();
        }
        let destination = Destination {
            deferred: Some(now),
            ..Destination::new(now)
        };
        inner.destinations.insert(name.into(), destination);
        true
    }

    /// What a poll is told: the room of each destination that has deferred requests or takes no
    /// more now, as a JSON object, and whether some will have room soon.
    pub(crate) fn room(&self) -> Room {
        let now = Instant::now();
        let mut inner = self.lock();
        let names: Vec<Arc<str>> = inner.destinations.keys().cloned().collect();
        let mut room = Room::default();
        for name in names {
            let Some(pace) = inner.recount(&name, now) else {
                continue;
            };
            let free = self.free(&inner, &name, pace);
            let Some(destination) = inner.destinations.get_mut(&*name) else {
                continue;
            };
            if destination
                .deferred
                .is_some_and(|seen| now.saturating_duration_since(seen) > REMEMBERED)
            {
                destination.deferred = None;
            }
            let is_full = free == 0 && pace == Pace::Slow;
            if is_full {
                // The poll defers what it meets.
                destination.deferred = Some(now);
            }
            if destination.deferred.is_none() && !is_full {
                continue;
            }
            // Those of a fast destination may wait here for the next pass.
            let ahead = if pace == Pace::Fast { AHEAD } else { 0 };
            room.soon |= destination.deferred.is_some() && destination.passes > 0;
            add(&mut room, &name, free + ahead);
        }
        room
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds a destination to what a poll is told.
fn add(room: &mut Room, name: &str, free: usize) {
    if room.json.is_empty() {
        room.json.push('{');
    } else {
        room.json.pop();
        room.json.push(',');
    }
    let name = serde_json::Value::from(name);
    let _ = write!(room.json, "{name}:{free}}}");
}
