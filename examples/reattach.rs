//! Re-attaching: one process fires a request and drops its handle. Another process delivers the
//! request and gets the response by its id.
//!
//! `cargo run --example reattach`

use std::env;

use requeuest::testkit::Postgres;
use requeuest::{Durable, RequestId, migrate};
use sqlx::PgPool;
use tokio::process::Command;

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match &*arguments {
        [] => fire().await,
        [id] => attach(&env::var("DATABASE_URL")?, id.parse()?).await,
        _ => Err("usage: reattach [ID]".into()),
    }
}

async fn fire() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = Server::start(fail_once).await?;

    // This handle only persists requests; it never sends.
    let durable = Durable::builder(database.pool().clone())
        .runner(false)
        .build()?;
    let request = http::Request::post(server.url()).body("order 1")?;
    let id = durable.fire(request).await?;
    drop(durable);
    say(format!("fired {id}, and dropped the handle"));

    // The other process only needs the id. Store it with the data that the request is about.
    let status = Command::new(env::current_exe()?)
        .arg(id.to_string())
        .env("DATABASE_URL", database.url())
        .status()
        .await?;
    assert!(status.success());

    let durable = Durable::new(database.pool().clone());
    let response = durable.response(id).await?;
    assert_eq!(response.status(), 200);
    say(format!(
        "this process reads it, too: {:?}",
        response.text()?
    ));
    assert_eq!(server.received(), ["order 1", "order 1"]);
    Ok(())
}

async fn attach(database: &str, id: RequestId) -> Result<()> {
    let process = std::process::id();
    let durable = Durable::new(PgPool::connect(database).await?);
    if let Some(status) = durable.status(id).await? {
        println!("          process {process}: {id} is {status}");
    }
    let response = durable.response(id).await?;
    println!("          process {process}: {:?}", response.text()?);
    Ok(())
}

async fn fail_once(number: usize, _body: String) -> u16 {
    if number == 1 { 503 } else { 200 }
}
