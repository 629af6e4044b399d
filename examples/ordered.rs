//! Keys: `ordered` sends the requests of a key one at a time, in commit order. `key` makes a call
//! idempotent: a repeated call is the same request.
//!
//! `cargo run --example ordered`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, Request, migrate};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = server().await?;
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::constant(Duration::from_millis(100)))
        .build()?;

    say("three events of one account, and one of another account behind them");
    let mut events = Vec::new();
    for event in ["ada: opened", "ada: renamed", "ada: closed", "bob: opened"] {
        let (account, _) = event.split_once(':').ok_or("an event without an account")?;
        let options = Options::default().ordered(account);
        events.push(durable.fire(request(&server, event, options)?).await?);
    }
    for id in events {
        durable.response(id).await?;
    }
    let mut ada = server.received();
    ada.retain(|event| event.starts_with("ada"));
    ada.dedup();
    assert_eq!(ada, ["ada: opened", "ada: renamed", "ada: closed"]);
    say("ada's events arrived in order; her failing request didn't delay Bob's");

    say("the same charge twice, as a function does that runs again after a crash");
    let invoice = || Options::default().key("invoice-42");
    let charge = request(&server, "charge 5 euros", invoice())?;
    let first = durable.await_response(&charge).await?;
    let second = durable.await_response(&charge).await?;
    assert_eq!(first.id(), second.id());
    let received = server.received();
    assert_eq!(
        received
            .iter()
            .filter(|body| body.starts_with("charge"))
            .count(),
        1
    );
    say("one charge was sent; both calls have its response");

    // The key with other content is a mistake in the caller, and says so.
    let other = request(&server, "charge 9 euros", invoice())?;
    let error = durable.await_response(other).await.unwrap_err();
    assert!(error.is_key_conflict());
    say(format!("another charge with that key is refused: {error}"));
    Ok(())
}

fn request(server: &Server, body: &'static str, options: Options) -> Result<Request> {
    let request = http::Request::post(server.url()).body(body)?;
    Ok(Request::try_from(request)?.with(options))
}

/// Refuses Ada's first event once, and then until Bob's event has arrived.
async fn server() -> Result<Server> {
    let bob = Arc::new(AtomicBool::new(false));
    let refusals = Arc::new(AtomicUsize::new(0));
    Server::start(move |_, event| {
        bob.fetch_or(event.starts_with("bob"), Ordering::Relaxed);
        let refused = event == "ada: opened"
            && (refusals.fetch_add(1, Ordering::Relaxed) == 0 || !bob.load(Ordering::Relaxed));
        async move { if refused { 503 } else { 200 } }
    })
    .await
}
