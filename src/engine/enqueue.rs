//! The enqueue lane: persists requests, many at a time.
//!
//! If the database refuses a batch, it is split down to the one bad row, which alone fails.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

use super::Engine;
use super::attempt::Driver;
use super::attempt::bodies::Room;
use super::attempt::caller_client::{self, CallerClient};
use super::attempt::claim::Claim;
use super::attempt::drive::drive_by_engine;
use super::attempt::job::Job;
use super::attempt::slots::{NoSlot, Slot};
use super::attempt::waiters::Waiter;
use super::backoff::{BusyPause, RETRY_UNKNOWN_FOR};
use super::budget::Share;
use super::keys::BusyKeys;
use super::lane;
use super::meter::Meter;
use super::supervise::Panics;
use super::tasks::channels::UsedChannels;
use crate::error::{Error, Kind};
use crate::id::RequestId;
use crate::options::Guarantee;
use crate::outcome::Outcome;
use crate::recorder::{BatchKind, LimitedHow};
use crate::repetition::Marker;
use crate::runtime::BoxFuture;
use crate::store::enqueue::{Initial, Inserted, NewRequest};
use crate::store::{Store, StoreError};
use crate::trace_context::EnqueueSpan;

/// The first pause before an insert with an unknown outcome is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(10);

/// A request on its way into the database.
pub(crate) struct Submission {
    row: NewRequest,
    /// The first attempt, if this process makes it at once. Otherwise a runner claims the request.
    start: Option<Start>,
    /// Told after the commit.
    done: Done,
}

/// Gets the id of the persisted request: the new one, or an earlier one with the same key.
struct Done {
    sender: oneshot::Sender<Result<RequestId, Error>>,
    /// When the request was handed in.
    since: Instant,
    /// The span of the enqueue ends with it.
    span: Option<EnqueueSpan>,
    /// Given back once the request is persisted or refused.
    _share: Share,
}

impl Done {
    /// A caller that is gone cancels nothing.
    fn send(self, persisted: Result<RequestId, Error>) {
        if let Some(span) = self.span {
            span.end(persisted.as_ref().copied());
        }
        let _ = self.sender.send(persisted);
    }
}

/// What the first attempt needs, which follows the insert at once.
struct Start {
    driver: Arc<Driver>,
    slot: Slot,
    /// For a large body.
    room: Option<Room>,
    job: Job,
    /// The client that a fired request came through.
    client: Option<CallerClient>,
    /// The caller's span, for a call without a client of its own.
    span: Span,
}

impl Engine {
    /// Enqueues a request that no caller waits for. If a slot is free, this process makes the first
    /// attempt at once, through `client` or the default transport. If an `earlier` call has
    /// persisted the request already, it stays as it is.
    pub(crate) fn submit(
        &self,
        row: NewRequest,
        job: Job,
        client: Option<CallerClient>,
        earlier: Option<Marker>,
        span: Option<EnqueueSpan>,
    ) -> Result<Submitted, Error> {
        let has_client = client.is_some();
        self.hand_in(row, job, (client, has_client), earlier, span)
    }

    /// Enqueues a request and waits for its outcome. While the caller waits, every attempt that
    /// this process makes goes through `client`, if there is one. `earlier` is as for
    /// [`submit`](Self::submit).
    pub(crate) fn submit_awaited(
        self: &Arc<Self>,
        row: NewRequest,
        job: Job,
        client: Option<CallerClient>,
        earlier: Option<Marker>,
        span: Option<EnqueueSpan>,
    ) -> Result<AwaitOutcome, Error> {
        let has_client = client.is_some();
        let id = row.id;
        let within = job.delivery.retry.age_limit();
        let waiter = self.driver().waiters.subscribe(id, client, within);
        Ok(AwaitOutcome {
            id,
            submitted: Some(self.hand_in(row, job, (None, has_client), earlier, span)?),
            waiter,
            attached: None,
            engine: Arc::clone(self),
        })
    }

    fn hand_in(
        &self,
        mut row: NewRequest,
        job: Job,
        (client, has_client): (Option<CallerClient>, bool),
        earlier: Option<Marker>,
        span: Option<EnqueueSpan>,
    ) -> Result<Submitted, Error> {
        let admitted = self
            .ensure_open()
            .and_then(|()| self.budget.take(row.size()));
        let share = match admitted {
            Ok(share) => share,
            Err(error) => {
                if let Some(span) = span {
                    span.end(Err(&error));
                }
                return Err(error);
            }
        };
        // What an earlier call persisted may have a claim already.
        let may_start = earlier.is_none() && !row.ordered && row.delay.is_zero();
        let body = row.body.as_ref().map_or(0, Bytes::len);
        let slot = if may_start {
            let driver = self.driver();
            match driver.try_inline(&row.channel, row.destination(), has_client, body) {
                Ok(slot) => {
                    row.initial = match job.delivery.guarantee {
                        Guarantee::AtLeastOnce => Initial::Claimed,
                        Guarantee::AtMostOnce => Initial::ClaimedOnce,
                    };
                    Some(slot)
                }
                Err(NoSlot::Full) => {
                    driver
                        .meter
                        .limited(row.destination(), LimitedHow::Deferred);
                    let first = driver.slots.gate.note_deferred(row.destination());
                    row.defer(first);
                    None
                }
                Err(NoSlot::Short) => {
                    driver
                        .meter
                        .limited(row.destination(), LimitedHow::Deferred);
                    let tell = driver.slots.gate.note_short(row.destination());
                    row.defer(tell);
                    None
                }
                Err(NoSlot::Busy) => None,
            }
        } else {
            None
        };
        let start = slot.map(|(slot, room)| Start {
            driver: Arc::clone(self.driver()),
            slot,
            room,
            job,
            client,
            span: Span::current(),
        });
        let (id, inline) = (row.id, start.is_some());
        let (sender, enqueued) = oneshot::channel();
        let done = Done {
            sender,
            since: Instant::now(),
            span,
            _share: share,
        };
        let submission = Submission { row, start, done };
        match earlier {
            Some(earlier) => self.enqueue_again(submission, earlier),
            None => self.enqueue(submission)?,
        }
        Ok(Submitted {
            id,
            enqueued,
            inline,
        })
    }

    fn enqueue(&self, submission: Submission) -> Result<(), Error> {
        if submission.row.needs_lock() {
            let (store, keys) = (self.store().clone(), Arc::clone(&self.busy_keys));
            let channels = Arc::clone(&self.driver().channels);
            let meter = Arc::clone(&self.driver().meter);
            let inserting = insert_locked(store, channels, meter, keys, submission, false);
            self.driver().spawn(inserting);
            return Ok(());
        }
        self.submissions
            .send(submission)
            .map_err(|_| Error::new(Kind::Closed))
    }

    /// Enqueues a request unless an earlier call has.
    fn enqueue_again(&self, submission: Submission, earlier: Marker) {
        let (driver, keys) = (Arc::clone(self.driver()), Arc::clone(&self.busy_keys));
        self.driver().spawn(async move {
            // If its caller was dropped, the first insert may still be under way, to begin an
            // attempt at once. The request must not be inserted for another one in between.
            let began = Instant::now();
            while earlier.may_start()
                && !driver.leases.is_driven(earlier.id())
                && began.elapsed() < RETRY_UNKNOWN_FOR
            {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            let channels = Arc::clone(&driver.channels);
            let (store, meter) = (driver.store.clone(), Arc::clone(&driver.meter));
            insert_locked(store, channels, meter, keys, submission, true).await;
        });
    }
}

/// A request that was handed to the engine. Waits for the commit of its insert, on any executor.
pub(crate) struct Submitted {
    id: RequestId,
    enqueued: oneshot::Receiver<Result<RequestId, Error>>,
    /// This process makes the first attempt.
    inline: bool,
}

impl Future for Submitted {
    /// The persisted request: this one, or an earlier one with the same key.
    type Output = Result<RequestId, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = self.id;
        Pin::new(&mut self.enqueued).poll(cx).map(|enqueued| {
            // The engine's runtime ended before the answer, perhaps after the commit.
            enqueued.unwrap_or_else(|_| Err(Error::new(Kind::Indeterminate(None)).with_id(id)))
        })
    }
}

/// Waits for the insert of a request, then for its outcome. Runs on any executor.
pub(crate) struct AwaitOutcome {
    id: RequestId,
    submitted: Option<Submitted>,
    waiter: Waiter,
    /// An earlier request has the same key, and this is its outcome.
    attached: Option<BoxFuture<'static, Result<Outcome, Error>>>,
    engine: Arc<Engine>,
}

impl Future for AwaitOutcome {
    type Output = Result<Outcome, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(submitted) = &mut this.submitted {
            let persisted = ready!(Pin::new(&mut *submitted).poll(cx))?;
            let inline = submitted.inline;
            this.submitted = None;
            if persisted == this.id {
                this.waiter.arm(!inline);
            } else {
                let engine = Arc::clone(&this.engine);
                this.attached = Some(Box::pin(async move { engine.outcome(persisted).await }));
            }
        }
        if let Some(attached) = &mut this.attached {
            return attached.as_mut().poll(cx);
        }
        Pin::new(&mut this.waiter).poll(cx)
    }
}

impl lane::Item for Submission {
    fn size(&self) -> usize {
        self.row.size()
    }

    fn is_urgent(&self) -> bool {
        true
    }
}

/// Runs the lane until the last sender is gone.
pub(crate) async fn run(
    store: Store,
    channels: Arc<UsedChannels>,
    meter: Arc<Meter>,
    incoming: mpsc::UnboundedReceiver<Submission>,
    panics: Arc<Panics>,
) {
    // After a panic while they are written, callers don't know whether their requests are
    // persisted, and are told so.
    lane::run(&panics, "enqueue", incoming, |batch| {
        let (store, channels, meter) = (store.clone(), Arc::clone(&channels), Arc::clone(&meter));
        async move { write(&store, &channels, &meter, batch).await }
    })
    .await;
}

type Parts = (Option<Start>, Done);

async fn write(store: &Store, channels: &UsedChannels, meter: &Meter, mut batch: Vec<Submission>) {
    // Callers that left while their requests waited here don't expect them to be persisted.
    batch.retain(|submission| !submission.done.sender.is_closed());
    if batch.is_empty() {
        return;
    }
    if let Err(error) = store.verify().await {
        for submission in batch {
            submission.done.send(Err(error.share()));
        }
        return;
    }
    if !store.may_read() {
        batch = without_waiters(batch);
        if batch.is_empty() {
            return;
        }
    }
    let mut runners = Vec::new();
    let mut stack = vec![batch];
    while let Some(batch) = stack.pop() {
        let (mut rows, mut parts): (Vec<NewRequest>, Vec<Parts>) = batch
            .into_iter()
            .map(|submission| (submission.row, (submission.start, submission.done)))
            .unzip();
        let began = Instant::now();
        let inserted = insert(store, &rows).await;
        meter.batch_written(BatchKind::Enqueue, rows.len(), began, inserted.is_ok());
        match inserted {
            Ok(()) => {
                let since = parts.iter().map(|(_, done)| Some(done.since));
                meter.enqueued(rows.iter().zip(since));
                let waiting = |row: &&NewRequest| row.initial.is_unclaimed();
                channels.note(rows.iter().filter(waiting).map(|row| &row.channel));
                let ready = rows.iter().filter(|row| row.needs_runner());
                runners.extend(ready.map(|row| Arc::clone(&row.channel)));
                for (row, (start, done)) in rows.iter().zip(parts) {
                    begin(row.id, start, done);
                }
            }
            Err(error) if error.may_concern_one_row() && rows.len() > 1 => {
                let rest = rows.split_off(rows.len() / 2);
                let rest_parts = parts.split_off(rows.len());
                stack.push(rejoin(rest, rest_parts));
                stack.push(rejoin(rows, parts));
            }
            Err(error) => {
                let unknown = error.is_unknown();
                let error = if unknown {
                    error.into_indeterminate()
                } else {
                    store.refused(error).await
                };
                for (row, (_, done)) in rows.iter().zip(parts) {
                    let error = error.share();
                    let error = if unknown {
                        error.with_id(row.id)
                    } else {
                        error
                    };
                    done.send(Err(error));
                }
            }
        }
    }
    notify(store, runners).await;
}

/// Refuses the requests whose callers would wait for what the role may not read.
fn without_waiters(batch: Vec<Submission>) -> Vec<Submission> {
    let (waiting, rest): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .partition(|submission| submission.row.waiter.is_some());
    for submission in waiting {
        submission.done.send(Err(may_not_read()));
    }
    rest
}

fn may_not_read() -> Error {
    Error::new(Kind::OnlyEnqueues("read responses"))
}

fn rejoin(rows: Vec<NewRequest>, parts: Vec<Parts>) -> Vec<Submission> {
    let submissions = rows.into_iter().zip(parts);
    submissions
        .map(|(row, (start, done))| Submission { row, start, done })
        .collect()
}

/// Inserts rows. After a broken connection the insert is tried again where the rows don't exist
/// yet, while the leases that they may have got still run: later, another runner could have claimed
/// them.
async fn insert(store: &Store, rows: &[NewRequest]) -> Result<(), StoreError> {
    let began = Instant::now();
    let mut written = store.insert(rows, false).await;
    let mut pause = RETRY_PAUSE;
    while written.as_ref().is_err_and(StoreError::is_unknown) {
        if began.elapsed() + pause > RETRY_UNKNOWN_FOR.min(store.config().lease / 2) {
            break;
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        // Whatever this try knows of itself, the outcome of the first is still unknown.
        written = store
            .insert(rows, true)
            .await
            .map_err(StoreError::or_unknown);
    }
    written
}

/// The request is persisted, so its first attempt may begin.
fn begin(id: RequestId, start: Option<Start>, done: Done) {
    let enqueued = done.since;
    done.send(Ok(id));
    if let Some(start) = start {
        let Start {
            driver,
            slot,
            room,
            job,
            ..
        } = start;
        let mut claim = Claim::inline(&driver, job, slot, room, enqueued);
        claim.set_span(start.span);
        if let Some((claim, transport)) = caller_client::assign(claim, start.client) {
            driver.spawn(drive_by_engine(claim, transport));
        }
    }
}

/// Inserts a request that takes locks. Such requests have a task each instead of a shared lane,
/// because a caller's transaction may hold the lock for long. No connection is kept, and only
/// requests of the same key wait meanwhile. With `again`, a request that exists stays as it is.
async fn insert_locked(
    store: Store,
    channels: Arc<UsedChannels>,
    meter: Arc<Meter>,
    keys: Arc<BusyKeys>,
    submission: Submission,
    again: bool,
) {
    let Submission {
        row,
        start,
        mut done,
    } = submission;
    match insert_when_free(&store, &keys, &row, &mut done, again).await {
        Ok(id) if id == row.id => {
            meter.enqueued([(&row, Some(done.since))]);
            if row.initial.is_unclaimed() {
                channels.note([&row.channel]);
            }
            begin(id, start, done);
        }
        attached_or_refused => {
            done.send(attached_or_refused);
        }
    }
}

/// Tries until the locks are free. Returns the persisted request: this one, or an earlier one that
/// has the caller's key.
async fn insert_when_free(
    store: &Store,
    keys: &Arc<BusyKeys>,
    row: &NewRequest,
    done: &mut Done,
    again: bool,
) -> Result<RequestId, Error> {
    let mut pause = BusyPause::new();
    // Another insert of the same request may commit first, once.
    let mut may_collide = again;
    let mut unknown_since: Option<Instant> = None;
    // A request is in one queue at a time, so that no two requests wait for each other in memory.
    let mut place = keys.behind_others(row);
    loop {
        if let Some(place) = &mut place {
            let in_time = tokio::select! {
                in_time = place.turn() => in_time,
                () = done.sender.closed() => return Err(Error::new(Kind::Closed)),
            };
            if !in_time {
                return Err(match unknown_since {
                    Some(_) => Error::new(Kind::Indeterminate(None)).with_id(row.id),
                    None => row.key_busy(place.field()),
                });
            }
        }
        store.verify().await?;
        if row.waiter.is_some() && !store.may_read() {
            return Err(may_not_read());
        }
        let again = again || unknown_since.is_some();
        match store.try_insert_locked(row, again).await {
            Ok(Inserted::Busy(field)) => {
                if place.as_ref().is_none_or(|place| place.field() != field) {
                    // The next request of the other key asks now.
                    drop(place.take());
                    place = keys.join(row, field);
                }
            }
            Ok(inserted) => {
                if let Some(place) = &place {
                    place.passed();
                }
                return inserted.persisted(row);
            }
            Err(error) if may_collide && error.is_data() => may_collide = false,
            Err(error) if error.is_unknown() || unknown_since.is_some() => {
                let since = *unknown_since.get_or_insert_with(Instant::now);
                let limit = RETRY_UNKNOWN_FOR.min(store.config().lease / 2);
                if since.elapsed() + pause.length() > limit {
                    return Err(error.into_indeterminate().with_id(row.id));
                }
            }
            Err(error) => return Err(store.refused(error).await),
        }
        tokio::select! {
            () = pause.wait() => {}
            // The caller was dropped.
            () = done.sender.closed() => return Err(Error::new(Kind::Closed)),
        }
    }
}

async fn notify(store: &Store, mut runners: Vec<Arc<str>>) {
    if runners.is_empty() {
        return;
    }
    runners.sort_unstable();
    runners.dedup();
    // After a failure, which the store logs, runners find the requests with their next poll.
    let _ = store.notify_runners(&runners).await;
}
