//! Removing rows that have outlived the retention.
//!
//! A sweep has parts, and one that fails stops no other. Each part looks at a bounded number of
//! rows in a run. Where old rows may have to stay, a part goes through them by a cursor that it
//! keeps between runs.

use std::time::Duration;

use uuid::Uuid;

use crate::engine::telemetry::OwnCondition;
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

/// Sweeps until the task is aborted.
pub(crate) async fn run(store: Store) {
    let interval = (store.config().retention / 24).clamp(Duration::from_secs(1), MAX_INTERVAL);
    let mut sweep = Sweep::new(store);
    loop {
        // The jitter spreads the processes of a fleet, which may have started together.
        tokio::time::sleep(interval.mul_f64(0.5 + fastrand::f64())).await;
        sweep.run().await;
    }
}

/// The parts of a sweep, and what they remember from run to run.
struct Sweep {
    store: Store,
    deadlines: Part,
    outcomes: Part,
    late: Part,
    attempts: Part,
    keys: Part,
    order: Part,
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
}

impl Sweep {
    fn new(store: Store) -> Self {
        Self {
            store,
            deadlines: Part::new("deadlines"),
            outcomes: Part::new("outcomes"),
            late: Part::new("handled outcomes"),
            attempts: Part::new("attempts"),
            keys: Part::new("keys"),
            order: Part::new("ordering keys"),
            old_attempts: Cursor::new(Old::Attempts),
            old_keys: Cursor::new(Old::Keys),
            late_after: None,
            late_waiting: 0,
            denied: OwnCondition::default(),
            locked: OwnCondition::default(),
            waiting: OwnCondition::default(),
        }
    }

    async fn run(&mut self) {
        let ended = self.end_requests().await;
        self.deadlines.note(&ended);
        let emptied = self.empty_slots().await;
        self.outcomes.note(&emptied);
        let deleted = self.delete_handled().await;
        self.late.note(&deleted);
        let swept = self.old_attempts.advance(&self.store).await;
        self.attempts.note(&swept);
        let swept = self.old_keys.advance(&self.store).await;
        self.keys.note(&swept);
        let mended = self.mend_order().await;
        self.order.note(&mended);
    }

    async fn mend_order(&self) -> Result<(), StoreError> {
        let mended = self.store.mend_order().await?;
        if mended > 0 {
            tracing::warn!(
                mended,
                "ordering keys were stuck: their first requests could not be claimed"
            );
        }
        Ok(())
    }

    async fn end_requests(&self) -> Result<(), StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.sweep_deadlines().await? {
                break;
            }
        }
        Ok(())
    }

    async fn empty_slots(&mut self) -> Result<(), StoreError> {
        let (mut denied, mut locked) = (false, false);
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
                self.delete_expired(slot).await?;
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
        Ok(())
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

    async fn delete_expired(&self, slot: ExpiredSlot) -> Result<(), StoreError> {
        for _ in 0..MAX_STEPS {
            if !self.store.delete_expired(slot).await? {
                break;
            }
        }
        Ok(())
    }

    async fn delete_handled(&mut self) -> Result<(), StoreError> {
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
        Ok(())
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

    fn note(&mut self, result: &Result<(), StoreError>) {
        match result {
            Ok(()) => {
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

    async fn advance(&mut self, store: &Store) -> Result<(), StoreError> {
        let mut fruitless = 0;
        for _ in 0..MAX_STEPS {
            let done = store.sweep_old(self.rows, self.new).await?;
            fruitless += usize::from(!done.fruitful);
            if done.next.is_none() {
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
        Ok(())
    }
}
