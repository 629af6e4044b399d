//! Why a request is not being sent, from its place in the queue.

use crate::destination::DestinationStatus;
use crate::inspection::{Hold, RequestInfo};
use crate::store::inspect::{Place, State};

/// What the place alone says.
pub(super) enum Known {
    /// The nearest reason: what has to change first. `None` while an attempt is under way.
    Hold(Option<Hold>),
    /// The reason may be its destination.
    AsksDestination,
}

pub(super) fn of(info: &RequestInfo, place: &Place) -> Known {
    let at = place.due_at;
    let until_due = at.duration_since(place.now).unwrap_or_default();
    let is_due = until_due.is_zero();
    let paused = || place.paused.clone().map(Hold::ChannelPaused);
    if place.state == State::Sending {
        let ended = || paused().unwrap_or(Hold::LeaseEnded { at });
        return Known::Hold(is_due.then(ended));
    }
    if let Some(first) = place.first {
        let key = info.ordering_key.clone().unwrap_or_default();
        return Known::Hold(Some(if place.is_halted {
            Hold::Halted { key, by: first }
        } else {
            Hold::Behind { key, first }
        }));
    }
    if let (State::Parked, Some((since, reason))) = (place.state, &place.parked) {
        let (since, reason) = (*since, reason.clone());
        return Known::Hold(Some(Hold::Parked { since, reason, at }));
    }
    if let Some(paused) = paused() {
        return Known::Hold(Some(paused));
    }
    // A deferred request's time is that of the next look at its destination.
    if !is_due && place.state != State::Deferred {
        return Known::Hold(Some(Hold::NotDue {
            at,
            in_time: until_due,
        }));
    }
    Known::AsksDestination
}

/// The reason of a request that is due, or deferred.
pub(super) fn at_destination(
    info: &RequestInfo,
    place: &Place,
    destination: Option<DestinationStatus>,
) -> Hold {
    let at = place.due_at;
    if let Some(destination) = destination.filter(|destination| destination.state.is_closed()) {
        return Hold::Closed(Box::new(destination));
    }
    if !place.is_delivered {
        let channel = info.channel.clone();
        return Hold::NoRunner { channel };
    }
    if place.state == State::Deferred {
        let destination = info.destination.clone().unwrap_or_default();
        return Hold::Limited { destination, at };
    }
    Hold::Queued {
        due_at: at,
        waited: place.now.duration_since(at).unwrap_or_default(),
    }
}
