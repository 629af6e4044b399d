//! The entry point for reqwest-middleware: your existing client with one more middleware.
//!
//! `cargo run --example reqwest_middleware`

use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, REQUEST_ID_HEADER, RequestId, ReqwestTransport, migrate};
use reqwest_middleware::ClientBuilder;

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = Server::start(fail_once).await?;

    let http = reqwest::Client::builder()
        .user_agent("example/1.0")
        .build()?;
    let durable = Durable::builder(database.pool().clone())
        // Makes background attempts. The default is a plain client, without this user agent.
        .transport(ReqwestTransport::new(http.clone()))
        // Reads don't have to survive a crash.
        .pass_through(|request| request.method().is_safe())
        .build()?;
    let client = ClientBuilder::new(http).with(durable.clone()).build();

    say("awaiting a response from a server that fails at first");
    let response = client.post(server.url()).body("awaited").send().await?;
    assert_eq!(response.status(), 200);
    say(format!("got {:?}", response.text().await?));

    say("fire and forget, through the same client");
    let response = client
        .post(server.url())
        .body("fired")
        .with_extension(Options::default().fire())
        .send()
        .await?;
    assert_eq!(response.status(), 202);
    let id: RequestId = response.headers()[REQUEST_ID_HEADER].to_str()?.parse()?;
    say(format!("202 Accepted: {id}"));
    let response = durable.response(id).await?;
    say(format!("its response: {:?}", response.text()?));

    say("a GET passes through: not persisted, not retried");
    let response = client.get(server.url()).send().await?;
    assert_eq!(response.status(), 200);
    assert_eq!(server.received(), ["awaited", "awaited", "fired", ""]);
    Ok(())
}

async fn fail_once(number: usize, _body: String) -> u16 {
    if number == 1 { 503 } else { 200 }
}
