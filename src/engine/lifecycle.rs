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

#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
    /// Whether a runner claims here, so that this process may make first attempts.
    claiming: watch::Sender<bool>,
    /// Has a receiver for each runner that may still bring claims.
    runners: watch::Sender<()>,
}

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self {
            phase: watch::Sender::new(Phase::Open),
            claiming: watch::Sender::new(false),
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

    pub(super) fn set_claiming(&self, claiming: bool) {
        self.claiming.send_replace(claiming);
    }

    /// Whether a request that is claimed now is sent from here.
    pub(crate) fn is_claiming(&self) -> bool {
        *self.claiming.borrow() && !self.is_closing()
    }

    /// Waits until the claiming is to end: with the runner's guard, or with a shutdown.
    pub(super) async fn claiming_ends(&self) {
        let mut claiming = self.claiming.subscribe();
        tokio::select! {
            () = self.closing() => {}
            // The sender lives as long as `self`.
            _ = claiming.wait_for(|claiming| !claiming) => {}
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
