//! What a poll is told of destinations.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use super::Gate;
use super::destination::REMEMBERED;
use super::pace::{Pace, SOON_MIN};
use crate::store::runner_pool::Room;

/// How many requests beyond its free passes a poll may bring for a fast destination.
pub(super) const AHEAD: usize = 64;

impl Gate {
    /// Notes that deferred requests of a destination exist. Returns whether that is news.
    pub(crate) fn note_deferred(&self, name: &str) -> bool {
        let now = Instant::now();
        let mut inner = self.lock();
        let destination = self.entry(&mut inner, name, now);
        destination.deferred.replace(now).is_none()
    }

    /// As [`note_deferred`](Self::note_deferred), of a new request that could be sent soon. Returns
    /// whether a poll has to be asked for.
    pub(crate) fn note_short(&self, name: &str) -> bool {
        self.note_deferred(name) || !self.lock().polls_soon
    }

    /// What a poll is told: the room of each destination that has deferred requests, is limited or
    /// takes no more now, as a JSON object, and whether some will have room soon. Requests of a
    /// destination that has room for a whole poll are claimed as if it had no limits.
    pub(crate) fn room(&self) -> Room {
        let now = Instant::now();
        let mut inner = self.lock();
        self.note_use(&mut inner);
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
            let paced = destination.failing.free(now);
            let is_failing = paced != usize::MAX;
            let is_closed = destination.is_closed(now);
            let (free, soon) = if is_closed {
                (0, None)
            } else {
                // Those of a fast destination may wait here for the next pass.
                let ahead = if pace == Pace::Fast { AHEAD } else { 0 };
                let leased = if limits.is_none() {
                    usize::MAX
                } else {
                    destination.leased.free(limits, passes as u32, now)
                };
                let has_ample_limits = !limits.is_none()
                    && pace != Pace::Slow
                    && !is_failing
                    && !destination.is_half_open(now)
                    && destination.leased.is_ample(
                        limits,
                        passes as u32,
                        slots as u32,
                        self.rules.slots as u32,
                        destination.pace.took(),
                        now,
                    );
                let free = if has_ample_limits {
                    // More than any poll brings, so that the poll doesn't defer them first.
                    2 * self.rules.slots
                } else {
                    (slots + ahead).min(leased).min(paced)
                };
                let soon = if leased == 0 {
                    Some(SOON_MIN)
                } else if paced == 0 {
                    Some(destination.failing.soon())
                } else {
                    (passes > 0).then(|| destination.pace.soon(now))
                };
                (free, soon)
            };
            let in_the_way = free == 0 && (pace == Pace::Slow || is_closed);
            let is_used = passes > 0 || destination.pace.quiet(now) <= REMEMBERED;
            if is_used && (in_the_way || is_failing || !limits.is_none()) {
                // The poll defers what it meets.
                destination.deferred = Some(now);
            }
            if destination.deferred.is_some() {
                room.soon = room.soon.into_iter().chain(soon).min();
                add(&mut room, &name, free);
            }
        }
        inner.polls_soon = room.soon.is_some_and(|soon| soon <= SOON_MIN);
        room
    }
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
