//! The outbox: a request is sent if and only if the transaction commits.
//!
//! `cargo run --example transaction`

use requeuest::testkit::Postgres;
use requeuest::{Durable, RequestId, migrate};
use sqlx::{PgPool, Postgres as Pg, Transaction};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    let pool: &PgPool = database.pool();
    migrate(pool).await?;
    sqlx::query("CREATE TABLE orders (number int PRIMARY KEY)")
        .execute(pool)
        .await?;
    let server = Server::start(|_, _| async { 200 }).await?;
    let durable = Durable::new(pool.clone());

    let mut transaction = pool.begin().await?;
    let lost = place(&mut transaction, &durable, &server, 1).await?;
    transaction.rollback().await?;
    say("order 1 was rolled back");

    let mut transaction = pool.begin().await?;
    let kept = place(&mut transaction, &durable, &server, 2).await?;
    assert!(server.received().is_empty());
    transaction.commit().await?;
    say("order 2 was committed");

    let response = durable.response(kept).await?;
    say(format!("the response for order 2: {:?}", response.text()?));
    // The rollback removed the row too, so nothing can ever send the request.
    assert_eq!(durable.status(lost).await?, None);
    assert_eq!(server.received(), ["order 2"]);
    say("order 1 was never sent");
    Ok(())
}

/// Writes the order and the request that announces it, or neither.
async fn place(
    transaction: &mut Transaction<'_, Pg>,
    durable: &Durable,
    server: &Server,
    number: i32,
) -> Result<RequestId> {
    sqlx::query("INSERT INTO orders (number) VALUES ($1)")
        .bind(number)
        .execute(&mut **transaction)
        .await?;
    let announcement = http::Request::post(server.url()).body(format!("order {number}"))?;
    let id = durable.fire_in(&mut **transaction, announcement).await?;
    say(format!("order {number} is written, its request enqueued"));
    Ok(id)
}
