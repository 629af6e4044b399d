//! How many of the slots of this process one destination may take.

use std::time::Instant;

use super::pace::Pace;
use super::{Gate, Inner, Rules};

/// The part of the slots that is kept for others while there is work for one destination only: one
/// in eight.
pub(super) const RESERVE: usize = 8;
/// How many times the free slots of the slow share one slow destination may take.
const GREED: usize = 3;
/// While slow destinations have less than this fraction of all slots, each may take a first one.
const FIRST_SHARE: f64 = 0.75;
/// The part of the slots that first requests to destinations that have not answered yet leave
/// free: one in 32, and at least one slot.
const KNOWN_RESERVE: usize = 32;

/// The most passes that one destination has, and that all slow ones have together.
pub(super) fn of_one(rules: &Rules) -> usize {
    part_of(rules.slots, rules.share).clamp(1, rules.slots)
}

/// The most passes that one destination has while there is work for no other.
pub(super) fn of_one_alone(rules: &Rules) -> usize {
    if rules.share < 1.0 && rules.slots >= 4 {
        rules.slots - rules.slots.div_ceil(RESERVE)
    } else {
        rules.slots
    }
}

impl Gate {
    /// How many slots the destination may still take.
    pub(super) fn free_slots(&self, inner: &Inner, name: &str, pace: Pace, now: Instant) -> usize {
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
            (self.rules.slots - self.rules.slots.div_ceil(KNOWN_RESERVE)).max(1)
        } else {
            part_of(self.rules.slots, FIRST_SHARE).max(1)
        };
        let first = destination.passes == 0 && inner.slow_passes < first_limit;
        own.min(unused).min(fair).max(usize::from(first))
    }
}

fn part_of(slots: usize, share: f64) -> usize {
    let slots = u32::try_from(slots).unwrap_or(u32::MAX);
    (f64::from(slots) * share) as usize
}
