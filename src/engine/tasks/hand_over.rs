//! Handing outcomes to the application, in a transaction of its own database.
//!
//! A task for each subscription takes outcomes one after another and hands each to a task of its
//! own. A handler that fails, hangs or panics harms its own outcome alone: the outcome is put off,
//! and parked in the end.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::engine::attempt::Driver;
use crate::engine::telemetry::{Failures, LineLimit, OwnCondition};
use crate::error::chain;
use crate::id::RequestId;
use crate::redact::{error_text, panic_text};
use crate::store::StoreError;
use crate::store::hand_over::{HandOver, OutcomeHandler, PutOff, Taken};

/// How long an outcome of another process can wait unnoticed.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time between two tries to hand an outcome over.
const MAX_BACKOFF: Duration = Duration::from_secs(5 * 60);
/// How often a process notes that it has a handler.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How many outcomes may be in the hands of handlers at once.
///
/// Each has a connection of the caller's pool, and its handler may want another one. So all
/// channels together get half of the pool. One place of each channel is its own, so that the
/// handlers of another channel can't take them all.
#[derive(Debug)]
pub(crate) struct Places {
    shared: Arc<Semaphore>,
}

impl Places {
    pub(crate) fn new(pool_connections: u32) -> Self {
        let shared = (pool_connections / 2).saturating_sub(1);
        Self {
            shared: Arc::new(Semaphore::new(shared as usize)),
        }
    }

    fn of_channel(&self, concurrency: usize) -> ChannelPlaces {
        ChannelPlaces {
            all: Arc::new(Semaphore::new(concurrency)),
            own: Arc::new(Semaphore::new(1)),
            shared: Arc::clone(&self.shared),
        }
    }
}

#[derive(Debug)]
struct ChannelPlaces {
    all: Arc<Semaphore>,
    own: Arc<Semaphore>,
    shared: Arc<Semaphore>,
}

type Permit = Result<OwnedSemaphorePermit, tokio::sync::AcquireError>;

impl ChannelPlaces {
    /// The permits of one hand-over. The semaphores are never closed.
    async fn place(&self) -> (Permit, Permit) {
        let all = Arc::clone(&self.all).acquire_owned().await;
        let place = tokio::select! {
            biased;
            own = Arc::clone(&self.own).acquire_owned() => own,
            shared = Arc::clone(&self.shared).acquire_owned() => shared,
        };
        (all, place)
    }
}

/// A subscription of a handler to a channel.
struct Subscription {
    driver: Arc<Driver>,
    channel: Arc<str>,
    handler: Arc<dyn OutcomeHandler>,
    failures: Failures,
    /// The outcomes that are in this subscription's hands. One whose handler has failed is due
    /// until its failure is recorded, and must not be taken again before.
    taken: Mutex<HashSet<RequestId>>,
    /// Bounds the lines about parked outcomes.
    parked: LineLimit,
    /// Bounds the lines about failures that can't be recorded.
    unrecorded: LineLimit,
}

/// Hands over the outcomes of a channel until a shutdown.
pub(crate) async fn run(
    driver: Arc<Driver>,
    places: Arc<Places>,
    channel: Arc<str>,
    handler: Arc<dyn OutcomeHandler>,
) {
    let places = places.of_channel(driver.config.handler_concurrency);
    let subscription = Arc::new(Subscription {
        driver,
        channel,
        handler,
        failures: Failures::default(),
        taken: Mutex::default(),
        parked: LineLimit::default(),
        unrecorded: LineLimit::default(),
    });
    tokio::select! {
        () = subscription.hand_over_all(&places) => {}
        () = subscription.beat() => {}
        () = subscription.driver.lifecycle.closing() => {}
    }
}

impl Subscription {
    /// Shows that the channel has a handler, for as long as this is polled. The subscription itself
    /// was the first beat.
    async fn beat(&self) {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            // After a failure the next beat will do.
            let store = &self.driver.store;
            let _ = store.note_handler(&self.channel, HEARTBEAT / 2).await;
        }
    }

    async fn hand_over_all(self: &Arc<Self>, places: &ChannelPlaces) {
        let mut unreachable = OwnCondition::default();
        loop {
            let place = places.place().await;
            // Subscribed before looking, or an outcome could be settled in between.
            let finished = self.driver.settler.finished().notified();
            let except: Vec<_> = self.taken().iter().copied().collect();
            let taken = self
                .driver
                .store
                .take_unhandled(&self.channel, &except, MAX_BACKOFF)
                .await;
            self.note_reachable(&mut unreachable, taken.as_ref().err());
            match taken {
                Ok(Taken::HandOver(hand_over)) => {
                    let (subscription, id) = (Arc::clone(self), hand_over.id());
                    self.taken().insert(id);
                    tokio::spawn(async move {
                        subscription.hand_over(*hand_over).await;
                        subscription.taken().remove(&id);
                        drop(place);
                    });
                    continue;
                }
                Ok(Taken::Expired) => continue,
                Ok(Taken::Unreadable { id, reason, first }) => {
                    self.note_unreadable(id, reason.as_str(), first);
                    continue;
                }
                Ok(Taken::Nothing) | Err(_) => {}
            }
            // Other channels may use the place meanwhile.
            drop(place);
            tokio::select! {
                () = finished => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    fn taken(&self) -> MutexGuard<'_, HashSet<RequestId>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_reachable(&self, unreachable: &mut OwnCondition, error: Option<&StoreError>) {
        let channel = &*self.channel;
        match error {
            None => {
                if unreachable.ends() {
                    tracing::info!(channel, "outcomes are handed over again");
                }
            }
            Some(error) => {
                if unreachable.begins() {
                    tracing::warn!(channel, %error, "outcomes can't be handed over yet");
                }
            }
        }
    }

    fn note_unreadable(&self, id: RequestId, reason: &str, first: bool) {
        if first {
            tracing::warn!(
                %id, channel = &*self.channel, reason,
                "an outcome can't be read by this version and is not handed over"
            );
        } else {
            tracing::debug!(%id, reason, "an outcome still can't be read");
        }
    }

    /// Hands over one outcome, and records whether that worked.
    async fn hand_over(&self, hand_over: HandOver) {
        let (id, xact) = (hand_over.id(), hand_over.xact().clone());
        let handler = Arc::clone(&self.handler);
        // In a task of its own, so that a handler that panics is tried again like one that fails.
        let mut handling = tokio::spawn(async move { hand_over.run(&*handler).await });
        let timeout = self.driver.config.handler_timeout;
        let error = match tokio::time::timeout(timeout, &mut handling).await {
            Ok(Ok(Ok(()))) => {
                self.failures.recovers(id);
                return;
            }
            Ok(Ok(Err(error))) => shown(&*error),
            Ok(Err(error)) => match error.try_into_panic() {
                Ok(panic) => format!("the handler panicked: {}", panic_text(&*panic)),
                Err(error) => error.to_string(),
            },
            Err(_elapsed) => {
                handling.abort();
                if let Err(error) = self.driver.store.end_hand_over(&xact).await {
                    tracing::debug!(%id, %error, "a handler's session could not be ended");
                }
                format!("the handler did not return within {timeout:?}")
            }
        };
        self.record(id, &error).await;
        if !handling.is_finished() {
            // The handler blocks its thread. It keeps its place, or others would block more of
            // them.
            let _ = handling.await;
        }
    }

    /// Records a failure, however long that takes: an outcome whose failure is not recorded is due
    /// at once.
    async fn record(&self, id: RequestId, error: &str) {
        if self.failures.is_news(id) {
            tracing::warn!(%id, error, "a handler failed and gets the outcome again later");
        } else {
            tracing::debug!(%id, error, "a handler failed again");
        }
        let (store, max) = (&self.driver.store, self.driver.config.max_handler_failures);
        loop {
            match store.put_off(id, error, MAX_BACKOFF, max).await {
                Ok(Some(put_off)) => return self.note_parked(id, put_off, error),
                // It was handled by another process, or its subscription has ended.
                Ok(None) => return,
                Err(_) if store.is_closed() => return,
                Err(error) => {
                    if self.unrecorded.allows("").is_some() {
                        tracing::warn!(%id, %error, "a handler's failure can't be recorded yet");
                    }
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    fn note_parked(&self, id: RequestId, put_off: PutOff, error: &str) {
        let PutOff { failures, parked } = put_off;
        if !parked {
            return;
        }
        let channel = &*self.channel;
        if let Some(left_out) = self.parked.allows("") {
            tracing::warn!(
                %id, channel, failures, error, left_out,
                "an outcome is parked, because its handler has failed too often"
            );
        } else {
            tracing::debug!(%id, channel, failures, error, "another outcome is parked");
        }
    }
}

/// A handler's error as it is logged and stored.
fn shown(error: &(dyn std::error::Error + 'static)) -> String {
    error_text(&chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::BoxError;
    use crate::redact::MAX_ERROR_TEXT;

    #[tokio::test]
    async fn a_busy_channel_leaves_the_others_a_place_each() {
        let free = async |places: &ChannelPlaces| {
            let place = tokio::time::timeout(Duration::from_millis(1), places.place());
            place.await.ok()
        };
        // Half of ten connections.
        let places = Places::new(10);
        let (one, other) = (places.of_channel(100), places.of_channel(100));
        let mut taken = Vec::new();
        while let Some(place) = free(&one).await {
            taken.push(place);
        }
        assert_eq!(taken.len(), 5);
        let _own = free(&other).await.unwrap();
        assert!(free(&other).await.is_none());
        taken.pop();
        assert!(free(&other).await.is_some());

        // A channel has its own bound, and always one place.
        for (connections, concurrency, expected) in [(100, 4, 4), (1, 4, 1), (0, 4, 1), (3, 4, 1)] {
            let places = Places::new(connections).of_channel(concurrency);
            let mut taken = Vec::new();
            while let Some(place) = free(&places).await {
                taken.push(place);
            }
            assert_eq!(taken.len(), expected, "{connections} {concurrency}");
        }
    }

    #[test]
    fn a_handlers_error_is_stored_without_secrets_and_cut() {
        let shown = |error: &str| shown(&*BoxError::from(error));
        let error = shown("http://a:b@c/d?e \0");
        assert_eq!(error, "http://c \u{fffd}");
        let long = shown(&"\u{e9}".repeat(3000));
        assert!(long.len() <= MAX_ERROR_TEXT, "{}", long.len());
    }
}
