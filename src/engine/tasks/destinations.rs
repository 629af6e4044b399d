//! Exchanges what processes know of destinations through the database.
//!
//! Once a second, and at once if other processes should know soon, the task reports what attempts
//! have shown. The report changes the destination's state under a row lock. The task then reads
//! what other processes have changed, and which channels are paused. A second loop leases permits
//! and tokens whenever attempts are short of them.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::destination::{DestinationEvent, DestinationEventKind, Millis};
use crate::engine::attempt::gate::Gate;
use crate::engine::attempt::paused::PausedChannels;
use crate::engine::config::DestinationObserver;
use crate::redact::panic_text;
use crate::store::destinations::StoredDestination;
use crate::store::{Store, StoreError};

/// How often the task reports and reads.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often all destinations are read, and not only those that have changed: a row may be gone.
const ALL: Duration = Duration::from_secs(60);
/// How many of them one statement reads.
const PAGE: usize = 5000;
/// For how long they are read before it is time again for those that have changed.
const READING: Duration = Duration::from_millis(500);
/// The least time between two reports.
const PAUSE: Duration = Duration::from_millis(50);
/// How many destinations with deferred requests are looked at in one step. The next step continues
/// from there.
const STEP: usize = 256;

/// Runs until the task is aborted.
pub(crate) async fn run(
    store: Store,
    gate: Arc<Gate>,
    paused: Arc<PausedChannels>,
    instance: Uuid,
    observer: Option<DestinationObserver>,
) {
    tokio::join!(
        sync(&store, &gate, &paused, observer.as_ref()),
        lease(&store, &gate, instance)
    );
}

async fn sync(
    store: &Store,
    gate: &Gate,
    paused: &PausedChannels,
    observer: Option<&DestinationObserver>,
) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut after = String::new();
    let mut since: Option<Millis> = None;
    let mut all = All::default();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = gate.urgent.notified() => {
                // The first attempts wait for the first look.
                if gate.has_looked() {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        // A handle that delivers nothing costs the database nothing.
        if !gate.is_used() {
            continue;
        }
        report(store, gate, observer).await;
        let began = Instant::now();
        // The store logs failures.
        if let Ok(names) = store.paused_names().await {
            paused.learn(began, names);
        }
        if let Ok(changed) = store.changed_destinations(since).await {
            since = changed.first().map(|row| row.now).or(since);
            let known = changed.into_iter().filter(|row| !row.name.is_empty());
            let known: Vec<_> = known.collect();
            all.note(&known);
            gate.learn(known);
        }
        all.read(store, gate).await;
        gate.note_look();
        // Other processes, now or earlier, may have deferred requests of destinations that this one
        // doesn't know of.
        if let Ok(names) = store.deferred_destinations(&after, STEP).await {
            for name in &names {
                gate.note_deferred(name);
            }
            after = match names.last() {
                Some(last) if names.len() == STEP => last.clone(),
                _ => String::new(),
            };
        }
    }
}

/// Reads all destinations, a page after the other. What changes meanwhile is read beside it.
#[derive(Default)]
struct All {
    /// When the last one was read.
    read: Option<Instant>,
    /// The last one of the last page.
    after: String,
    /// Those that have been found since the first page.
    found: HashSet<String>,
}

impl All {
    fn is_due(&self) -> bool {
        self.read.is_none_or(|at| at.elapsed() >= ALL)
    }

    fn note(&mut self, known: &[StoredDestination]) {
        if self.is_due() {
            self.found.extend(known.iter().map(|row| row.name.clone()));
        }
    }

    /// Continues where it was if a page failed, or if there are many.
    async fn read(&mut self, store: &Store, gate: &Gate) {
        let began = Instant::now();
        // The first attempts wait for all of the first look.
        while self.is_due() && (self.read.is_none() || began.elapsed() < READING) {
            // The store logs failures.
            let Ok(page) = store.known_destinations(&self.after, PAGE).await else {
                return;
            };
            self.note(&page);
            let last = page.last().filter(|_| page.len() == PAGE);
            let next = last.map(|row| row.name.clone());
            gate.learn(page);
            if next.is_none() {
                gate.forget_others(&std::mem::take(&mut self.found));
                self.read = Some(Instant::now());
            }
            self.after = next.unwrap_or_default();
        }
    }
}

async fn report(store: &Store, gate: &Gate, observer: Option<&DestinationObserver>) {
    let mut reports = gate.take_reports();
    if reports.is_empty() {
        return;
    }
    reports.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    let names: Vec<&str> = reports.iter().map(|(name, _, _)| &**name).collect();
    let by_name: HashMap<&str, _> = reports.iter().map(|report| (&*report.0, report)).collect();
    let mut events = Vec::new();
    let changed: Result<_, StoreError> = store
        .change_destinations(&names, |row| {
            let Some((_, policy, report)) = by_name.get(&*row.name) else {
                return false;
            };
            let policy = row.policy.as_ref().unwrap_or(policy);
            let before = row.state.clone();
            let happened = row.state.apply(policy, report, row.now);
            events.extend(happened.into_iter().map(|kind| (row.name.clone(), kind)));
            row.state != before
        })
        .await;
    match changed {
        Ok(rows) => {
            gate.learn(rows);
            for (name, kind) in events {
                tell(observer, &name, kind);
            }
        }
        Err(_) => gate.restore_reports(&reports),
    }
}

/// Logs an event, and passes it to the application's observer.
pub(crate) fn tell(observer: Option<&DestinationObserver>, name: &str, kind: DestinationEventKind) {
    tracing::info!(destination = name, event = ?kind, "a destination has changed");
    let Some(observer) = observer else {
        return;
    };
    let event = DestinationEvent::new(name.into(), kind);
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (observer.0)(&event))) {
        let error = panic_text(&*panic);
        tracing::error!(destination = name, error, "a hook panicked");
    }
}

async fn lease(store: &Store, gate: &Gate, instance: Uuid) {
    loop {
        let next = gate.next_ask().unwrap_or_else(|| Instant::now() + INTERVAL);
        let next = next.min(Instant::now() + INTERVAL);
        tokio::select! {
            () = gate.wanting.notified() => {}
            () = tokio::time::sleep_until(next.into()) => {}
        }
        let asks = gate.asks();
        if asks.is_empty() {
            continue;
        }
        let asked = Instant::now();
        let grants = store.lease_destinations(instance, &asks).await.ok();
        gate.answer(asked, &asks, grants.as_ref());
    }
}
