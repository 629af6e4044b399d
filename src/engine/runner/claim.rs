//! Owning a due request.
//!
//! A [`Claim`] has one owner. Dropping it gives the request back: uncounted if nothing was sent, else as a failed attempt
//! with its normal backoff, never as an instant second transmission.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Extensions;
use sqlxmq::CurrentJob;
use tokio::sync::oneshot;

use crate::classify::FailureClass;
use crate::engine::Engine;
use crate::engine::job::Job;
use crate::engine::runner::lease::{Lease, Slot};
use crate::engine::runner::settle::{Held, Settling};
use crate::options::Guarantee;
use crate::outcome::Outcome;
use crate::retry::Retry;
use crate::store::claim::{self, ClaimHead, Confirm};
use crate::store::settle::{Failure, Fence};

/// An attempt's hard deadline is this much after its timeout: room for its result to be judged.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

const ABANDONED: &str = "whoever sent it went away";

/// How long an attempt keeps its slot and its lease at most.
fn hard_deadline(job: &Job) -> Duration {
    job.delivery.attempt_timeout + DEADLINE_GRACE
}

#[derive(Debug)]
pub(crate) struct Claim {
    engine: Arc<Engine>,
    /// `None` once the claim is settled, or being settled.
    lease: Option<Arc<Lease>>,
    job: Job,
    /// Transmissions begun, with this claim's if it is counted.
    attempts: u32,
    /// The database counts this claim's transmission already.
    counted: bool,
    /// The database has to say that the claim still stands before anything is sent.
    unconfirmed: bool,
    /// When the request is given up.
    deadline: Option<Instant>,
    /// When the request was enqueued, on this process's clock.
    enqueued: Instant,
    /// When the attempt is due.
    due: Instant,
    sending: Option<Instant>,
    /// Goes with the result: until that is settled sqlxmq's runner counts the request as running.
    current: Option<CurrentJob>,
}

impl Claim {
    /// The claim of a request that was inserted claimed.
    pub(crate) fn inline(engine: &Arc<Engine>, job: Job, slot: Slot) -> Self {
        let fence = Fence {
            id: job.id,
            claim_no: 1,
        };
        let lease = engine.shared().leases.insert(fence, Some(slot));
        // From here on, because a caller may never come to make the attempt.
        lease.sending(Instant::now() + hard_deadline(&job));
        let deadline = job.request.options.deadline;
        Self::new(engine, lease, job, 1, Duration::ZERO, deadline)
    }

    /// The claim of a request that a poll brought.
    pub(super) fn polled(
        engine: &Arc<Engine>,
        lease: Arc<Lease>,
        job: Job,
        head: &ClaimHead,
    ) -> Self {
        // It may have waited for long here, for a slot or its body, and been taken over meanwhile.
        let unconfirmed = job.delivery.guarantee == Guarantee::AtMostOnce;
        let mut claim = Self::new(
            engine,
            lease,
            job,
            head.attempts,
            head.age(),
            head.deadline(),
        );
        claim.unconfirmed = unconfirmed;
        claim
    }

    fn new(
        engine: &Arc<Engine>,
        lease: Arc<Lease>,
        job: Job,
        attempts: u32,
        age: Duration,
        deadline: Option<Duration>,
    ) -> Self {
        let now = Instant::now();
        Self {
            engine: Arc::clone(engine),
            lease: Some(lease),
            job,
            attempts,
            counted: true,
            unconfirmed: false,
            deadline: deadline.and_then(|left| now.checked_add(left)),
            enqueued: now.checked_sub(age).unwrap_or(now),
            due: now,
            sending: None,
            current: None,
        }
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn job(&self) -> &Job {
        &self.job
    }

    /// Keeps what sqlxmq's runner counts as running.
    pub(super) fn counted_by(mut self, current: CurrentJob) -> Self {
        self.current = Some(current);
        self
    }

    /// What the live caller attached to its request.
    pub(crate) fn attach(&mut self, extensions: Extensions) {
        self.job.extensions = extensions;
    }

    /// The claim, on its way to a caller that may never come for it.
    pub(crate) fn awaiting_caller(self) -> Self {
        if let Some(lease) = &self.lease {
            lease.sending(Instant::now() + hard_deadline(&self.job));
        }
        self
    }

    pub(crate) fn is_awaited(&self) -> bool {
        !self.engine.is_closing() && self.engine.shared().waiters.contains(self.job.id)
    }

    /// Marks the attempt as begun: from here on the lease is renewed and a slot is taken. Returns whether it is still to be
    /// made: the request may have been cancelled, or taken from a caller that did not come in time.
    pub(crate) async fn begin(&mut self) -> bool {
        let leases = &self.engine.shared().leases;
        let Some(lease) = self.lease.as_ref().filter(|lease| leases.holds(lease)) else {
            // There is nothing to give back.
            self.lease = None;
            return false;
        };
        if !lease.has_slot() {
            lease.waiting();
            if let Ok(slot) = Arc::clone(self.engine.slots()).acquire_owned().await {
                lease.take_slot(slot);
            }
        }
        let now = Instant::now();
        lease.sending(now + hard_deadline(&self.job));
        if self.unconfirmed && !Box::pin(self.confirm()).await {
            return false;
        }
        self.sending = Some(Instant::now());
        true
    }

    /// Has the database say that the claim still stands: it may have been cancelled, taken over or given up.
    async fn confirm(&mut self) -> bool {
        let Some(lease) = &self.lease else {
            return false;
        };
        let (fence, time) = (lease.fence(), self.engine.config().lease);
        let how = Confirm {
            count: !self.counted,
            once: self.is_once(),
        };
        let confirmed = self
            .engine
            .query(move |connection| {
                Box::pin(async move { claim::confirm(connection, fence, time, how).await })
            })
            .await;
        match confirmed {
            Ok(true) => {
                self.attempts += u32::from(how.count);
                self.counted = true;
                self.unconfirmed = false;
                true
            }
            Ok(false) => {
                let shared = self.engine.shared();
                shared.leases.remove(lease);
                shared.waiters.ask_soon(vec![self.job.id]);
                self.lease = None;
                false
            }
            Err(error) => {
                log::warn!("request {}: not sent yet: {error:?}", self.job.id);
                false
            }
        }
    }

    /// Whether the request must not be sent again once it may have been.
    pub(crate) fn is_once(&self) -> bool {
        self.job.delivery.guarantee == Guarantee::AtMostOnce
    }

    /// Transmissions begun, with this claim's.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// The delay until the next attempt after this one, or `None` to give up. `asked` is what the response asked for.
    pub(crate) fn next_delay(&self, asked: Option<Duration>) -> Option<Duration> {
        let retry = Retry::new(self.attempts, self.enqueued.elapsed());
        let function = self.engine.config().retry_fired.function();
        let policy = &self.job.delivery.retry;
        let delay = policy.delay(retry, fastrand::f64(), asked, function)?;
        // An attempt that would come too late is not waited for.
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        left.is_none_or(|left| delay < left).then_some(delay)
    }

    /// Whether the policy allows no attempt any more: one was lost with the process that made it.
    pub(super) fn is_exhausted(&self) -> bool {
        // With this attempt left out, as it has not been made.
        let before = self.attempts - 1;
        before > 0 && !self.job.delivery.retry.allows_after(before)
    }

    /// Waits until the attempt is due. `false` if a shutdown comes first: then it is given back at once, for others.
    pub(crate) async fn wait(&self) -> bool {
        tokio::select! {
            () = tokio::time::sleep_until(self.due.into()) => true,
            () = self.engine.closing() => false,
        }
    }

    /// Ends the request. Nothing is left to be done for it here but to wait for the commit, which the lane does.
    pub(crate) fn finish(mut self, outcome: Outcome) {
        self.settle(Settling::Finish(Arc::new(outcome)));
    }

    /// Puts the request back, for whoever claims it when it is due.
    pub(crate) fn put_back(mut self, delay: Duration, failure: Failure) {
        self.settle(Settling::Again {
            delay,
            hold: None,
            uncounted: false,
            failure: Some(Box::new(failure)),
        });
    }

    /// Keeps the request for its next attempt. Returns after the commit, with the claim to go on with.
    pub(crate) async fn hold(mut self, delay: Duration, failure: Failure) -> Option<Self> {
        let due = Instant::now() + delay;
        let (goes_on, held) = oneshot::channel();
        self.settle(Settling::Again {
            delay,
            hold: Some(goes_on),
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

    /// Whether anything waits for what becomes of the attempt: a caller, the next of the ordering key, or sqlxmq's runner, for room.
    fn is_urgent(&self) -> bool {
        self.current.is_some() && self.engine.fills_up()
            || self.job.request.options.ordered.is_some()
            || self.engine.shared().waiters.contains(self.job.id)
    }

    fn settle(&mut self, result: Settling) {
        let urgent = self.is_urgent();
        if let Some(lease) = self.lease.take() {
            let current = self.current.take();
            self.engine.settle(lease, current, result, urgent);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.lease.is_none() {
            return;
        }
        let result = match self.sending {
            None => Settling::Again {
                delay: self.due.saturating_duration_since(Instant::now()),
                hold: None,
                uncounted: self.counted,
                failure: None,
            },
            Some(_) if self.is_once() => Settling::Finish(Arc::new(Outcome::ambiguous(
                self.job.id,
                FailureClass::Abandoned.as_str(),
                ABANDONED.to_owned(),
            ))),
            Some(began) => {
                let text = ABANDONED.to_owned();
                match self.next_delay(None) {
                    Some(delay) => Settling::Again {
                        delay,
                        hold: None,
                        uncounted: false,
                        failure: Some(Box::new(Failure {
                            class: FailureClass::Abandoned,
                            text,
                            duration: began.elapsed(),
                            response: None,
                        })),
                    },
                    None => Settling::Finish(Arc::new(Outcome::discarded(
                        self.job.id,
                        FailureClass::Abandoned.as_str(),
                        text,
                    ))),
                }
            }
        };
        self.settle(result);
    }
}

/// Gives a request back that was claimed and not sent.
pub(super) fn unmade(delay: Duration) -> Settling {
    Settling::Again {
        delay,
        hold: None,
        uncounted: true,
        failure: None,
    }
}
