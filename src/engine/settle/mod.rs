//! The settle lane: records the results of attempts, many at a time.
//!
//! No result is dropped: while the database fails, the lane keeps its results and tries again, and
//! results that are refused by the row are [`held`] beside it. Waiters are woken, and other
//! processes notified, only after the commit.

mod held;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlxmq::CurrentJob;
use tokio::sync::{Notify, mpsc, oneshot};
use uuid::Uuid;

use crate::codec::Unreadable;
use crate::engine::attempt::Driver;
use crate::engine::attempt::leases::{Lease, Leases};
use crate::engine::attempt::slots::Unsettled;
use crate::engine::attempt::waiters::Waiters;
use crate::engine::lane::{self, Item};
use crate::engine::meter::Meter;
use crate::engine::runner::polls::Polls;
use crate::engine::supervise::{Panics, Restarts};
use crate::engine::telemetry::{Condition, Failures, Lasting, LineLimit};
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::recorder::BatchKind;
use crate::response::Response;
use crate::status::Status;
use crate::store::enqueue::RUNNER_WAIT;
use crate::store::settle::{Failure, Fence, Finish, Finished, Park, PutBack, SettledRow, WaitsFor};
use crate::store::{Store, StoreError};

use held::Held as HeldResults;

const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// The name of the task that writes held results.
const HELD: &str = "held results";

/// A result on its way into the database.
pub(crate) struct Settlement {
    pub(crate) lease: Arc<Lease>,
    pub(crate) result: AttemptResult,
    /// Whether anything waits for the commit.
    pub(crate) urgent: bool,
    /// Dropped after the commit: until then sqlxmq's runner counts the request as running.
    pub(crate) current: Option<CurrentJob>,
    /// How often the database has refused this result alone.
    pub(crate) refusals: u32,
    pub(crate) unsettled: Unsettled,
    /// Keeps the runtime that the result is written on: without it, the runtime could end with the
    /// last handle.
    pub(crate) _driver: Arc<Driver>,
}

pub(crate) enum AttemptResult {
    Finish {
        /// Shared with the statement that writes it.
        outcome: Arc<Outcome>,
        /// The destination of a dead letter, for its log line.
        destination: Option<Box<str>>,
        ends: Ends,
    },
    PutBack {
        delay: Duration,
        /// Receives the claim after the commit, if this process holds it for the next attempt.
        hold: Option<oneshot::Sender<Held>>,
        waits_for: WaitsFor,
        uncounted: bool,
        failure: Option<Box<Failure>>,
    },
    /// This version can't read the request. No attempt was made, and none is counted.
    Park {
        reason: Unreadable,
        channel: Arc<str>,
    },
}

/// What a finished request is measured by.
#[derive(Debug)]
pub(crate) struct Ends {
    /// When the request was enqueued, by this process's clock.
    pub(crate) enqueued: Instant,
    /// Its destination, as the recorder is told it.
    pub(crate) label: Option<Arc<str>>,
}

impl AttemptResult {
    /// No attempt was made, because the destination takes no more now. `counted` says whether the
    /// database has counted one.
    pub(crate) fn deferred(counted: bool) -> Self {
        Self::PutBack {
            delay: Duration::ZERO,
            hold: None,
            waits_for: WaitsFor::Destination,
            uncounted: counted,
            failure: None,
        }
    }

    /// No attempt was made, because there is no budget for a retry. `counted` says whether the
    /// database has counted one.
    pub(crate) fn over_budget(delay: Duration, counted: bool) -> Self {
        Self::PutBack {
            delay,
            hold: None,
            waits_for: WaitsFor::Budget,
            uncounted: counted,
            failure: None,
        }
    }

    /// How many bytes the result has, about.
    pub(crate) fn size(&self) -> usize {
        let (response, text) = match self {
            Self::Finish { outcome, .. } => (
                outcome.response.as_ref(),
                outcome.fault.as_ref().map(|fault| &fault.text),
            ),
            Self::PutBack { failure, .. } => (
                failure.as_ref().and_then(|f| f.response.as_ref()),
                failure.as_ref().map(|failure| &failure.text),
            ),
            Self::Park { .. } => (None, None),
        };
        response.map_or(0, Response::size) + text.map_or(0, String::len)
    }

    /// Whether this process keeps the request for its next attempt.
    pub(crate) fn is_held(&self) -> bool {
        matches!(self, Self::PutBack { hold: Some(_), .. })
    }
}

/// A claim that this process holds for the next attempt.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lease: Arc<Lease>,
    pub(crate) attempts: u32,
}

impl Settlement {
    fn is_finish(&self) -> bool {
        matches!(self.result, AttemptResult::Finish { .. })
    }

    fn is_park(&self) -> bool {
        matches!(self.result, AttemptResult::Park { .. })
    }

    /// What is written of a result that finishes its request.
    fn finish(&self) -> Option<Finish> {
        match &self.result {
            AttemptResult::Finish { outcome, .. } => {
                Some((self.lease.fence(), Arc::clone(outcome)))
            }
            AttemptResult::PutBack { .. } | AttemptResult::Park { .. } => None,
        }
    }

    /// What is written of a result that puts its request back.
    fn put_back(&self) -> Option<PutBack> {
        match &self.result {
            AttemptResult::Finish { .. } | AttemptResult::Park { .. } => None,
            AttemptResult::PutBack {
                delay,
                hold,
                waits_for,
                uncounted,
                failure,
            } => Some(PutBack {
                fence: self.lease.fence(),
                delay: *delay,
                hold: hold.is_some(),
                waits_for: *waits_for,
                uncounted: *uncounted,
                failure: failure.as_deref().cloned(),
            }),
        }
    }

    /// What [`drop_data`](Self::drop_data) removes from.
    fn data(&self) -> Data {
        match &self.result {
            AttemptResult::Finish { outcome, .. } => Data::Outcome(Arc::clone(outcome)),
            AttemptResult::PutBack { failure, .. } => Data::Failure(failure.clone()),
            AttemptResult::Park { .. } => Data::Failure(None),
        }
    }

    /// Puts back what was removed.
    fn restore(&mut self, data: Data) {
        match (&mut self.result, data) {
            (AttemptResult::Finish { outcome, .. }, Data::Outcome(whole)) => *outcome = whole,
            (AttemptResult::PutBack { failure, .. }, Data::Failure(whole)) => *failure = whole,
            _ => {}
        }
    }

    /// Removes data that the database may have refused: the body, then the rest of the response,
    /// then the error text. `false` if there is nothing left to remove.
    fn drop_data(&mut self) -> bool {
        const REFUSED: &str = "the database refused the error text";
        let (response, text) = match &mut self.result {
            AttemptResult::Finish { outcome, .. } => {
                let outcome = Arc::make_mut(outcome);
                if outcome.drop_body() {
                    return true;
                }
                let fault = outcome.fault.get_or_insert_default();
                (&mut outcome.response, &mut fault.text)
            }
            AttemptResult::PutBack {
                failure: Some(failure),
                ..
            } => (&mut failure.response, &mut failure.text),
            AttemptResult::PutBack { failure: None, .. } | AttemptResult::Park { .. } => {
                return false;
            }
        };
        if response.take().is_some() {
            return true;
        }
        let text_refused = text == REFUSED;
        REFUSED.clone_into(text);
        !text_refused
    }
}

/// The data of a result.
#[derive(Clone)]
enum Data {
    Outcome(Arc<Outcome>),
    Failure(Option<Box<Failure>>),
}

/// Why a batch was not written.
#[derive(Debug)]
enum Unwritten {
    Refused(StoreError),
    /// This process failed to write it. The panic has been logged.
    Panicked,
}

impl Unwritten {
    /// Whether a part of the batch may be written alone.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_refusal(),
            Self::Panicked => true,
        }
    }

    /// Whether a result may be written without its data.
    fn is_data(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_data(),
            Self::Panicked => true,
        }
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => error.fmt(f),
            Self::Panicked => f.write_str("writing it panicked"),
        }
    }
}

impl Item for Settlement {
    fn size(&self) -> usize {
        self.unsettled.bytes()
    }

    fn is_urgent(&self) -> bool {
        self.urgent
    }
}

/// What the settle lane works with. It holds no sender, so the lane ends with the driver.
#[derive(Debug)]
pub(crate) struct Settler {
    store: Store,
    panics: Arc<Panics>,
    instance: Uuid,
    leases: Arc<Leases>,
    waiters: Arc<Waiters>,
    polls: Arc<Polls>,
    meter: Arc<Meter>,
    /// Notified when requests have finished here.
    finished: Notify,
    /// Results that came too late to count.
    stale_results: AtomicU64,
    failing: Condition,
    refused: Failures,
    given_up: LineLimit,
    /// The same for requests that were parked.
    parked: LineLimit,
}

impl Settler {
    pub(crate) fn new(
        store: Store,
        panics: Arc<Panics>,
        instance: Uuid,
        leases: Arc<Leases>,
        waiters: Arc<Waiters>,
        polls: Arc<Polls>,
        meter: Arc<Meter>,
    ) -> Self {
        Self {
            store,
            panics,
            instance,
            leases,
            waiters,
            polls,
            meter,
            finished: Notify::new(),
            stale_results: AtomicU64::new(0),
            failing: Condition::default(),
            refused: Failures::default(),
            given_up: LineLimit::default(),
            parked: LineLimit::default(),
        }
    }

    /// Notified when requests have finished here.
    pub(crate) fn finished(&self) -> &Notify {
        &self.finished
    }

    /// How many results changed nothing, because their claims were no longer the latest.
    #[cfg(feature = "testkit")]
    pub(crate) fn stale_results(&self) -> u64 {
        self.stale_results.load(Ordering::Relaxed)
    }

    /// Runs until the last sender is gone and everything is settled.
    pub(crate) async fn run(self: Arc<Self>, incoming: mpsc::UnboundedReceiver<Settlement>) {
        // Not in `self`: a held result keeps the driver, which has the settler. What is held keeps
        // the lane's last sender, so the lane ends after it.
        let held = Arc::new(HeldResults::default());
        let lane = lane::run(&self.panics, "settle", incoming, |batch| {
            let (settler, held) = (Arc::clone(&self), Arc::clone(&held));
            async move { settler.write(batch, &held).await }
        });
        tokio::select! {
            () = lane => {}
            () = self.write_held(&held) => {}
        }
    }

    /// Writes held results again and again, until it is dropped.
    async fn write_held(&self, held: &HeldResults) {
        let mut restarts = Restarts::new(&self.panics, HELD);
        loop {
            let writing = async {
                loop {
                    let due = held.due().await;
                    self.write_due(due, held).await;
                }
            };
            self.panics.catch::<()>(HELD, writing).await;
            restarts.pause().await;
        }
    }

    async fn write_due(&self, mut due: Vec<Settlement>, held: &HeldResults) {
        if self.store.is_closed() {
            // After a shutdown, other processes take over.
            held.clear();
            return;
        }
        if held.are_all_refused() && due.len() > 1 {
            // One of them shows whether anything has changed.
            let rest = due.split_off(1);
            self.write(due, held).await;
            if held.are_all_refused() {
                return held.add_all(rest);
            }
            due = rest;
        }
        self.write(due, held).await;
    }

    /// Writes a batch, splitting it down to the rows that the database refuses. They are held.
    async fn write(&self, mut batch: Vec<Settlement>, held: &HeldResults) {
        // The statements lock rows in the order of their ids.
        batch.sort_unstable_by_key(|settlement| settlement.lease.id);
        let mut stack = vec![batch];
        let mut pause = RETRY_MIN;
        let mut failing = None;
        while let Some(mut batch) = stack.pop() {
            let error = match self.try_write(&mut batch).await {
                Ok(()) => {
                    held.note_accepted();
                    pause = RETRY_MIN;
                    if failing.take().is_some_and(Lasting::ends) {
                        tracing::info!("results are settled again");
                    }
                    continue;
                }
                Err(error) => error,
            };
            if !error.is_refusal() {
                if failing.is_none() {
                    let (lasting, first) = self.failing.begins();
                    failing = Some(lasting);
                    if first {
                        tracing::warn!(%error, "results can't be settled and are tried again");
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
                if self.store.is_closed() {
                    // After a shutdown, other processes take over.
                    return;
                }
                stack.push(batch);
            } else if batch.len() == 1 {
                if let Some(settlement) = batch.pop() {
                    self.write_refused(settlement, error, held).await;
                }
            } else if held.are_all_refused() {
                held.add_all(batch);
            } else {
                let half = batch.split_off(batch.len() / 2);
                stack.push(half);
                stack.push(batch);
            }
        }
    }

    /// Writes a result that was refused without its data. If it is refused without as well, its
    /// data is not the reason, and it is held as it was. Dropped, its request would be sent again,
    /// after an answer.
    async fn write_refused(
        &self,
        settlement: Settlement,
        mut error: Unwritten,
        held: &HeldResults,
    ) {
        let id = settlement.lease.id;
        let mut batch = vec![settlement];
        if error.is_data() {
            let whole = batch[0].data();
            while error.is_data() && batch[0].drop_data() {
                // Not written at once: what refused the whole result may be over by now, and then
                // nothing of it is to be lost.
                if let Err(refused) = self.try_out(&batch[0]).await {
                    error = refused;
                    continue;
                }
                let reduced = batch[0].data();
                batch[0].restore(whole.clone());
                match self.try_write(&mut batch).await {
                    Ok(()) => return held.note_accepted(),
                    Err(_) if batch.is_empty() => return,
                    Err(refused) => error = refused,
                }
                batch[0].restore(reduced);
                match self.try_write(&mut batch).await {
                    Ok(()) => {
                        if self.refused.is_news(id) {
                            tracing::error!(
                                %id, %error,
                                "the database refused a result; it was settled without its data"
                            );
                        }
                        self.refused.recovers(id);
                        return held.note_accepted();
                    }
                    Err(_) if batch.is_empty() => return,
                    Err(refused) => error = refused,
                }
            }
            batch[0].restore(whole);
        }
        let Some(settlement) = batch.pop() else {
            return;
        };
        if self.refused.is_news(id) {
            tracing::error!(
                %id, %error,
                "the database refuses a result, whatever its data; it is held and written again"
            );
        }
        held.add_refused(settlement);
    }

    /// Whether the database would take a result. Nothing is changed.
    async fn try_out(&self, settlement: &Settlement) -> Result<(), Unwritten> {
        let tried = if let Some(finish) = settlement.finish() {
            self.store.try_finish(&finish, settlement.size()).await
        } else if let Some(put_back) = settlement.put_back() {
            self.store.try_put_back(&put_back, settlement.size()).await
        } else {
            Ok(())
        };
        tried.map_err(Unwritten::Refused)
    }

    /// Writes the batch once. A panic is noted, and refuses it.
    async fn try_write(&self, batch: &mut Vec<Settlement>) -> Result<(), Unwritten> {
        let refused: Vec<_> = batch
            .iter()
            .filter(|settlement| settlement.refusals > 0)
            .map(|settlement| settlement.lease.id)
            .collect();
        let (size, began) = (batch.len(), Instant::now());
        let written = self.panics.catch("settle", self.write_once(batch)).await;
        let is_written = matches!(written, Some(Ok(()))) || batch.is_empty();
        self.meter
            .batch_written(BatchKind::Settle, size, began, is_written);
        match written {
            Some(Ok(())) => {
                for id in &refused {
                    self.refused.recovers(*id);
                }
                if !refused.is_empty() {
                    tracing::info!(
                        count = refused.len(),
                        "results that were refused are settled"
                    );
                }
                Ok(())
            }
            Some(Err(error)) => Err(Unwritten::Refused(error)),
            // It panicked after the commit.
            None if batch.is_empty() => Ok(()),
            None => Err(Unwritten::Panicked),
        }
    }

    /// Writes the batch, and takes the settlements out of it as they are committed.
    async fn write_once(&self, batch: &mut Vec<Settlement>) -> Result<(), StoreError> {
        let mut wakeups = Wakeups::default();
        while !batch.is_empty() {
            if batch.iter().any(Settlement::is_park) {
                self.write_parks(batch).await?;
            } else if batch.iter().any(Settlement::is_finish) {
                self.write_finishes(batch, &mut wakeups).await?;
            } else {
                self.write_put_backs(batch, &mut wakeups).await?;
            }
        }
        wakeups.send(&self.store).await;
        Ok(())
    }

    async fn write_finishes(
        &self,
        batch: &mut Vec<Settlement>,
        wakeups: &mut Wakeups,
    ) -> Result<(), StoreError> {
        let finishes: Vec<_> = batch.iter().filter_map(Settlement::finish).collect();
        let bytes = batch.iter().map(Settlement::size).sum();
        let finished = self.store.finish(&finishes, bytes).await?;
        // Dropped now, so that each waiter can get its outcome without a copy.
        let fences: Vec<_> = finishes.into_iter().map(|(fence, _)| fence).collect();
        wakeups.add_finished(self.instance, &finished);
        // By claim: the batch may also have an earlier claim of the same request.
        let mut finished: HashMap<Fence, Finished> = finished
            .into_iter()
            .map(|finished| (finished.row.fence, finished))
            .collect();
        let (written, rest) = std::mem::take(batch)
            .into_iter()
            .partition(Settlement::is_finish);
        *batch = rest;
        let mut unsettled = Vec::new();
        // `fences` was made from `written`, in the same order.
        for (settlement, fence) in written.into_iter().zip(fences) {
            let Some(finished) = finished.remove(&fence) else {
                unsettled.push((settlement, fence));
                continue;
            };
            self.leases.remove(&settlement.lease);
            if let AttemptResult::Finish {
                outcome,
                destination,
                ends,
            } = settlement.result
            {
                let row = &finished.row;
                self.meter.finished(
                    &row.channel,
                    ends.label.as_deref(),
                    outcome.status,
                    row.attempts,
                    ends.enqueued,
                );
                self.log_dead_letter(&outcome, &finished.row, destination.as_deref());
                self.waiters
                    .wake(fence.id, || completed(outcome, finished, destination));
            }
        }
        self.finished.notify_waiters();
        self.reclassify_unsettled(unsettled, batch).await;
        Ok(())
    }

    /// Sorts out results whose claims aren't the latest. Results whose requests a poll of this
    /// process claimed again count under the new number, and go back into the batch. The others are
    /// stale.
    async fn reclassify_unsettled(
        &self,
        unsettled: Vec<(Settlement, Fence)>,
        batch: &mut Vec<Settlement>,
    ) {
        if unsettled.is_empty() {
            return;
        }
        if self.any_pending(&unsettled).await {
            // After an outage that outlasted the lease, a poll's claims may be on their way here.
            self.polls.wait_for_polls().await;
        }
        let mut stale = Vec::new();
        for (settlement, fence) in unsettled {
            if settlement.lease.fence() != fence {
                batch.push(settlement);
                continue;
            }
            self.leases.remove(&settlement.lease);
            stale.push(fence.id);
        }
        self.count_stale(stale);
    }

    /// Whether one of the requests has not finished. Without an answer one may not have.
    async fn any_pending(&self, unsettled: &[(Settlement, Fence)]) -> bool {
        let ids: Vec<_> = unsettled.iter().map(|(_, fence)| fence.id).collect();
        self.store.any_pending(&ids).await.unwrap_or(true)
    }

    async fn write_put_backs(
        &self,
        batch: &mut Vec<Settlement>,
        wakeups: &mut Wakeups,
    ) -> Result<(), StoreError> {
        let put_backs: Vec<_> = batch.iter().filter_map(Settlement::put_back).collect();
        let bytes = batch.iter().map(Settlement::size).sum();
        let settled = self.store.put_back(&put_backs, bytes).await?;
        let mut settled: HashMap<Fence, SettledRow> =
            settled.into_iter().map(|row| (row.fence, row)).collect();
        let mut returned = Vec::new();
        let mut unsettled = Vec::new();
        for (settlement, put_back) in std::mem::take(batch).into_iter().zip(put_backs) {
            let fence = put_back.fence;
            let Some(row) = settled.remove(&fence.next()) else {
                unsettled.push((settlement, fence));
                continue;
            };
            self.leases.remove(&settlement.lease);
            let AttemptResult::PutBack { delay, hold, .. } = settlement.result else {
                continue;
            };
            let Some(hold) = hold else {
                returned.push(row.fence.id);
                if delay < RUNNER_WAIT {
                    wakeups.runners.push(row.channel.into());
                }
                continue;
            };
            let held = Held {
                lease: self
                    .leases
                    .insert(row.fence, None, settlement.lease.give_room()),
                attempts: row.attempts,
            };
            if let Err(held) = hold.send(held) {
                // No task is left to make the attempt. Another runner makes it, once the due time
                // and the lease have passed.
                self.leases.remove(&held.lease);
            }
        }
        // Waiters of requests that went back into the queue must listen for their outcomes.
        self.waiters.fetch_soon(returned);
        self.reclassify_unsettled(unsettled, batch).await;
        Ok(())
    }

    async fn write_parks(&self, batch: &mut Vec<Settlement>) -> Result<(), StoreError> {
        let parks: Vec<_> = batch
            .iter()
            .filter_map(|settlement| match &settlement.result {
                AttemptResult::Park { reason, .. } => Some(Park {
                    fence: settlement.lease.fence(),
                    reason: reason.clone(),
                }),
                AttemptResult::Finish { .. } | AttemptResult::PutBack { .. } => None,
            })
            .collect();
        let parked = self.store.park(&parks).await?;
        let (written, rest) = std::mem::take(batch)
            .into_iter()
            .partition(Settlement::is_park);
        *batch = rest;
        let mut returned = Vec::new();
        let mut unsettled = Vec::new();
        // `parks` was made from `written`, and `parked` from `parks`, in the same order.
        for ((settlement, park), parked) in written.into_iter().zip(parks).zip(parked) {
            let Some(parked) = parked else {
                unsettled.push((settlement, park.fence));
                continue;
            };
            self.leases.remove(&settlement.lease);
            let AttemptResult::Park { reason, channel } = settlement.result else {
                continue;
            };
            let id = park.fence.id;
            returned.push(id);
            if parked.is_first() {
                self.log_parked(id, &channel, reason.as_str());
            } else {
                tracing::debug!(%id, next = ?parked.delay, "a request still can't be read");
            }
        }
        self.waiters.fetch_soon(returned);
        self.reclassify_unsettled(unsettled, batch).await;
        Ok(())
    }

    /// Logs a request that was parked. During a deployment there may be many.
    fn log_parked(&self, id: RequestId, channel: &str, reason: &str) {
        let sentence = "a request can't be read by this version and is parked";
        if let Some(left_out) = self.parked.allows(channel) {
            tracing::warn!(
                %id, channel, reason, left_out = (left_out > 0).then_some(left_out),
                "{sentence}"
            );
        } else {
            tracing::debug!(%id, channel, reason, "{sentence}");
        }
    }

    /// Logs a request that was given up. Operators search for this line. A receiver that is down
    /// fails many requests, and the first ones show why.
    fn log_dead_letter(&self, outcome: &Outcome, row: &SettledRow, destination: Option<&str>) {
        let sentence = match outcome.status {
            Status::Discarded => "a request was given up",
            Status::Ambiguous => "a request may have been sent and is not sent again",
            _ => return,
        };
        let response = outcome.response.as_ref();
        let answered = response.map(|response| format!("answered with {}", response.status));
        let class = outcome.fault.as_ref().map(|fault| &*fault.class);
        let reason = outcome.error().or(answered.as_deref());
        let (id, channel, attempts) = (outcome.id, &row.channel, row.attempts);
        if let Some(left_out) = self.given_up.allows(destination.unwrap_or(channel)) {
            tracing::warn!(
                %id, channel, destination, attempts, class, reason,
                left_out = (left_out > 0).then_some(left_out),
                "{sentence}"
            );
        } else {
            tracing::debug!(
                %id, channel, destination, attempts, class, reason,
                "{sentence}"
            );
        }
    }

    /// Counts results whose claims are no longer the latest. If such a request has finished, here
    /// after a lost acknowledgement or in another process, its waiters get that outcome. Otherwise
    /// the process with the latest claim wakes them.
    fn count_stale(&self, ids: Vec<RequestId>) {
        if ids.is_empty() {
            return;
        }
        self.stale_results
            .fetch_add(ids.len() as u64, Ordering::Relaxed);
        self.meter.results_stale(ids.len());
        tracing::debug!(
            count = ids.len(),
            "discarded stale results: their requests were taken over or had finished"
        );
        self.waiters.fetch_soon(ids);
    }
}

/// The outcome, with what only the database knows.
fn completed(outcome: Arc<Outcome>, finished: Finished, destination: Option<Box<str>>) -> Outcome {
    // The statement has dropped its reference.
    let mut outcome = Arc::unwrap_or_clone(outcome);
    if let Some(fault) = &mut outcome.fault {
        fault.destination = destination;
    }
    Outcome {
        attempts: finished.row.attempts,
        response: finished
            .earlier
            .map(|response| *response)
            .or(outcome.response),
        ..outcome
    }
}

/// Notifications to send once the batch has committed.
#[derive(Default)]
struct Wakeups {
    /// Finished requests, with the other instances that wait for them.
    waiters: Vec<(Uuid, RequestId)>,
    /// Channels with requests that may be claimed now.
    runners: Vec<Arc<str>>,
}

impl Wakeups {
    fn add_finished(&mut self, own: Uuid, finished: &[Finished]) {
        for Finished { row, .. } in finished {
            let waiter = row.waiter.filter(|waiter| *waiter != own);
            self.waiters
                .extend(waiter.map(|waiter| (waiter, row.fence.id)));
            if row.ordered {
                self.runners.push(row.channel.as_str().into());
            }
        }
    }

    async fn send(self, store: &Store) {
        if self.waiters.is_empty() && self.runners.is_empty() {
            return;
        }
        // After a failure, which the store logs, the other processes look by themselves soon.
        let _ = store.notify_settled(&self.waiters, &self.runners).await;
    }
}
