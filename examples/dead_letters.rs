//! Dead letters: requests that were given up are kept, and are sent again after the outage.
//!
//! `cargo run --example dead_letters`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use requeuest::retry::RetryPolicy;
use requeuest::testkit::Postgres;
use requeuest::{DeadLetterFilter, Durable, Options, Request, RequestId, Status, migrate};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let down = Arc::new(AtomicBool::new(true));
    let server = server(Arc::clone(&down)).await?;
    let durable = Durable::builder(database.pool().clone())
        .retry(RetryPolicy::constant(Duration::from_millis(50)).max_attempts(2))
        .build()?;

    say("the receiver is down, and requests are given up after two attempts");
    let mail = fire(&durable, &server, "mail", Options::default()).await?;
    // If `opened` is given up, later events of the account must not overtake it.
    let events = || Options::default().ordered("account-7").halt_on_discard();
    let opened = fire(&durable, &server, "opened", events()).await?;
    let closed = fire(&durable, &server, "closed", events()).await?;
    for id in [mail, opened] {
        assert_eq!(durable.outcome(id).await?.status(), Status::Discarded);
    }

    let outage = DeadLetterFilter::default().status(Status::Discarded);
    for letter in durable.dead_letters(&outage).await? {
        say(format!(
            "dead letter {} to {}: {} attempts, last status {}",
            letter.id,
            letter.destination.as_deref().unwrap_or_default(),
            letter.attempts,
            letter.http_status.unwrap_or_default(),
        ));
    }
    let halted = durable.halted().await?;
    assert_eq!((&*halted[0].key, halted[0].id), ("account-7", opened));
    say(format!("{} is halted, so `closed` waits", halted[0].key));
    assert!(!server.received().contains(&"closed".to_owned()));

    say("the receiver is back: all dead letters are sent again");
    down.store(false, Ordering::Relaxed);
    let again = durable.replay_all(&outage).await?;
    assert_eq!(again.len(), 2);
    for id in again {
        assert_eq!(durable.response(id).await?.status(), 200);
    }
    assert_eq!(durable.response(closed).await?.status(), 200);
    let received = server.received();
    let place = |event| received.iter().rposition(|body| body == event);
    assert!(place("opened") < place("closed"));
    assert!(durable.dead_letters(&outage).await?.is_empty());
    assert!(durable.halted().await?.is_empty());
    say("everything has arrived, the events of the account in order");
    Ok(())
}

async fn fire(
    durable: &Durable,
    server: &Server,
    body: &'static str,
    options: Options,
) -> Result<RequestId> {
    let request = Request::try_from(http::Request::post(server.url()).body(body)?)?;
    Ok(durable.fire(request.with(options)).await?)
}

async fn server(down: Arc<AtomicBool>) -> Result<Server> {
    Server::start(move |_, _| {
        let down = down.load(Ordering::Relaxed);
        async move { if down { 503 } else { 200 } }
    })
    .await
}
