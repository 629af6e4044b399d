//! Outcomes: a handler gets the outcome of each request of a channel, in a transaction of your own
//! database. What it writes there takes effect exactly once.
//!
//! `cargo run --example on_outcome`

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use requeuest::testkit::Postgres;
use requeuest::{Durable, Outcome, Uuid, migrate, outcome_fn_with};
use sqlx::{PgConnection, PgPool};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    let pool: &PgPool = database.pool();
    migrate(pool).await?;
    sqlx::query("CREATE TABLE orders (number int PRIMARY KEY, request uuid, state text)")
        .execute(pool)
        .await?;
    let server = Server::start(answer).await?;
    let durable = Durable::builder(pool.clone()).channel("orders").build()?;

    // Keep the subscription: the handler stops when it is dropped. Each process that may handle
    // outcomes subscribes when it starts.
    let handler = outcome_fn_with(AtomicBool::new(false), book);
    let _subscription = durable.on_outcome("orders", handler).await?;

    // The order and its request are one transaction, so the handler always finds the order.
    for number in [1, 2] {
        let mut transaction = pool.begin().await?;
        let order = http::Request::post(server.url()).body(format!("order {number}"))?;
        let id = durable.fire_in(&mut *transaction, order).await?;
        sqlx::query("INSERT INTO orders VALUES ($1, $2, 'sent')")
            .bind(number)
            .bind(Uuid::from(id))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
    }

    let states = handled(pool).await?;
    assert_eq!(states, ["accepted", "refused"]);
    let mut received = server.received();
    received.sort();
    // The handler failed once and was called again; nothing was sent again.
    assert_eq!(received, ["order 1", "order 2"]);
    say(format!("the orders are {states:?}, and each was sent once"));
    Ok(())
}

/// Writes what became of an order. The first call fails after its write.
async fn book(
    failed: &AtomicBool,
    transaction: &mut PgConnection,
    outcome: &Outcome,
) -> Result<()> {
    let accepted = outcome
        .response()
        .is_some_and(|response| response.status().is_success());
    let state = if accepted { "accepted" } else { "refused" };
    let request = Uuid::from(outcome.id());
    sqlx::query("UPDATE orders SET state = $1 WHERE request = $2")
        .bind(state)
        .bind(request)
        .execute(transaction)
        .await?;
    say(format!("handler: {request} is {state}"));
    if !failed.swap(true, Ordering::Relaxed) {
        say("handler: something else fails, so nothing is written");
        return Err("called again later".into());
    }
    Ok(())
}

/// The states of the orders, once the handler has written them all.
async fn handled(pool: &PgPool) -> Result<Vec<String>> {
    loop {
        let states: Vec<String> = sqlx::query_scalar("SELECT state FROM orders ORDER BY number")
            .fetch_all(pool)
            .await?;
        if states.iter().all(|state| state != "sent") {
            return Ok(states);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A 422 is an answer like any other: it is not retried.
async fn answer(_number: usize, body: String) -> u16 {
    if body == "order 2" { 422 } else { 201 }
}
