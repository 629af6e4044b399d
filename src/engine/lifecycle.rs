//! How far an engine is between its start and the end of its shutdown.

use tokio::sync::watch;

/// The phases of an engine's life, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Open,
    /// No request or attempt is begun; attempts in flight continue.
    Closing,
    /// Attempts in flight are given up.
    Stopping,
}

/// What this process does of itself while the engine is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claiming {
    /// A runner claims here, so this process may make first attempts too.
    On,
    /// No runner claims here. Callers that wait keep the requests that are held for them.
    Off,
    /// As `Off`, and requests that are held for waiting callers go back to the queue.
    Released,
}

#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
    claiming: watch::Sender<Claiming>,
    /// Has a receiver for each runner that may still bring claims.
    runners: watch::Sender<()>,
}

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Open),
            claiming: watch::Sender::new(Claiming::Off),
            runners: watch::Sender::new(()),
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    pub(super) fn close(&self) {
        self.phase.send_replace(Phase::Closing);
    }

    pub(super) fn stop(&self) {
        self.phase.send_replace(Phase::Stopping);
    }

    /// Waits until no new work is begun.
    pub(crate) async fn closing(&self) {
        self.reached(Phase::Closing).await;
    }

    /// Waits until attempts in flight are given up.
    pub(crate) async fn stopping(&self) {
        self.reached(Phase::Stopping).await;
    }

    async fn reached(&self, wanted: Phase) {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as `self`.
        let _ = phase.wait_for(|phase| *phase >= wanted).await;
    }

    pub(super) fn begin_claiming(&self) {
        self.claiming.send_replace(Claiming::On);
    }

    /// Ends the claiming. Requests that are held for waiting callers stay here.
    pub(super) fn end_claiming(&self) {
        self.claiming.send_if_modified(|claiming| {
            let was_on = *claiming == Claiming::On;
            if was_on {
                *claiming = Claiming::Off;
            }
            was_on
        });
    }

    /// Ends the claiming and the holding: this process begins no attempt of its own any more.
    pub(super) fn release(&self) {
        self.claiming.send_replace(Claiming::Released);
    }

    /// Whether a request that is claimed now is sent from here.
    pub(crate) fn is_claiming(&self) -> bool {
        *self.claiming.borrow() == Claiming::On && !self.is_closing()
    }

    /// Waits until the claiming is to end: with the runner's guard, or with a shutdown.
    pub(super) async fn claiming_ends(&self) {
        self.changes(|claiming| claiming != Claiming::On).await;
    }

    /// Whether a request may be held here for its next attempt.
    pub(crate) fn may_hold(&self) -> bool {
        *self.claiming.borrow() != Claiming::Released && !self.is_closing()
    }

    /// Waits until held requests are to go back to the queue.
    pub(crate) async fn holding_ends(&self) {
        self.changes(|claiming| claiming == Claiming::Released)
            .await;
    }

    /// Waits for a shutdown, or for such a change of the claiming.
    async fn changes(&self, wanted: impl Fn(Claiming) -> bool) {
        let mut claiming = self.claiming.subscribe();
        tokio::select! {
            () = self.closing() => {}
            // The sender lives as long as `self`.
            _ = claiming.wait_for(|claiming| wanted(*claiming)) => {}
        }
    }

    /// Counts a runner until the result is dropped, which is as long as the runner may bring
    /// claims.
    pub(super) fn count_runner(&self) -> watch::Receiver<()> {
        self.runners.subscribe()
    }

    /// Waits until no runner brings claims any more.
    pub(super) async fn runners_ended(&self) {
        self.runners.closed().await;
    }
}
