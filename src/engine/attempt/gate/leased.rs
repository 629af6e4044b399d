//! What this process has leased of a destination's limits.
//!
//! A permit is for one of the attempts at the same time, a token for one of the attempts in a
//! period. Both are leased in lumps, so that most attempts don't ask the database. Both expire, so
//! that a process that dies gives them back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::destination::{DestinationPolicy, RateLimit};
use crate::store::destinations::{Grant, LeaseRequest};

/// One lump holds the tokens of this time, and at least one token. A process has at most one lump
/// unspent.
const LUMP: Duration = Duration::from_millis(100);
/// How long unspent tokens can be used.
const TOKENS_LAST: Duration = Duration::from_secs(1);
/// How soon a process asks for permits again if other processes have all of them.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// If the next token comes later than this, requests don't wait for it in memory.
const NEAR: Duration = Duration::from_millis(250);
/// A process that had no use for more permits for this long asks only to keep those that it has.
const WANTED: Duration = Duration::from_secs(1);
/// A destination without an attempt for this long gives its permits back.
const KEPT: Duration = Duration::from_secs(5);

/// The limits that a destination has now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limits {
    /// Attempts at the same time, of all processes.
    concurrency: Option<u32>,
    rate: Option<Rate>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rate {
    /// Tokens a second.
    per_second: f64,
    /// The most tokens that it holds.
    bucket: u32,
}

impl Rate {
    fn of(limit: &RateLimit) -> Self {
        Self {
            per_second: f64::from(limit.count) / limit.per.as_secs_f64().max(1e-6),
            bucket: limit.bucket(),
        }
    }

    /// How many tokens are leased at once.
    fn lump(self) -> u32 {
        let lump = self.per_second * LUMP.as_secs_f64();
        (lump as u32).clamp(1, self.bucket.max(1))
    }
}

impl Limits {
    /// `probes` is how many attempts a half-open breaker allows.
    pub(super) fn of(policy: &DestinationPolicy, probes: Option<u32>) -> Self {
        let concurrency = match (policy.max_concurrency, probes) {
            (Some(limit), Some(probes)) => Some(limit.min(probes)),
            (limit, probes) => limit.or(probes),
        };
        Self {
            concurrency,
            rate: policy.rate.as_ref().map(Rate::of),
        }
    }

    pub(super) fn is_none(self) -> bool {
        self.concurrency.is_none() && self.rate.is_none()
    }

    /// How many tokens come within this time, if there is a rate.
    pub(super) fn tokens_within(self, time: Duration) -> Option<usize> {
        self.rate
            .map(|rate| (rate.per_second * time.as_secs_f64()) as usize)
    }
}

/// The permits and tokens of this process.
#[derive(Debug, Default)]
pub(super) struct Leased {
    permits: u32,
    permits_until: Option<Instant>,
    /// The limit of which the permits are a part.
    permits_of: u32,
    tokens: u32,
    tokens_until: Option<Instant>,
    /// When the next token comes, if there was none at the last question.
    next_token: Option<Instant>,
    /// Not asked for before this time.
    not_before: Option<Instant>,
    /// Attempts were turned away for want of permits or tokens since the last question, and the
    /// database can have them.
    wanted: bool,
    /// When permits or tokens were last wanted.
    last_wanted: Option<Instant>,
    /// When the database was last asked for permits.
    permits_asked: Option<Instant>,
    /// A row of this process may be in the database.
    has_row: bool,
}

/// Whether an attempt may begin, as far as the limits say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    Nothing,
    /// The database has to be asked first.
    Answer,
    /// All permits are in use, or there are no tokens.
    Some,
}

impl Leased {
    /// Whether it has permits that hold for this limit. Those of a higher limit don't, because all
    /// processes together may have more of them than the limit allows.
    fn has_permits(&self, limit: u32, now: Instant) -> bool {
        self.permits_of <= limit && self.permits_until.is_some_and(|until| now < until)
    }

    fn tokens(&self, now: Instant) -> u32 {
        match self.tokens_until {
            Some(until) if now < until => self.tokens,
            _ => 0,
        }
    }

    fn may_ask(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    /// What an attempt lacks while `passes` of them are under way.
    pub(super) fn lacks(&mut self, limits: Limits, passes: u32, now: Instant) -> Lack {
        let permits = match limits.concurrency {
            Some(limit) if !self.has_permits(limit, now) => Lack::Answer,
            Some(limit) if passes >= self.permits.min(limit) => Lack::Some,
            _ => Lack::Nothing,
        };
        let tokens = match limits.rate {
            Some(_) if self.tokens(now) == 0 => Lack::Answer,
            _ => Lack::Nothing,
        };
        let may_ask = self.may_ask(now);
        let lack = match (permits, tokens) {
            (Lack::Some, _) => Lack::Some,
            (Lack::Answer, _) | (_, Lack::Answer) if may_ask => Lack::Answer,
            (Lack::Answer, _) | (_, Lack::Answer) => Lack::Some,
            _ => Lack::Nothing,
        };
        // Permits that are all in use here are asked for only if other processes have some, and
        // not each time that an attempt ends.
        let others_have_some = limits.concurrency.is_some_and(|limit| self.permits < limit);
        self.wanted |= match permits {
            Lack::Some => {
                others_have_some && self.permits_asked.is_none_or(|at| now >= at + ASK_AGAIN)
            }
            _ => lack != Lack::Nothing,
        };
        if self.wanted {
            self.last_wanted = Some(now);
        }
        lack
    }

    /// Whether the limits let as many attempts as `all` slots begin within the time of a lump, or
    /// at least as many as the destination may still take of the slots, `slots`. An attempt takes
    /// the time `took`.
    pub(super) fn is_ample(
        &self,
        limits: Limits,
        passes: u32,
        slots: u32,
        all: u32,
        took: Duration,
        now: Instant,
    ) -> bool {
        let concurrency = limits.concurrency.is_none_or(|limit| {
            let permits = self.permits(limit, now);
            permits >= passes.saturating_add(slots)
                || LUMP.saturating_mul(permits) >= took.saturating_mul(all)
        });
        concurrency && limits.rate.is_none_or(|rate| rate.lump() >= all)
    }

    /// The permits that it has, or could have once the database has answered.
    fn permits(&self, limit: u32, now: Instant) -> u32 {
        if self.has_permits(limit, now) {
            self.permits.min(limit)
        } else if self.may_ask(now) {
            limit
        } else {
            0
        }
    }

    /// How many attempts more may begin, or could once the database has answered.
    pub(super) fn free(&self, limits: Limits, passes: u32, now: Instant) -> usize {
        let may_ask = self.may_ask(now);
        let permits = limits
            .concurrency
            .map_or(u32::MAX, |limit| self.permits(limit, now));
        let tokens = match limits.rate {
            None => u32::MAX,
            Some(rate) if may_ask => self.tokens(now).saturating_add(rate.lump()),
            Some(_) => self.tokens(now),
        };
        permits.saturating_sub(passes).min(tokens) as usize
    }

    /// Takes a token.
    pub(super) fn spend(&mut self, limits: Limits) {
        if let Some(rate) = limits.rate {
            self.tokens = self.tokens.saturating_sub(1);
            // Asked for before the last one is spent.
            self.wanted |= self.tokens < rate.lump().div_ceil(2);
        }
    }

    /// Gives a token back that wasn't used.
    pub(super) fn give_back(&mut self, limits: Limits) {
        if limits.rate.is_some() {
            self.tokens = self.tokens.saturating_add(1);
        }
    }

    /// What the database is to be asked now, if anything. `most` is how many attempts the process
    /// could make, and `quiet` how long it has made none.
    pub(super) fn ask(
        &mut self,
        name: &Arc<str>,
        limits: Limits,
        passes: u32,
        most: u32,
        quiet: Duration,
        now: Instant,
    ) -> Option<LeaseRequest> {
        let request = |used, permits, tokens| LeaseRequest {
            name: Arc::clone(name),
            limit: limits.concurrency,
            used,
            permits,
            rate: limits.rate.map(|rate| (rate.per_second, rate.bucket)),
            tokens,
        };
        let in_use = passes > 0 || self.wanted;
        if !in_use && quiet > KEPT {
            // Nothing is asked for, so what is leased is given back.
            return std::mem::take(&mut self.has_row).then(|| request(0, 0, 0));
        }
        if limits.is_none() || !(self.wanted || self.has_row) || !self.may_ask(now) {
            return None;
        }
        let lately = |at: Instant| now.saturating_duration_since(at) <= WANTED;
        let has_use = in_use || self.last_wanted.is_some_and(lately);
        let most = if has_use {
            most
        } else {
            self.permits.min(most)
        };
        let permits = limits.concurrency.map_or(0, |limit| limit.min(most));
        if limits.concurrency.is_some() {
            self.has_row = permits > 0;
        }
        // What is wanted from here on may not be in this question.
        let wanted = std::mem::take(&mut self.wanted);
        let lump = limits.rate.filter(|_| wanted).map_or(0, Rate::lump);
        Some(request(
            passes,
            permits,
            lump.saturating_sub(self.tokens(now)),
        ))
    }

    /// Notes the answer. `asked` is when the question was asked.
    pub(super) fn granted(
        &mut self,
        ask: &LeaseRequest,
        grant: Grant,
        lease: Duration,
        asked: Instant,
    ) {
        self.permits = grant.permits;
        self.permits_of = ask.limit.unwrap_or(u32::MAX);
        self.permits_until = (ask.permits > 0).then_some(asked + lease);
        self.tokens = self.tokens(asked).saturating_add(grant.tokens);
        self.tokens_until = (self.tokens > 0).then_some(asked + TOKENS_LAST);
        if ask.tokens > 0 || ask.rate.is_none() {
            // The question was for all that could be wanted.
            self.wanted = false;
        }
        self.permits_asked = Some(asked);
        let no_permit = ask.permits > 0 && grant.permits == 0;
        let no_token = ask.tokens > 0 && grant.tokens == 0;
        let wait = match (no_permit, no_token) {
            (true, _) => ASK_AGAIN,
            (false, true) => grant.wait.clamp(Duration::from_millis(5), ASK_AGAIN),
            (false, false) => Duration::ZERO,
        };
        if no_permit {
            self.permits_until = None;
        }
        self.not_before = (!wait.is_zero()).then_some(asked + wait);
        self.next_token = no_token.then(|| asked + grant.wait);
    }

    /// Whether no token comes soon.
    pub(super) fn is_far(&self, now: Instant) -> bool {
        self.next_token.is_some_and(|at| at > now + NEAR)
    }

    /// Asks again later, because the question failed.
    pub(super) fn not_answered(&mut self, now: Instant) {
        self.not_before = Some(now + ASK_AGAIN);
        self.wanted = true;
    }

    /// When the database is to be asked again, if it is to be.
    pub(super) fn next_ask(&self) -> Option<Instant> {
        self.not_before.filter(|_| self.wanted)
    }

    pub(super) fn has_row(&self) -> bool {
        self.has_row
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted
    }
}
