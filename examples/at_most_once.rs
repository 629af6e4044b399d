//! At most once: a request that may have arrived is not sent again. A hook asks the receiver what
//! became of it, and settles it.
//!
//! `cargo run --example at_most_once`

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use requeuest::testkit::Postgres;
use requeuest::{
    DeadLetter, Durable, Guarantee, Options, Request, RequestId, Resolution, Status, migrate,
};

mod support;
use support::{Result, Server, say};

/// What the receiver has booked.
type Ledger = Arc<Mutex<Vec<String>>>;

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let ledger = Ledger::default();
    let server = server(Arc::clone(&ledger)).await?;
    let booked = Arc::clone(&ledger);
    let durable = Durable::builder(database.pool().clone())
        .attempt_timeout(Duration::from_millis(500))
        // A real hook asks the receiver over HTTP. It returns `None` while the receiver can't tell,
        // and is called again later.
        .reconcile(move |letter: DeadLetter, request: Request| {
            let charge = request.body().cloned().unwrap_or_default();
            let charge = String::from_utf8_lossy(&charge).into_owned();
            let is_booked = booked.lock().unwrap().contains(&charge);
            let became = if is_booked {
                Resolution::Sent
            } else {
                Resolution::NotSent
            };
            say(format!("hook: {charge} is {}: {became:?}", letter.status));
            async move { Ok(Some(became)) }
        })
        .build()?;

    say("two charges get no answer: one was booked, the other was not");
    let first = charge(&durable, &server, "charge 1").await?;
    let second = charge(&durable, &server, "charge 2").await?;
    for id in [first, second] {
        let error = durable.response(id).await.unwrap_err();
        assert!(error.is_ambiguous());
        say(error);
    }

    // The receiver has the first one, so it is completed. Its response was never recorded.
    resolved(&durable, first).await?;
    let error = durable.response(first).await.unwrap_err();
    assert!(error.is_response_unknown());
    resolved(&durable, second).await?;
    assert_eq!(durable.response(second).await?.status(), 200);

    let mut booked = ledger.lock().unwrap().clone();
    booked.sort();
    assert_eq!(booked, ["charge 1", "charge 2"]);
    assert_eq!(server.received().len(), 3);
    say("both charges are booked, each once");
    Ok(())
}

async fn charge(durable: &Durable, server: &Server, body: &'static str) -> Result<RequestId> {
    let charge = Request::try_from(http::Request::post(server.url()).body(body)?)?;
    let once = Options::default().guarantee(Guarantee::AtMostOnce);
    Ok(durable.fire(charge.with(once)).await?)
}

/// Waits until the hook has resolved the request. The handle looks every few seconds.
async fn resolved(durable: &Durable, id: RequestId) -> Result<()> {
    while durable.status(id).await? == Some(Status::Ambiguous) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Doesn't answer the first two requests. Of these, it forgets the second charge.
async fn server(ledger: Ledger) -> Result<Server> {
    Server::start(move |number, charge| {
        let answers = number > 2;
        if answers || charge == "charge 1" {
            ledger.lock().unwrap().push(charge);
        }
        async move { if answers { 200 } else { pending().await } }
    })
    .await
}
