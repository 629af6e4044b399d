//! An axum server that stops in the right order: it stops taking orders first, and then stops
//! requeuest, so that the handlers' calls can finish.
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

/// Charges for the order while the customer waits, and fires a reminder for tomorrow.
async fn order(State(shop): State<Shop>, item: String) -> std::result::Result<String, StatusCode> {
    shop.take(&item).await.map_err(|error| {
        say(format!("the order failed: {error}"));
        StatusCode::SERVICE_UNAVAILABLE
    })
}

impl Shop {
    async fn take(&self, item: &str) -> Result<String> {
        let charge = http::Request::post(&self.provider).body(format!("charge for {item}"))?;
        let paid = self.durable.await_response(charge).await?;
        let reminder = http::Request::post(&self.provider).body(format!("reminder: {item}"))?;
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

    // Returns once all orders that the server has taken are answered.
    axum::serve(listener, router)
        .with_graceful_shutdown(asked_to_stop())
        .await?;
    say("the server takes no more orders");
    // Only now, because until here the handlers could still make calls. Keep `grace` shorter than
    // the time that your deployment gives a process to stop.
    durable.shutdown(Duration::from_secs(10)).await?;
    say("requeuest makes no more calls");

    let reminder: RequestId = customer.await??.parse()?;
    assert!(buy(orders, "a pen").await.is_err());
    assert_eq!(provider.received(), ["charge for a book"]);
    // The reminder waits for the next process.
    let elsewhere = Durable::builder(database.pool().clone())
        .runner(false)
        .build()?;
    assert_eq!(elsewhere.status(reminder).await?, Some(Status::Scheduled));
    say("tomorrow's reminder is in the queue");
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

/// Waits for SIGTERM from a deployment, or Ctrl-C from a terminal.
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

/// Stops this process as a deployment would, while the charge for the order is in flight.
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
