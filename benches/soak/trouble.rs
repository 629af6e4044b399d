//! Everything at once that could fill the disk or hold up pruning, beside the soak's own load.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use requeuest::retry::RetryPolicy;
use requeuest::sqlx::{PgConnection, PgPool};
use requeuest::{Durable, Options, Outcome, OutcomeSubscription, Request, outcome_fn};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::common::receiver::Receiver;
use crate::common::{AnyError, request};

/// Ordering keys whose first request waits for a day, with one request behind it.
const BLOCKED_KEYS: usize = 20_000;
/// Requests that fail as long as the run lasts.
const ENDLESS: usize = 50;
/// How many requests per second end as dead letters, and how many go to the channel of the handler.
const DISCARDED_PER_SECOND: f64 = 20.0;
const HANDLED_PER_SECOND: f64 = 200.0;
/// The handler never takes one outcome in so many.
const REFUSED: u64 = 10_000;

/// The load, until it is dropped.
pub(crate) struct Trouble {
    tasks: Vec<JoinHandle<()>>,
    // Their runners, handlers and servers last as long as they do.
    _subscription: OutcomeSubscription,
    _handles: [Durable; 2],
    _receivers: [Receiver; 2],
}

impl Trouble {
    /// `retention` is that of the soak's own requests. The handled ones are kept three times as
    /// long.
    pub(crate) async fn start(pool: &PgPool, retention: Duration) -> Result<Self, AnyError> {
        let receivers = [
            Receiver::answering(StatusCode::SERVICE_UNAVAILABLE)?,
            Receiver::start()?,
        ];
        let body = Bytes::from_static(b"x");
        let to = |receiver: &Receiver, options: Options| -> Result<Request, AnyError> {
            Ok(Request::try_from(request(&receiver.url, &body))?.with(options))
        };

        let failing = Durable::builder(pool.clone())
            .channel("failing")
            .retention(retention)
            .dead_letter_retention(retention)
            .retry(quick().max_attempts(5))
            .build()?;
        let endless = (0..ENDLESS).map(|_| to(&receivers[0], Options::default().retry(quick())));
        failing
            .fire_many(endless.collect::<Result<Vec<_>, _>>()?)
            .await?;

        let handled = Durable::builder(pool.clone())
            .channel("handled")
            .retention(3 * retention)
            .build()?;
        for delay in [Duration::from_secs(86_400), Duration::ZERO] {
            let blocked = (0..BLOCKED_KEYS).map(|number| {
                let options = Options::default().ordered(format!("blocked-{number}"));
                to(&receivers[1], options.delay(delay))
            });
            handled
                .fire_many(blocked.collect::<Result<Vec<_>, _>>()?)
                .await?;
        }
        let subscription = handled.on_outcome("handled", outcome_fn(take)).await?;

        let tasks = vec![
            paced(
                failing.clone(),
                to(&receivers[0], Options::default())?,
                DISCARDED_PER_SECOND,
            ),
            paced(
                handled.clone(),
                to(&receivers[1], Options::default())?,
                HANDLED_PER_SECOND,
            ),
        ];
        Ok(Self {
            tasks,
            _subscription: subscription,
            _handles: [failing, handled],
            _receivers: receivers,
        })
    }

    /// Fails if a part of the load has ended.
    pub(crate) fn check(&self) -> Result<(), AnyError> {
        if self.tasks.iter().any(JoinHandle::is_finished) {
            return Err("a part of the load has ended".into());
        }
        Ok(())
    }
}

impl Drop for Trouble {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Retries for ever, at least once a second.
fn quick() -> RetryPolicy {
    RetryPolicy::exponential()
        .base(Duration::from_millis(50))
        .cap(Duration::from_secs(1))
        .for_ever()
}

async fn take(_: &mut PgConnection, outcome: &Outcome) -> Result<(), AnyError> {
    let mut hasher = DefaultHasher::new();
    outcome.id().hash(&mut hasher);
    match hasher.finish() % REFUSED {
        0 => Err("this outcome is never taken".into()),
        _ => Ok(()),
    }
}

/// Fires the request at a constant rate.
fn paced(durable: Durable, request: Request, per_second: f64) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / per_second));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            if let Err(error) = durable.fire(&request).await {
                eprintln!("a request of the load was refused: {error}");
                return;
            }
        }
    })
}
