//! Why a request is not being sent, from its place in the queue.

use crate::destination::DestinationStatus;
use crate::inspection::{Hold, RequestInfo};
use crate::store::inspect::{Place, State};

/// The nearest reason: what has to change first. `None` while an attempt is under way.
pub(super) fn of(
    info: &RequestInfo,
    place: &Place,
    destination: Option<DestinationStatus>,
) -> Option<Hold> {
    let at = place.due_at;
    let until_due = at.duration_since(place.now).unwrap_or_default();
    let is_due = until_due.is_zero();
    if place.state == State::Sending {
        return is_due.then_some(Hold::LeaseEnded { at });
    }
    if let Some(first) = place.first {
        let key = info.ordering_key.clone().unwrap_or_default();
        return Some(if place.is_halted {
            Hold::Halted { key, by: first }
        } else {
            Hold::Behind { key, first }
        });
    }
    if let (State::Parked, Some((since, reason))) = (place.state, &place.parked) {
        let (since, reason) = (*since, reason.clone());
        return Some(Hold::Parked { since, reason, at });
    }
    // A deferred request's time is that of the next look at its destination.
    if !is_due && place.state != State::Deferred {
        return Some(Hold::NotDue {
            at,
            in_time: until_due,
        });
    }
    if let Some(destination) = destination.filter(|destination| destination.state.is_closed()) {
        return Some(Hold::Closed(Box::new(destination)));
    }
    if !place.is_delivered {
        let channel = info.channel.clone();
        return Some(Hold::NoRunner { channel });
    }
    if place.state == State::Deferred {
        let destination = info.destination.clone().unwrap_or_default();
        return Some(Hold::Limited { destination, at });
    }
    Some(Hold::Queued {
        due_at: at,
        waited: place.now.duration_since(at).unwrap_or_default(),
    })
}
