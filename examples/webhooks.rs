//! A sender of webhooks: its guard denies URLs of its own network, and each webhook is signed with
//! the key of its receiver. A slow and a dead receiver don't delay the others, and an operator
//! sends what was kept and given up once the dead one has been repaired.
//!
//! `cargo run --example webhooks`

use std::collections::HashMap;
use std::error::Error;
use std::time::{Duration, Instant};

use requeuest::DestinationEventKind::{self, Disabled, Opened};
use requeuest::guard::Guard;
use requeuest::hooks::Refusal;
use requeuest::retry::{Jitter, RetryPolicy};
use requeuest::testkit::Postgres;
use requeuest::webhooks::{Endpoint, Signer, SigningKey};
use requeuest::{CircuitBreaker, DeadLetterFilter, DestinationPolicy, Durable, RequestId};
use requeuest::{Status, migrate};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{sleep, timeout};

mod receiver;
use receiver::Receiver;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Events for each of the bad receivers.
const EVENTS: usize = 30;
/// How many deliveries to the good receiver are timed.
const TIMED: usize = 100;
/// The keys of the receivers. An application makes them at random, and has them in its database.
const KEYS: [&str; 3] = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX",
    "whsec_BgcICQoLDA0ODxAREhMUFRYXGBkaGxwd",
];
/// What the slow receiver's owner has asked for.
const LIMIT: u32 = 4;

#[tokio::main]
async fn main() -> Result<()> {
    timeout(Duration::from_secs(60), story()).await?
}

async fn story() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let good = Receiver::start(200, Duration::ZERO, KEYS[0]).await?;
    let slow = Receiver::start(200, Duration::from_millis(300), KEYS[1]).await?;
    let dead = Receiver::start(500, Duration::ZERO, KEYS[2]).await?;
    let receivers = [&good, &slow, &dead].map(|receiver| receiver.origin.clone());

    let webhooks = DestinationPolicy::webhooks;
    // Shorter times than the preset's: a breaker that is open for 5 seconds at first, and delays
    // from 5 seconds to 24 hours.
    let breaker = CircuitBreaker::default().open_for(Duration::from_secs(1));
    let delays = RetryPolicy::schedule([Duration::from_secs(2); 5]).jitter(Jitter::Equal);
    let (sender, mut events) = unbounded_channel();
    let durable = Durable::builder(database.pool().clone())
        .webhooks()
        // The preset's guard denies loopback, where the receivers of this example are.
        .guard(Guard::new().allow("127.0.0.1"))
        .retry(delays)
        .destination(&slow.origin, webhooks().max_concurrency(LIMIT))
        .destination(&dead.origin, webhooks().circuit_breaker(breaker))
        .on_attempt(signer(receivers.into_iter().zip(KEYS).collect()))
        .on_destination_event(move |event| {
            // Fails once `story` has returned, which is fine.
            let _ = sender.send((event.kind.clone(), Instant::now()));
        })
        .build()?;

    let inside = http::Request::post("http://169.254.169.254/latest").body("{}")?;
    let refused = durable.fire(inside).await;
    let refused = refused.expect_err("the guard denies it");
    assert!(refused.is_denied());
    println!("a customer's URL: {refused}");

    println!("good, alone: {}", time(&durable, &good).await?);
    let began = Instant::now();
    let to_slow = fire(&durable, &slow, EVENTS).await?;
    let mut to_dead = fire(&durable, &dead, EVENTS).await?;
    println!("{EVENTS} events are fired to each of two others:");
    println!("  slow takes 300 ms for an answer, and dead answers 500");
    println!("good, beside them: {}", time(&durable, &good).await?);
    let number = slow.answered();
    println!("slow: {number} of its {EVENTS} events have arrived meanwhile");

    let opened = until(&mut events, |kind| *kind == Opened).await?;
    let destination = durable.destination(&dead.origin)?;
    let status = destination.status().await?;
    let (failures, attempts) = (status.failures, status.attempts);
    let after = (opened - began).as_secs_f64();
    println!("dead: {failures} of {attempts} attempts failed");
    println!("dead: its circuit breaker opened after {after:.1} s");

    dead.answer(410);
    until(&mut events, |kind| matches!(kind, Disabled { .. })).await?;
    let reason = destination.status().await?.reason.unwrap_or_default();
    println!("dead: a probe failed ({reason}), so it is disabled");
    let waiting = kept(&durable, &to_dead).await?.len();
    let answered = dead.answered();
    to_dead.extend(fire(&durable, &dead, 10).await?);
    let kept = kept(&durable, &to_dead).await?;
    assert_eq!(kept.len(), waiting + 10);
    assert_eq!(dead.answered(), answered);
    println!("dead: {waiting} requests are kept, and 10 new ones");

    completed(&durable, &to_slow).await?;
    let most = slow.most_at_a_time();
    assert!(most <= LIMIT as usize);
    println!("slow: all {EVENTS} have arrived, at most {most} at a time (its limit: {LIMIT})");

    dead.answer(200);
    destination.enable().await?;
    let enabled = Instant::now();
    println!("dead is repaired, and an operator enables it: its breaker sends probes first");
    completed(&durable, &kept).await?;
    let (number, after) = (kept.len(), enabled.elapsed().as_secs_f64());
    println!("dead: all {number} have arrived after {after:.1} s");

    let outage = DeadLetterFilter::default()
        .destination(&dead.origin)
        .finished_within(began.elapsed());
    let replayed = durable.replay_all(&outage).await?;
    assert_eq!(kept.len() + replayed.len(), to_dead.len());
    completed(&durable, &replayed).await?;
    let number = replayed.len();
    println!("dead: dead letters that were replayed and have arrived: {number}");
    for receiver in [&good, &slow, &dead] {
        assert_eq!(receiver.refused(), 0);
    }
    println!("each receiver has checked the signatures of all its webhooks");
    durable.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}

/// Signs each webhook with the key of its receiver.
fn signer(keys: HashMap<String, &'static str>) -> Signer {
    Signer::lookup(move |endpoint: Endpoint| {
        let key = keys.get(&endpoint.destination).copied();
        async move {
            let key = key.ok_or_else(|| Refusal::discard("the receiver has no key"))?;
            Ok(vec![key.parse::<SigningKey>()?])
        }
    })
}

async fn fire(durable: &Durable, to: &Receiver, number: usize) -> Result<Vec<RequestId>> {
    let mut ids = Vec::new();
    for event in 0..number {
        let hook = http::Request::post(&to.origin).body(format!("event {event}"))?;
        ids.push(durable.fire(hook).await?);
    }
    Ok(ids)
}

async fn completed(durable: &Durable, ids: &[RequestId]) -> Result<()> {
    for id in ids {
        assert_eq!(durable.outcome(*id).await?.status(), Status::Completed);
    }
    Ok(())
}

/// Fires events one after another, and measures from each call to its stored response.
async fn time(durable: &Durable, to: &Receiver) -> Result<String> {
    let mut times = Vec::new();
    for _ in 0..TIMED {
        let began = Instant::now();
        completed(durable, &fire(durable, to, 1).await?).await?;
        times.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    let (median, slowest) = (times[TIMED / 2], times[TIMED - 1]);
    Ok(format!(
        "{TIMED} deliveries, median {median:.1} ms, slowest {slowest:.1} ms"
    ))
}

type Events = UnboundedReceiver<(DestinationEventKind, Instant)>;

/// Waits for an event, and returns when it happened.
async fn until(
    events: &mut Events,
    wanted: impl Fn(&DestinationEventKind) -> bool,
) -> Result<Instant> {
    loop {
        let (kind, at) = events.recv().await.ok_or("the handle is gone")?;
        if wanted(&kind) {
            return Ok(at);
        }
    }
}

/// Waits until each request is deferred or a dead letter, and returns those that are deferred.
async fn kept(durable: &Durable, ids: &[RequestId]) -> Result<Vec<RequestId>> {
    loop {
        let (mut kept, mut ended) = (Vec::new(), 0);
        for id in ids {
            match durable.status(*id).await? {
                Some(Status::Deferred) => kept.push(*id),
                Some(Status::Discarded) => ended += 1,
                _ => {}
            }
        }
        if kept.len() + ended == ids.len() {
            return Ok(kept);
        }
        sleep(Duration::from_millis(50)).await;
    }
}
