//! Owning a due request.
//!
//! A [`Claim`] has one owner. Dropping it gives the request back: uncounted if nothing was sent,
//! else as a failed attempt with its normal backoff, never as an instant second transmission.
//!
//! Every result leaves through [`settle`], the only sender to the settle lane.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Extensions, StatusCode, Uri};
use sqlxmq::CurrentJob;
use tokio::sync::oneshot;
use tracing::Span;

use super::Driver;
use super::bodies::Room;
use super::gate::{Full, Seen, Turn};
use super::job::Job;
use super::leases::Lease;
use super::slots::Slot;
use super::transport::Transport;
use crate::classify::FailureClass;
use crate::codec::{Delivery, Unreadable};
use crate::destination::{Destination, name_of};
use crate::engine::meter::Ended;
use crate::engine::settle::{AttemptResult, Ends, Held, Settlement};
use crate::metadata::Metadata;
use crate::options::Guarantee;
use crate::outcome::{Fault, Outcome};
use crate::recorder::LimitedHow;
use crate::retry::Retry;
use crate::status::Status;
use crate::store::claim::{Confirm, PolledRow};
use crate::store::settle::{Failure, Fence, WaitsFor};

/// An attempt's hard deadline is this long after its timeout, so that its result can be judged.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// When a request of a paused channel may be claimed again, if its channel has been resumed and
/// this process doesn't know yet.
const PAUSED_DELAY: Duration = Duration::from_millis(250);

const ABANDONED: &str = "the caller or task that made the attempt went away";

/// How long an attempt keeps its slot and its lease at most.
fn hard_deadline(driver: &Driver, job: &Job) -> Duration {
    driver.config.hooks.time() + job.delivery.attempt_timeout + DEADLINE_GRACE
}

/// A request that a poll claimed, before its stored head is read.
#[derive(Debug)]
pub(crate) struct PolledClaim {
    driver: Arc<Driver>,
    lease: Arc<Lease>,
    /// sqlxmq's runner counts the request as running until this is dropped.
    current: CurrentJob,
    head: PolledRow,
    since: Instant,
}

impl PolledClaim {
    pub(crate) fn new(
        driver: Arc<Driver>,
        lease: Arc<Lease>,
        current: CurrentJob,
        head: PolledRow,
    ) -> Self {
        // The lease is renewed from here on, for as long as the claim waits for a slot or its body.
        lease.mark_waiting();
        Self {
            driver,
            lease,
            current,
            head,
            since: Instant::now(),
        }
    }

    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    pub(crate) fn head(&self) -> &PolledRow {
        &self.head
    }

    pub(crate) fn current(&self) -> &CurrentJob {
        &self.current
    }

    /// Takes the slot of the attempt, with room for a large body. The body is read with them.
    pub(crate) fn take(&self, slot: Slot, room: Option<Room>) {
        self.lease.take_slot(slot);
        self.lease.take_room(room);
    }

    /// The time left until the deadline, if there is one.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let deadline = self.head.deadline()?;
        Some(deadline.saturating_sub(self.since.elapsed()))
    }

    /// When the request was enqueued, by this process's clock.
    fn enqueued(&self) -> Instant {
        let lived = self.head.lived();
        self.since.checked_sub(lived).unwrap_or(self.since)
    }

    /// The claim of the request, with what there is to send.
    pub(crate) fn open(self, job: Job) -> Claim {
        let (head, deadline, enqueued) = (&self.head, self.deadline(), self.enqueued());
        // The claim may have waited here for a slot or its body, and been taken over meanwhile.
        let waited = head.waited();
        let due = self.since.checked_sub(waited).unwrap_or(self.since);
        let unconfirmed = job.delivery.guarantee == Guarantee::AtMostOnce;
        let mut claim = Claim::new(
            &self.driver,
            self.lease,
            job,
            head.attempts,
            head.age() + self.since.elapsed(),
            deadline,
        );
        claim.unconfirmed = unconfirmed;
        claim.enqueued = enqueued;
        claim.due = due;
        if let Some(lease) = &claim.lease {
            lease.take_current(self.current);
        }
        claim
    }

    /// Finishes the request without an attempt.
    pub(crate) fn finish(self, outcome: Outcome) {
        let destination = self.destination();
        let metadata = self.head.metadata();
        let label = self.driver.meter.destination_label(|| {
            let request = self.request();
            Cow::from(request.map_or_else(String::new, |(uri, delivery)| {
                name_of(delivery.limit_key.as_deref(), &uri).into_owned()
            }))
        });
        let ends = Ends {
            enqueued: self.enqueued(),
            label,
        };
        self.settle(finish(outcome.without_attempt(), metadata, ends, || {
            destination
        }));
    }

    /// Puts the request back, without counting an attempt.
    pub(crate) fn put_back(self, delay: Duration) {
        self.settle(AttemptResult::PutBack {
            delay,
            hold: None,
            waits_for: WaitsFor::Delay,
            uncounted: true,
            failure: None,
        });
    }

    /// Puts the request back until its destination takes more.
    pub(crate) fn defer(self, destination: &str, full: Full) {
        let result = refused(&self.driver, destination, full, true);
        self.settle(result);
    }

    /// Which attempt of the request it is.
    pub(crate) fn turn(&self) -> Turn {
        turn_after(self.head.attempts - 1)
    }

    /// Puts the request back because this process can't read it, without counting an attempt.
    pub(crate) fn park(self, reason: Unreadable) {
        let channel = Arc::clone(&self.head.channel);
        self.settle(AttemptResult::Park { reason, channel });
    }

    /// Where the stored request goes, if that can be read.
    fn destination(&self) -> Option<String> {
        let (uri, _) = self.request()?;
        Some(Destination::of(&uri).to_string())
    }

    /// What the stored request says of its destination, if that can be read.
    fn request(&self) -> Option<(Uri, Delivery)> {
        let head = self.head.head().ok()??;
        let id = self.current.id().into();
        let read = self.driver.store.sealer().read_request(id, head).ok()?;
        Some((read.uri, read.delivery))
    }

    fn settle(self, result: AttemptResult) {
        self.lease.take_current(self.current);
        settle(&self.driver, self.lease, result, true);
    }
}

#[derive(Debug)]
pub(crate) struct Claim {
    driver: Arc<Driver>,
    /// `None` once the claim was handed to the settle lane.
    lease: Option<Arc<Lease>>,
    job: Job,
    /// The span of the call that the engine's attempts belong to.
    span: Span,
    /// The engine sends with the crate's own client.
    by_own_client: bool,
    /// Attempts begun, including this claim's if it is counted.
    attempts: u32,
    /// The database has counted this claim's attempt already.
    counted: bool,
    /// The database must confirm the claim before anything is sent.
    unconfirmed: bool,
    /// When the request is given up.
    deadline: Option<Instant>,
    /// Since when the request's age counts, by this process's clock.
    began: Instant,
    /// When the request was enqueued, by the same clock.
    enqueued: Instant,
    /// When the attempt is due.
    due: Instant,
    /// When the attempt under way began to be sent.
    sending: Option<Instant>,
}

impl Claim {
    /// The claim of a request that was inserted claimed, and handed in at this time.
    pub(crate) fn inline(
        driver: &Arc<Driver>,
        job: Job,
        slot: Slot,
        room: Option<Room>,
        enqueued: Instant,
    ) -> Self {
        let fence = Fence {
            id: job.id,
            claim_no: 1,
        };
        let lease = driver.leases.insert(fence, Some(slot), room);
        // The hard deadline runs from here, because a caller may never come to make the attempt.
        lease.mark_sending(Instant::now() + hard_deadline(driver, &job));
        let deadline = job.request.options.deadline;
        let mut claim = Self::new(driver, lease, job, 1, Duration::ZERO, deadline);
        claim.enqueued = enqueued;
        claim
    }

    fn new(
        driver: &Arc<Driver>,
        lease: Arc<Lease>,
        job: Job,
        attempts: u32,
        age: Duration,
        deadline: Option<Duration>,
    ) -> Self {
        let now = Instant::now();
        Self {
            driver: Arc::clone(driver),
            lease: Some(lease),
            job,
            span: Span::none(),
            by_own_client: false,
            attempts,
            counted: true,
            unconfirmed: false,
            deadline: deadline.and_then(|left| now.checked_add(left)),
            began: now.checked_sub(age).unwrap_or(now),
            enqueued: now,
            due: now,
            sending: None,
        }
    }

    pub(crate) fn driver(&self) -> &Arc<Driver> {
        &self.driver
    }

    pub(crate) fn job(&self) -> &Job {
        &self.job
    }

    /// Adds what a waiting caller attached to its request, and the span of its call.
    pub(super) fn attach(&mut self, extensions: Extensions, span: Span) {
        self.job.extensions = extensions;
        self.span = span;
    }

    /// Has the engine's attempts made in this span.
    pub(crate) fn set_span(&mut self, span: Span) {
        self.span = span;
    }

    /// The client of attempts that don't run through a caller's.
    pub(super) fn use_default_client(&mut self) -> Option<Transport> {
        let transport = &self.driver.transport;
        self.by_own_client = transport.is_own();
        transport.get()
    }

    pub(super) fn is_by_own_client(&self) -> bool {
        self.by_own_client
    }

    pub(super) fn take_span(&mut self) -> Span {
        std::mem::replace(&mut self.span, Span::none())
    }

    /// Prepares the claim for a caller that may never come for it.
    pub(super) fn awaiting_caller(self) -> Self {
        if let Some(lease) = &self.lease {
            lease.mark_sending(Instant::now() + hard_deadline(&self.driver, &self.job));
        }
        self
    }

    /// Counts the attempt that has ended.
    pub(super) fn count_attempt(
        &self,
        has_failed: bool,
        result: Result<StatusCode, FailureClass>,
        duration: Duration,
    ) {
        let job = &self.job;
        self.driver
            .meter
            .attempted(&job.channel, has_failed, || Ended {
                channel: &job.channel,
                destination: job.limit_name(),
                number: self.attempts,
                failure: has_failed.then(|| result.err().unwrap_or(FailureClass::Status)),
                status: result.ok(),
                due: self.due,
                duration,
            });
    }

    /// Whether a caller of this process waits for the outcome, and retries are made here.
    pub(super) fn is_awaited(&self) -> bool {
        self.driver.lifecycle.may_hold() && self.driver.waiters.contains(self.job.id)
    }

    /// Begins an attempt: takes a slot and marks the lease for renewal. Returns `false` if no
    /// attempt may be made: the request was cancelled, or another claim took it over from a caller
    /// that didn't come in time.
    pub(super) async fn begin(&mut self) -> bool {
        let leases = &self.driver.leases;
        let Some(lease) = self.lease.as_ref().filter(|lease| leases.holds(lease)) else {
            // There is nothing to give back.
            self.lease = None;
            return false;
        };
        let is_paused = |claim: &Self| claim.driver.paused.contains(&claim.job.channel);
        if !lease.keeps_slot() && !is_paused(self) {
            lease.mark_waiting();
            let destination = self.job.limit_name();
            match self.driver.slots.acquire(&destination, self.turn()).await {
                Ok(slot) => lease.take_slot(slot),
                Err(full) => {
                    let result = refused(&self.driver, &destination, full, self.counted);
                    self.settle(result);
                    return false;
                }
            }
        }
        // After the wait for a slot, which may have been the wait for the first look at this too.
        if is_paused(self) {
            self.leave_to_paused_channel();
            return false;
        }
        let now = Instant::now();
        lease.mark_sending(now + hard_deadline(&self.driver, &self.job));
        if self.unconfirmed && !Box::pin(self.confirm()).await {
            return false;
        }
        true
    }

    /// Puts the request back into its paused channel.
    fn leave_to_paused_channel(&mut self) {
        // If a poll has just brought it, the channel may have been resumed.
        self.driver.slots.gate.urgent.notify_one();
        self.settle(AttemptResult::PutBack {
            delay: PAUSED_DELAY,
            hold: None,
            waits_for: WaitsFor::Delay,
            uncounted: self.counted,
            failure: None,
        });
    }

    /// From here on, a part of the request may have been sent.
    pub(super) fn begin_sending(&mut self) {
        self.sending = Some(Instant::now());
    }

    /// Has the database confirm the claim: the request may have been cancelled, taken over or given
    /// up.
    async fn confirm(&mut self) -> bool {
        let Some(lease) = &self.lease else {
            return false;
        };
        let fence = lease.fence();
        let how = Confirm {
            count: !self.counted,
            once: self.is_once(),
        };
        let confirmed = self
            .driver
            .with_store(|store| async move { store.confirm(fence, how).await })
            .await;
        match confirmed {
            Ok(true) => {
                self.attempts += u32::from(how.count);
                self.counted = true;
                self.unconfirmed = false;
                true
            }
            Ok(false) => {
                // There is nothing to give back. Waiters get the outcome from the database.
                self.driver.leases.remove(lease);
                self.driver.waiters.fetch_soon(vec![self.job.id]);
                self.lease = None;
                false
            }
            Err(error) => {
                tracing::debug!(id = %self.job.id, ?error, "a claim could not be confirmed");
                false
            }
        }
    }

    /// Which attempt of the request is next, or under way.
    pub(super) fn turn(&self) -> Turn {
        turn_after(self.attempts - u32::from(self.counted))
    }

    /// Notes what the attempt has shown of its destination.
    pub(super) fn note(&self, seen: Seen) {
        if let Some(lease) = &self.lease {
            lease.note(seen);
        }
    }

    /// Whether the request must not be sent again once it may have been sent.
    pub(super) fn is_once(&self) -> bool {
        self.job.delivery.guarantee == Guarantee::AtMostOnce
    }

    /// Attempts begun, including this claim's.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The delay until the next attempt, or `None` to give the request up. `asked` is the delay
    /// that the response or a hook asked for. `panicked` gets the text of a panic in the policy's
    /// function.
    pub(super) fn next_delay(
        &self,
        asked: Option<Duration>,
        panicked: &mut Option<String>,
    ) -> Option<Duration> {
        let retry = Retry::new(self.attempts, self.began.elapsed());
        let function = self.driver.config.retry_fired.function();
        let policy = &self.job.delivery.retry;
        let delay = policy.delay(retry, fastrand::f64(), asked, function, panicked)?;
        // The request is given up now if its deadline passes before the next attempt.
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        left.is_none_or(|left| delay < left).then_some(delay)
    }

    /// Whether the policy allows no attempt any more: the last one was lost with its process.
    pub(crate) fn is_exhausted(&self) -> bool {
        // This claim's attempt is counted but hasn't been made.
        let before = self.attempts - 1;
        before > 0 && !self.job.delivery.retry.allows_after(before)
    }

    /// Waits until the attempt is due. `false` if the holding ends first, or if another body waits
    /// for the room of this one; dropping the claim then gives the request back at once.
    pub(super) async fn wait_until_due(&self) -> bool {
        let has_room = self.lease.as_ref().is_some_and(|lease| lease.has_room());
        tokio::select! {
            () = tokio::time::sleep_until(self.due.into()) => true,
            () = self.driver.lifecycle.holding_ends() => false,
            () = self.driver.bodies.wanted(), if has_room => false,
        }
    }

    /// Finishes the request. The settle lane waits for the commit.
    pub(crate) fn finish(mut self, outcome: Outcome) {
        let result = self.finished(outcome);
        self.settle(result);
    }

    /// Puts the request back into the queue, due after `delay`.
    pub(super) fn put_back(mut self, delay: Duration, failure: Failure) {
        self.settle(AttemptResult::PutBack {
            delay,
            hold: None,
            waits_for: WaitsFor::Delay,
            uncounted: false,
            failure: Some(Box::new(failure)),
        });
    }

    /// Holds the request for its next attempt in this process. Returns the new claim after the
    /// commit, or `None` if the request was lost to another claim.
    pub(super) async fn hold(mut self, delay: Duration, failure: Failure) -> Option<Self> {
        let due = Instant::now() + delay;
        let (hold, held) = oneshot::channel();
        self.settle(AttemptResult::PutBack {
            delay,
            hold: Some(hold),
            waits_for: WaitsFor::Delay,
            uncounted: false,
            failure: Some(Box::new(failure)),
        });
        let Held { lease, attempts } = held.await.ok()?;
        self.lease = Some(lease);
        self.attempts = attempts;
        self.counted = false;
        self.unconfirmed = true;
        self.due = due;
        self.sending = None;
        Some(self)
    }

    /// Whether anything waits for the commit of the result: a caller, the next request of the
    /// ordering key, or sqlxmq's runner, for room.
    fn is_urgent(&self) -> bool {
        let is_polled = self.lease.as_ref().is_some_and(|it| it.has_current());
        is_polled && self.driver.slots.unsettled_take_room()
            || self.job.request.options.ordered.is_some()
            || self.driver.waiters.contains(self.job.id)
    }

    fn finished(&self, outcome: Outcome) -> AttemptResult {
        let metadata = self.job.request.options.metadata.clone();
        let destination = || Some(self.job.destination().to_string());
        let ends = Ends {
            enqueued: self.enqueued,
            label: self
                .driver
                .meter
                .destination_label(|| self.job.limit_name()),
        };
        finish(outcome, metadata, ends, destination)
    }

    fn settle(&mut self, result: AttemptResult) {
        let urgent = self.is_urgent();
        if let Some(lease) = self.lease.take() {
            settle(&self.driver, lease, result, urgent);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.lease.is_none() {
            return;
        }
        let (id, class) = (self.job.id, FailureClass::Abandoned);
        if let Some(began) = self.sending {
            self.count_attempt(true, Err(class), began.elapsed());
        }
        let result = match self.sending {
            None => AttemptResult::PutBack {
                delay: self.due.saturating_duration_since(Instant::now()),
                hold: None,
                waits_for: WaitsFor::Delay,
                uncounted: self.counted,
                failure: None,
            },
            Some(_) if self.is_once() => {
                let outcome =
                    Outcome::ambiguous(id, Fault::new(class.as_str(), ABANDONED.to_owned()));
                self.finished(outcome)
            }
            Some(began) => {
                if let Some(delay) = self.next_delay(None, &mut None) {
                    AttemptResult::PutBack {
                        delay,
                        hold: None,
                        waits_for: WaitsFor::Delay,
                        uncounted: false,
                        failure: Some(Box::new(Failure {
                            class,
                            text: ABANDONED.to_owned(),
                            duration: began.elapsed(),
                            response: None,
                        })),
                    }
                } else {
                    let outcome =
                        Outcome::discarded(id, Fault::new(class.as_str(), ABANDONED.to_owned()));
                    self.finished(outcome)
                }
            }
        };
        self.settle(result);
    }
}

fn turn_after(attempts: u32) -> Turn {
    if attempts == 0 {
        Turn::First
    } else {
        Turn::Retry
    }
}

/// What becomes of a request whose destination takes no attempt now. `counted` says whether the
/// database has counted one.
fn refused(driver: &Driver, destination: &str, full: Full, counted: bool) -> AttemptResult {
    let over_budget = matches!(full, Full::Later(_));
    driver.meter.limited(
        destination,
        if over_budget {
            LimitedHow::OverRetryBudget
        } else {
            LimitedHow::Deferred
        },
    );
    if let Full::Later(delay) = full {
        return AttemptResult::over_budget(delay, counted);
    }
    driver.slots.gate.note_deferred(destination);
    AttemptResult::deferred(counted)
}

/// `destination` is only called for a dead letter, whose log line shows it.
fn finish(
    mut outcome: Outcome,
    metadata: Option<Metadata>,
    ends: Ends,
    destination: impl FnOnce() -> Option<String>,
) -> AttemptResult {
    outcome.metadata = metadata;
    let is_dead_letter = matches!(outcome.status, Status::Discarded | Status::Ambiguous);
    let destination = is_dead_letter.then(destination).flatten();
    AttemptResult::Finish {
        destination: destination.map(Into::into),
        outcome: Arc::new(outcome),
        ends,
    }
}

/// Hands a result to the settle lane. The only door: every result leaves through it.
fn settle(driver: &Arc<Driver>, lease: Arc<Lease>, result: AttemptResult, urgent: bool) {
    lease.mark_settling(result.is_held());
    let current = lease.give_current();
    let unsettled = driver.slots.count_unsettled(result.size());
    // Without a lane the runtime is ending. The lease runs out, and another process takes over.
    let _ = driver.settlements.send(Settlement {
        lease,
        result,
        urgent,
        current,
        refusals: 0,
        unsettled,
        _driver: Arc::clone(driver),
    });
}
