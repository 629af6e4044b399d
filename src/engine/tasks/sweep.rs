//! Removing rows that have outlived the retention, and requests whose time is over.
//!
//! A sweep has parts, and one that fails stops no other. Each part looks at a bounded number of
//! rows in a run. Where old rows may have to stay, a part goes through them by a cursor that it
//! keeps between runs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::engine::meter::Meter;
use crate::engine::telemetry::OwnCondition;
use crate::health::SweepPart;
use crate::status::Status;
use crate::store::sweep::{Emptied, ExpiredSlot, Old, Position};
use crate::store::{Store, StoreError};

/// Often enough for the shortest retention, seldom enough to cost nothing.
const MAX_INTERVAL: Duration = Duration::from_secs(60);
/// How many statements a part runs at most before the next part's turn. They look at a thousand
/// rows each, or delete five thousand outcomes.
const MAX_STEPS: usize = 200;
/// How many statements of a run may find little to delete.
const MAX_FRUITLESS: usize = 10;
/// How often a run tries to lock a slot.
const LOCK_TRIES: usize = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// How the parts fare, for an application's metrics.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<Vec<(SweepPart, Option<Instant>)>>);

impl Health {
    pub(crate) fn parts(&self) -> Vec<SweepPart> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = parts.iter().map(|(part, succeeded)| SweepPart {
            last_success: succeeded.map(|at| at.elapsed()),
            ..part.clone()
        });
        parts.collect()
    }

    fn note(&self, name: &'static str, result: &Result<Progress, StoreError>) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = parts.iter().position(|(part, _)| part.name == name);
        let found = found.unwrap_or_else(|| {
            let part = SweepPart {
                name,
                failures: 0,
                error: None,
                behind: false,
                last_success: None,
            };
            parts.push((part, None));
            parts.len() - 1
        });
        let (part, succeeded) = &mut parts[found];
        match result {
            Ok(progress) => {
                part.failures = 0;
                part.error = None;
                part.behind = *progress == Progress::Behind;
                *succeeded = Some(Instant::now());
            }
            Err(error) => {
                part.failures = part.failures.saturating_add(1);
                part.error = Some(error.to_string());
            }
        }
    }
}

/// What a run of a part left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Done,
    /// Rows that could have gone.
    Behind,
}

impl Progress {
    fn behind(behind: bool) -> Self {
        if behind { Self::Behind } else { Self::Done }
    }
}

/// Sweeps until the task is aborted.
pub(crate) async fn run(store: Store, health: Arc<Health>, meter: Arc<Meter>) {
    let config = store.config();
    let shortest = config.dead_letter_retention.unwrap_or(config.retention);
    let shortest = shortest.min(config.retention);
    let interval = (shortest / 24).clamp(Duration::from_secs(1), MAX_INTERVAL);
    let mut sweep = Sweep::new(store, health, meter);
    loop {
        // The jitter spreads the processes of a fleet, which may have started together.
        tokio::time::sleep(interval.mul_f64(0.5 + fastrand::f64())).await;
        // A process whose role may not change requests leaves that to others.
        if sweep.store.verify().await.is_ok() && !sweep.store.may_insert() {
            continue;
        }
        sweep.run().await;
    }
}

/// The parts of a sweep, and what they remember from run to run.
struct Sweep {
    store: Store,
    health: Arc<Health>,
    meter: Arc<Meter>,
    deadlines: Part,
    undelivered: Part,
    outcomes: Part,
    late: Part,
    attempts: Part,
    keys: Part,
    dead_letters: Part,
    order: Part,
    handlers: Part,
    destinations: Part,
    activity: Part,
    operations: Part,
    /// The last channel whose runners were looked for.
    channels_after: Option<String>,
    /// The last destination whose state was looked at.
    destinations_after: String,
    old_attempts: Cursor,
    old_keys: Cursor,
    late_after: Option<Uuid>,
    late_waiting: i64,
    /// The role may not truncate.
    denied: OwnCondition,
    /// Transactions keep a slot from being truncated.
    locked: OwnCondition,
    /// Outcomes have outlived the retention and wait for a handler.
    waiting: OwnCondition,
    /// The order of keys had to be mended.
    stuck: OwnCondition,
    /// Channels of which outcomes wait although no process has a handler.
    without_handler: BTreeSet<String>,
}

impl Sweep {
    fn new(store: Store, health: Arc<Health>, meter: Arc<Meter>) -> Self {
        Self {
            store,
            health,
            meter,
            deadlines: Part::new("deadlines"),
            undelivered: Part::new("undelivered channels"),
            outcomes: Part::new("outcomes"),
            late: Part::new("handled outcomes"),
            attempts: Part::new("attempts"),
            keys: Part::new("keys"),
            dead_letters: Part::new("dead letters"),
            order: Part::new("ordering keys"),
            handlers: Part::new("handlers"),
            destinations: Part::new("destinations"),
            activity: Part::new("activity"),
            operations: Part::new("operations"),
            channels_after: None,
            destinations_after: String::new(),
            old_attempts: Cursor::new(Old::Attempts),
            old_keys: Cursor::new(Old::Keys),
            late_after: None,
            late_waiting: 0,
            denied: OwnCondition::default(),
            locked: OwnCondition::default(),
            waiting: OwnCondition::default(),
            stuck: OwnCondition::default(),
            without_handler: BTreeSet::new(),
        }
    }

    async fn run(&mut self) {
        let ended = self.end_requests().await;
        self.deadlines.note(&self.store, &self.health, &ended);
        let given_up = self.give_up_undelivered().await;
        self.undelivered.note(&self.store, &self.health, &given_up);
        let emptied = self.empty_slots().await;
        self.outcomes.note(&self.store, &self.health, &emptied);
        let deleted = self.delete_handled().await;
        self.late.note(&self.store, &self.health, &deleted);
        let swept = self.old_attempts.advance(&self.store).await;
        self.attempts.note(&self.store, &self.health, &swept);
        let swept = self.old_keys.advance(&self.store).await;
        self.keys.note(&self.store, &self.health, &swept);
        let purged = self.purge_expired().await;
        self.dead_letters.note(&self.store, &self.health, &purged);
        let mended = self.mend_order().await;
        self.order.note(&self.store, &self.health, &mended);
        let looked = self.look_for_handlers().await;
        self.handlers.note(&self.store, &self.health, &looked);
        let forgotten = self.forget_destinations().await;
        self.destinations
            .note(&self.store, &self.health, &forgotten);
        let swept = self.delete_activity().await;
        self.activity.note(&self.store, &self.health, &swept);
        let pruned = self.prune_operations().await;
        self.operations.note(&self.store, &self.health, &pruned);
    }

    /// Deletes old records of changes, and operations that finished long ago.
    async fn prune_operations(&self) -> Result<Progress, StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.prune_operations().await? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Behind)
    }

    async fn delete_activity(&self) -> Result<Progress, StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.sweep_activity().await? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Behind)
    }

    async fn forget_destinations(&mut self) -> Result<Progress, StoreError> {
        for _ in 0..MAX_STEPS {
            let after = &self.destinations_after;
            let (next, is_fruitful) = self.store.settle_destinations(after).await?;
            let is_done = next.is_none();
            self.destinations_after = next.unwrap_or_default();
            if is_done || !is_fruitful {
                break;
            }
        }
        for _ in 0..MAX_STEPS {
            if !self.store.forget_destinations().await? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Behind)
    }

    async fn look_for_handlers(&mut self) -> Result<Progress, StoreError> {
        let found: BTreeSet<_> = self
            .store
            .channels_without_handler()
            .await?
            .into_iter()
            .collect();
        for channel in found.difference(&self.without_handler) {
            tracing::warn!(
                channel,
                "outcomes wait for a handler, and no process has one; subscribe again, or call \
                 `unsubscribe_outcomes`"
            );
        }
        for channel in self.without_handler.difference(&found) {
            tracing::info!(
                channel,
                "no outcome waits for a handler that is gone any more"
            );
        }
        self.without_handler = found;
        Ok(Progress::Done)
    }

    async fn purge_expired(&self) -> Result<Progress, StoreError> {
        let mut purged = 0;
        let mut result = Ok(Progress::Behind);
        for _ in 0..MAX_STEPS {
            match self.store.purge_expired().await {
                Ok((deleted, more)) => {
                    purged += deleted;
                    if !more {
                        result = Ok(Progress::Done);
                        break;
                    }
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        if purged > 0 {
            tracing::info!(purged, "dead letters have expired and were deleted");
        }
        result
    }

    async fn mend_order(&mut self) -> Result<Progress, StoreError> {
        let mended = self.store.mend_order().await?;
        if mended == 0 {
            self.stuck.ends();
        } else if self.stuck.begins() {
            tracing::warn!(
                mended,
                "ordering keys were stuck: their first requests could not be claimed"
            );
        } else {
            tracing::debug!(mended, "more ordering keys were stuck");
        }
        Ok(Progress::Done)
    }

    async fn end_requests(&self) -> Result<Progress, StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.sweep_deadlines().await? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Behind)
    }

    /// Gives up requests that no runner has delivered in their time.
    async fn give_up_undelivered(&mut self) -> Result<Progress, StoreError> {
        self.channels_after = self
            .store
            .note_channels(self.channels_after.as_deref())
            .await?;
        let mut behind = false;
        let mut steps = MAX_STEPS;
        for channel in self.store.noted_channels().await? {
            let mut requests = 0;
            // Each channel has one step at least.
            let result = loop {
                match self.store.sweep_channel(&channel).await {
                    Ok((given_up, more)) => {
                        requests += given_up;
                        if !more || steps == 0 {
                            break Ok(more);
                        }
                        steps -= 1;
                    }
                    Err(error) => break Err(error),
                }
            };
            if requests > 0 {
                self.meter.ended(&channel.name, Status::Discarded, requests);
                tracing::warn!(
                    channel = channel.name,
                    requests,
                    "requests were given up, because no runner has delivered their channel"
                );
            }
            behind |= result?;
        }
        Ok(Progress::behind(behind))
    }

    async fn empty_slots(&mut self) -> Result<Progress, StoreError> {
        let (mut denied, mut locked, mut behind) = (false, false, false);
        for slot in self.store.expired_slots().await? {
            if slot.live && !slot.overdue {
                // Soon the slot can be truncated as a whole.
                continue;
            }
            self.move_unhandled(slot).await?;
            let emptied = if slot.live {
                Emptied::Live
            } else {
                self.empty_slot(slot).await?
            };
            denied |= emptied == Emptied::Denied;
            locked |= emptied == Emptied::Locked && slot.overdue;
            if emptied != Emptied::Now && slot.overdue {
                behind |= self.delete_expired(slot).await? == Progress::Behind;
            }
        }
        if denied && self.denied.begins() {
            tracing::warn!(
                "the role may not TRUNCATE the partitions of outcomes; expired outcomes are \
                 deleted row by row"
            );
        } else if !denied {
            self.denied.ends();
        }
        if locked && self.locked.begins() {
            tracing::warn!(
                "a long transaction keeps expired outcomes from being truncated; they are deleted \
                 row by row"
            );
        } else if !locked {
            self.locked.ends();
        }
        Ok(Progress::behind(behind))
    }

    async fn move_unhandled(&self, slot: ExpiredSlot) -> Result<(), StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.move_unhandled(slot).await? {
                break;
            }
        }
        Ok(())
    }

    /// Each try waits for a moment only, because other sessions wait behind it.
    async fn empty_slot(&self, slot: ExpiredSlot) -> Result<Emptied, StoreError> {
        for _ in 1..LOCK_TRIES {
            let emptied = self.store.empty_slot(slot).await?;
            if emptied != Emptied::Locked {
                return Ok(emptied);
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        }
        self.store.empty_slot(slot).await
    }

    async fn delete_expired(&self, slot: ExpiredSlot) -> Result<Progress, StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.delete_expired(slot).await? {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::Behind)
    }

    async fn delete_handled(&mut self) -> Result<Progress, StoreError> {
        for _ in 0..MAX_FRUITLESS {
            let (last, waiting) = self.store.delete_handled(self.late_after).await?;
            self.late_after = last;
            self.late_waiting += waiting;
            if last.is_none() {
                let waiting = std::mem::take(&mut self.late_waiting);
                if waiting == 0 {
                    self.waiting.ends();
                } else if self.waiting.begins() {
                    tracing::warn!(
                        waiting,
                        "outcomes are kept beyond the retention until their handlers take them"
                    );
                }
                break;
            }
        }
        Ok(Progress::Done)
    }
}

/// A part of the sweep. Its failures are one condition, however long they last.
struct Part {
    name: &'static str,
    failing: OwnCondition,
}

impl Part {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            failing: OwnCondition::default(),
        }
    }

    fn note(&mut self, store: &Store, health: &Health, result: &Result<Progress, StoreError>) {
        if result.is_err() && store.is_closed() {
            // A shutdown came in between.
            return;
        }
        health.note(self.name, result);
        match result {
            Ok(_) => {
                if self.failing.ends() {
                    tracing::info!(part = self.name, "the sweep of old rows works again");
                }
            }
            Err(error) => {
                if self.failing.begins() {
                    tracing::warn!(part = self.name, %error, "the sweep of old rows fails");
                }
            }
        }
    }
}

/// Two passes over rows that are old and may have to stay. One follows the rows as they get old.
/// The other goes over all of them again and again, a step in a run, and finds those whose time
/// came later.
struct Cursor {
    rows: Old,
    new: Position,
    again: Position,
}

impl Cursor {
    fn new(rows: Old) -> Self {
        Self {
            rows,
            new: None,
            again: None,
        }
    }

    async fn advance(&mut self, store: &Store) -> Result<Progress, StoreError> {
        let mut fruitless = 0;
        let mut progress = Progress::Behind;
        for _ in 0..MAX_STEPS {
            let done = store.sweep_old(self.rows, self.new).await?;
            fruitless += usize::from(!done.fruitful);
            if done.next.is_none() {
                progress = Progress::Done;
                break;
            }
            self.new = done.next;
            if fruitless >= MAX_FRUITLESS {
                break;
            }
        }
        for _ in 0..MAX_STEPS {
            let done = store.sweep_old(self.rows, self.again).await?;
            self.again = done.next;
            if done.next.is_none() || !done.fruitful {
                break;
            }
        }
        Ok(progress)
    }
}
