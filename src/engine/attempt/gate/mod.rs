//! How many attempts each destination may have now.
//!
//! In this process, one destination takes at most a share of the slots while there is work for
//! others. Destinations that answer slowly, or that have not answered yet, have that share among
//! them, so that attempts that hang leave room for attempts that don't. Each of them may take three
//! times as many slots of the share as are left free: one alone gets three quarters of it, and many
//! get equal parts. Without work for others, one destination takes all slots but a few, which are
//! for the first requests to others.
//!
//! A destination of which most attempts fail is asked at most 100 times a second, until it answers.
//!
//! What the processes have in common (limits, pauses, breakers) is in the database. A task copies
//! it from there to here, and what attempts have shown from here to there. So an attempt asks only
//! this memory.

mod leased;
mod pace;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use tokio::sync::Notify;

use self::leased::{Lack, Leased, Limits};
use self::pace::{Failing, Pace, Paced, SLOW};
use crate::destination::{DestinationPolicy, Millis, Policies, Report, RetryMeter, State, millis};
use crate::engine::config::Config;
use crate::store::destinations::{Grant, LeaseRequest, StoredDestination};
use crate::store::runner_pool::Room;

/// The part of the slots that is kept for others while there is work for one destination only: one
/// in eight.
const RESERVE: usize = 8;
/// How many times the free slots of the slow share one slow destination may take.
const GREED: usize = 3;
/// While slow destinations have less than this fraction of all slots, each may take a first one.
const FIRST_SHARE: f64 = 0.75;
/// The part of the slots that first requests to destinations that have not answered yet leave
/// free: one in 32.
const KNOWN_RESERVE: usize = 32;
/// How long a destination is remembered after its last attempt.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How many idle destinations are remembered.
const MAX_IDLE: usize = 10_000;
/// How many requests beyond its free passes a poll may bring for a fast destination.
const AHEAD: usize = 64;
/// How long a destination stays closed here after an attempt has shown that it is to be, until the
/// database says so.
const UNTIL_KNOWN: Duration = Duration::from_secs(2);
/// The longest delay of a retry for which there is no budget.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(600);

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
    /// The destination that was asked for last, and when the last one before it was another.
    last: Option<Arc<str>>,
    switched: Option<Instant>,
}

/// What this process knows of a destination.
#[derive(Debug)]
struct Destination {
    policy: Arc<DestinationPolicy>,
    /// Attempts under way, and attempts that wait for their slot.
    passes: usize,
    pace: Paced,
    failing: Failing,
    /// Whether its passes count among the slow ones.
    counted_slow: bool,
    /// When deferred requests of it were last known to exist.
    deferred: Option<Instant>,
    /// Notified when a pass is free.
    freed: Arc<Notify>,
    leased: Leased,
    retries: Option<RetryMeter>,
    /// When the last of the retries without a budget is due.
    next_retry: Option<Instant>,
    /// The end of a pause that other processes may not know of yet.
    throttled: Option<Instant>,
    /// The state in the database, if there is any.
    shared: Option<Shared>,
    report: Report,
}

/// The state of a destination in the database.
#[derive(Clone, Debug)]
struct Shared {
    state: State,
    /// The database's time at an instant of this process.
    clock: (Instant, Millis),
    /// Whether the destination was closed when this process last looked.
    was_closed: bool,
}

impl Shared {
    fn now(&self, now: Instant) -> Millis {
        let (at, time) = self.clock;
        time.saturating_add(millis(now.saturating_duration_since(at)))
    }

    fn is_closed(&self, now: Instant) -> bool {
        self.state.closed_until(self.now(now)).is_some()
    }
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

/// What the answer to an attempt, or its failure, says of the destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) turn: Turn,
    pub(crate) status: Option<StatusCode>,
    /// The pause that the answer asked for.
    pub(crate) retry_after: Option<Duration>,
    pub(crate) fault: Blame,
    /// Whether the request is to be sent again.
    pub(crate) is_repeated: bool,
}

/// What an attempt says of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blame {
    Success,
    Destination,
    /// The fault is a proxy's or this side's.
    Other,
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
        if let Some(destination) = self.gate.lock().destinations.get_mut(&*self.name) {
            destination.pace.begin(now);
        }
    }

    /// Notes what the attempt has shown.
    pub(super) fn note(&self, seen: Seen) {
        self.gate.note(&self.name, seen);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.leave(&self.name, self.began, Instant::now());
    }
}

impl Destination {
    fn new(policy: Arc<DestinationPolicy>, now: Instant) -> Self {
        let mut new = Self {
            policy: Arc::clone(&policy),
            passes: 0,
            pace: Paced::new(now),
            failing: Failing::default(),
            counted_slow: true,
            deferred: None,
            freed: Arc::default(),
            leased: Leased::default(),
            retries: None,
            next_retry: None,
            throttled: None,
            shared: None,
            report: Report::default(),
        };
        new.set_policy(policy);
        new
    }

    fn set_policy(&mut self, policy: Arc<DestinationPolicy>) {
        match (&mut self.retries, &policy.retry_budget) {
            (Some(meter), Some(budget)) => meter.set_budget(budget.clone()),
            (meter, budget) => *meter = budget.clone().map(RetryMeter::new),
        }
        self.policy = policy;
    }

    fn is_closed(&self, now: Instant) -> bool {
        self.throttled.is_some_and(|until| now < until)
            || self.shared.as_ref().is_some_and(|it| it.is_closed(now))
    }

    fn limits(&self, now: Instant) -> Limits {
        let probes = self.is_half_open(now).then(|| State::probes(&self.policy));
        Limits::of(&self.policy, probes)
    }

    fn is_half_open(&self, now: Instant) -> bool {
        self.shared
            .as_ref()
            .is_some_and(|shared| shared.state.is_half_open(shared.now(now)))
    }

    fn is_idle(&self, now: Instant) -> bool {
        self.passes == 0
            && self.pace.quiet(now) > REMEMBERED
            && self
                .deferred
                .is_none_or(|seen| now.saturating_duration_since(seen) > REMEMBERED)
            && self.shared.is_none()
            && self.report.is_empty()
    }

    /// Whether the report matters to other processes.
    fn is_to_be_reported(&self) -> bool {
        let report = &self.report;
        !report.is_empty()
            && (self.shared.is_some()
                || report.retry_after.is_some()
                || report.gone
                || report.failures > 0 && self.policy.watches_failures())
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
            most: part_of(rules.slots, rules.share).clamp(1, rules.slots),
            most_alone: if rules.share < 1.0 {
                rules.slots
                    - if rules.slots < 4 {
                        0
                    } else {
                        rules.slots.div_ceil(RESERVE)
                    }
            } else {
                rules.slots
            },
            default_policy: Arc::new(rules.policy.clone()),
            rules,
            inner: Mutex::default(),
            wanting: Notify::new(),
            urgent: Notify::new(),
        })
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
        inner.used = true;
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
            return Err(if pace == Pace::Slow {
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
                self.wanting.notify_one();
                return Err(match lack {
                    // Where attempts are short, the wait is short too.
                    Lack::Some if pace == Pace::Slow || destination.is_half_open(now) => {
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
        })
    }

    /// Waits for a pass of a destination that will have one soon.
    pub(super) async fn enter(self: &Arc<Self>, name: &str, turn: Turn) -> Result<Pass, Full> {
        let began = Instant::now();
        loop {
            let freed = Arc::clone(&self.entry(&mut self.lock(), name, began).freed);
            // Created before the attempt to enter: no pass that is freed after it is missed.
            let freed = freed.notified();
            match self.try_enter(name, turn) {
                Err(Full::Soon | Full::Short) => {
                    // Looks again after a while: the destination may have become slow.
                    let _ = tokio::time::timeout(SLOW, freed).await;
                    // The request gives way to requests that this process could send.
                    if began.elapsed() > REMEMBERED {
                        return Err(Full::Lasting);
                    }
                }
                entered => return entered,
            }
        }
    }

    /// How many slots the destination may still take.
    fn free_slots(&self, inner: &Inner, name: &str, pace: Pace, now: Instant) -> usize {
        let Some(destination) = inner.destinations.get(name) else {
            return 0;
        };
        let per_process = destination.policy.max_concurrency_per_process;
        let alone = inner.is_alone(now);
        let most = if alone { self.most_alone } else { self.most };
        let most = per_process.map_or(most, |limit| most.min(limit as usize));
        let own = most.saturating_sub(destination.passes);
        if alone || pace == Pace::Fast {
            return own;
        }
        let unused = self.most.saturating_sub(inner.slow_passes);
        let fair = (GREED * unused).saturating_sub(destination.passes);
        let first_limit = if pace == Pace::Unknown {
            self.rules.slots - self.rules.slots / KNOWN_RESERVE
        } else {
            part_of(self.rules.slots, FIRST_SHARE).max(1)
        };
        let first = destination.passes == 0 && inner.slow_passes < first_limit;
        own.min(unused).min(fair).max(usize::from(first))
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

    /// Notes what an attempt has shown.
    fn note(&self, name: &str, seen: Seen) {
        let now = Instant::now();
        let mut inner = self.lock();
        let Some(destination) = inner.destinations.get_mut(name) else {
            return;
        };
        let throttle = seen
            .status
            .and_then(|status| destination.policy.throttle(status, seen.retry_after));
        let half_open = destination.is_half_open(now);
        let on_gone = destination
            .policy
            .auto_disable
            .as_ref()
            .is_some_and(|rule| rule.on_gone);
        if seen.fault != Blame::Other {
            destination.failing.note(seen.is_repeated);
        }
        let report = &mut destination.report;
        if let Some(pause) = throttle {
            report.retry_after = report.retry_after.max(Some(pause));
            let until = now + pause;
            destination.throttled = destination.throttled.max(Some(until));
            self.urgent.notify_one();
        } else if seen.fault != Blame::Other {
            let failed = seen.fault == Blame::Destination;
            report.attempts = report.attempts.saturating_add(1);
            report.failures = report.failures.saturating_add(failed.into());
            let retries = u32::from(seen.turn == Turn::Retry);
            report.retries = report.retries.saturating_add(retries);
            if on_gone && seen.status == Some(StatusCode::GONE) {
                report.gone = true;
                destination.throttled = destination.throttled.max(Some(now + UNTIL_KNOWN));
                self.urgent.notify_one();
            }
            if half_open {
                report.probe = Some(report.probe.unwrap_or(true) && !failed);
                if failed {
                    destination.throttled = destination.throttled.max(Some(now + UNTIL_KNOWN));
                }
                self.urgent.notify_one();
            }
        }
    }

    /// Notes that deferred requests of a destination exist. Returns whether that is news.
    pub(crate) fn note_deferred(&self, name: &str) -> bool {
        let now = Instant::now();
        let mut inner = self.lock();
        let destination = self.entry(&mut inner, name, now);
        destination.deferred.replace(now).is_none()
    }

    /// What a poll is told: the room of each destination that has deferred requests, is limited or
    /// takes no more now, as a JSON object, and whether some will have room soon.
    pub(crate) fn room(&self) -> Room {
        let now = Instant::now();
        let mut inner = self.lock();
        inner.used = true;
        let names: Vec<Arc<str>> = inner.destinations.keys().cloned().collect();
        let mut room = Room::default();
        for name in names {
            let pace = inner.recount(&name, now);
            let slots = self.free_slots(&inner, &name, pace, now);
            let Some(destination) = inner.destinations.get_mut(&*name) else {
                continue;
            };
            let seen = |seen: Instant| now.saturating_duration_since(seen) <= REMEMBERED;
            destination.deferred = destination.deferred.filter(|at| seen(*at));
            if destination
                .shared
                .as_ref()
                .is_some_and(|it| it.is_closed(now))
            {
                // The poll finds it in the database.
                continue;
            }
            let limits = destination.limits(now);
            let passes = destination.passes;
            let (free, soon) = if destination.is_closed(now) {
                (0, false)
            } else {
                // Those of a fast destination may wait here for the next pass.
                let ahead = if pace == Pace::Fast { AHEAD } else { 0 };
                let leased = if limits.is_none() {
                    usize::MAX
                } else {
                    destination.leased.free(limits, passes as u32, now)
                };
                let paced = destination.failing.free(now);
                (
                    (slots + ahead).min(leased).min(paced),
                    passes > 0 || leased == 0 || paced == 0,
                )
            };
            let in_the_way = free == 0 && (pace == Pace::Slow || destination.is_closed(now));
            let is_failing = destination.failing.free(now) != usize::MAX;
            let is_used = passes > 0 || destination.pace.quiet(now) <= REMEMBERED;
            if is_used && (in_the_way || is_failing || !limits.is_none()) {
                // The poll defers what it meets.
                destination.deferred = Some(now);
            }
            if destination.deferred.is_some() {
                room.soon |= soon;
                add(&mut room, &name, free);
            }
        }
        room
    }

    /// Whether anything was sent or polled for, so that the database has to be asked.
    pub(crate) fn is_used(&self) -> bool {
        self.lock().used
    }

    /// What attempts have shown since the last call, as far as other processes should know it, and
    /// the policies that judge it. A destination whose closed time has just ended is among them.
    pub(crate) fn take_reports(&self) -> Vec<(Arc<str>, Arc<DestinationPolicy>, Report)> {
        let now = Instant::now();
        let mut reports = Vec::new();
        for (name, destination) in &mut self.lock().destinations {
            let closed = destination.is_closed(now);
            let opened = destination
                .shared
                .as_mut()
                .is_some_and(|shared| std::mem::replace(&mut shared.was_closed, closed) && !closed);
            let report = destination.is_to_be_reported();
            let taken = std::mem::take(&mut destination.report);
            if report || opened {
                reports.push((Arc::clone(name), Arc::clone(&destination.policy), taken));
            }
        }
        reports
    }

    /// Keeps reports that could not be stored.
    pub(crate) fn restore_reports(&self, reports: &[(Arc<str>, Arc<DestinationPolicy>, Report)]) {
        let mut inner = self.lock();
        for (name, _, report) in reports {
            if let Some(destination) = inner.destinations.get_mut(name) {
                destination.report.add(report);
            }
        }
    }

    /// Notes all that the database has: of others it has nothing any more.
    pub(crate) fn learn_all(&self, known: Vec<StoredDestination>) {
        let names: HashSet<String> = known.iter().map(|known| known.name.clone()).collect();
        for (name, destination) in &mut self.lock().destinations {
            if destination.shared.is_some() && !names.contains(&**name) {
                destination.shared = None;
                destination.throttled = None;
            }
        }
        self.learn(known);
    }

    /// Notes what the database has of destinations.
    pub(crate) fn learn(&self, known: Vec<StoredDestination>) {
        let now = Instant::now();
        let mut inner = self.lock();
        for known in known {
            let policy = match known.policy {
                Some(policy) => Arc::new(policy),
                None => self.policy_of(&known.name),
            };
            let destination = self.entry(&mut inner, &known.name, now);
            if *destination.policy != *policy {
                destination.set_policy(policy);
            }
            let closed = known.state.closed_until(known.now);
            if closed.is_none() {
                // Resumed or reset, unless it was throttled after that.
                destination.throttled = destination
                    .throttled
                    .filter(|_| destination.report.retry_after.is_some());
            }
            destination.shared = (!known.state.is_idle(known.now)).then(|| Shared {
                was_closed: closed.is_some(),
                clock: (now, known.now),
                state: known.state,
            });
            destination.freed.notify_waiters();
        }
    }

    /// The permits and tokens to ask the database for.
    pub(crate) fn asks(&self) -> Vec<LeaseRequest> {
        let now = Instant::now();
        let most = self.most as u32;
        let mut asks = Vec::new();
        for (name, destination) in &mut self.lock().destinations {
            let limits = destination.limits(now);
            let passes = destination.passes as u32;
            let quiet = destination.pace.quiet(now);
            let leased = &mut destination.leased;
            asks.extend(leased.ask(name, limits, passes, most, quiet, now));
        }
        asks
    }

    /// Notes the database's answers, or that it gave none.
    pub(crate) fn answer(
        &self,
        asked: Instant,
        asks: &[LeaseRequest],
        grants: Option<&HashMap<String, Grant>>,
    ) {
        let mut inner = self.lock();
        for ask in asks {
            let Some(destination) = inner.destinations.get_mut(&ask.name) else {
                continue;
            };
            match grants.and_then(|grants| grants.get(&*ask.name)) {
                Some(grant) => {
                    destination
                        .leased
                        .granted(ask, *grant, self.rules.lease, asked);
                    destination.freed.notify_waiters();
                }
                None => destination.leased.not_answered(Instant::now()),
            }
        }
    }

    /// When the next question is due, if one is.
    pub(crate) fn next_ask(&self) -> Option<Instant> {
        let inner = self.lock();
        let destinations = inner.destinations.values();
        destinations
            .filter_map(|destination| destination.leased.next_ask())
            .min()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn part_of(slots: usize, share: f64) -> usize {
    let slots = u32::try_from(slots).unwrap_or(u32::MAX);
    (f64::from(slots) * share) as usize
}

/// Adds a destination to the JSON object.
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
