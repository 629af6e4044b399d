//! An axum server that stops the right way round: first it takes no more orders, then it ends the calls that they made.
//!
//! `cargo run --example axum_shutdown`

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, Request, RequestId, Status, migrate};
use tokio::net::TcpListener;

mod support;
use support::{Result, Server, say};

#[derive(Clone)]
struct Shop {
    durable: Durable,
    provider: String,
}

/// Charges for the order, which the customer waits for, and has a reminder sent tomorrow.
async fn order(State(shop): State<Shop>, item: String) -> std::result::Result<String, StatusCode> {
    shop.take(&item).await.map_err(|error| {
        say(format!("no order: {error}"));
        StatusCode::SERVICE_UNAVAILABLE
    })
}

impl Shop {
    async fn take(&self, item: &str) -> Result<String> {
        let charge = http::Request::post(&self.provider).body(format!("charge for {item}"))?;
        let paid = self.durable.await_response(charge).await?;
        let reminder = http::Request::post(&self.provider).body(format!("a word about {item}"))?;
        let tomorrow = Options::default().delay(Duration::from_secs(24 * 3600));
        let reminder = Request::try_from(reminder)?.with(tomorrow);
        let reminder = self.durable.fire(reminder).await?;
        say(format!("{item}: {}", paid.status()));
        Ok(reminder.to_string())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let provider = Arc::new(Server::start(slowly).await?);
    let durable = Durable::new(database.pool().clone());
    let shop = Shop {
        durable: durable.clone(),
        provider: provider.url(),
    };

    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let orders = format!("http://{}/orders", listener.local_addr()?);
    let router = Router::new().route("/orders", post(order)).with_state(shop);
    let customer = tokio::spawn(buy(orders.clone(), "a book"));
    tokio::spawn(stop_soon(Arc::clone(&provider)));

    // Returns when the orders that it had taken are answered.
    axum::serve(listener, router)
        .with_graceful_shutdown(asked_to_stop())
        .await?;
    say("no more orders are taken");
    // Only then: until now the handlers could still make calls. Within a deployment's time to stop, with some to spare.
    durable.shutdown(Duration::from_secs(10)).await?;
    say("no more calls are made");

    let reminder: RequestId = customer.await??.parse()?;
    assert!(buy(orders, "a pen").await.is_err());
    assert_eq!(provider.received(), ["charge for a book"]);
    // It waits for the next process.
    let elsewhere = Durable::builder(database.pool().clone())
        .runner(false)
        .build()?;
    assert_eq!(elsewhere.status(reminder).await?, Some(Status::Scheduled));
    say("tomorrow's call is in the queue");
    Ok(())
}

async fn buy(orders: String, item: &'static str) -> Result<String> {
    say(format!("{item} is ordered"));
    let answer = reqwest::Client::new().post(orders).body(item).send();
    Ok(answer.await?.error_for_status()?.text().await?)
}

async fn slowly(_number: usize, _body: String) -> u16 {
    tokio::time::sleep(Duration::from_secs(1)).await;
    200
}

/// Waits for the signal with which a deployment, or a person at the keyboard, ends a process.
async fn asked_to_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// What the deployment would do, while the order is being paid for.
async fn stop_soon(provider: Arc<Server>) -> Result<()> {
    while provider.received().is_empty() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    say("asked to stop");
    let pid = std::process::id().to_string();
    let kill = tokio::process::Command::new("kill").arg(pid).status();
    kill.await?;
    Ok(())
}
