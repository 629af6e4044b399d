//! The entry point for tower: a layer that makes the calls of any HTTP client service durable.
//!
//! `cargo run --example tower`

use std::time::Duration;

use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use requeuest::testkit::Postgres;
use requeuest::{Body, DurableLayer, Options, REQUEST_ID_HEADER, RequestId, migrate};
use tower::{ServiceBuilder, ServiceExt};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = Server::start(fail_once).await?;

    // Layers above see one call and its final response; layers below see every attempt.
    let hyper = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let client = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .map_request(|request: http::Request<Body>| {
            say("    sending an attempt");
            request
        })
        .service(hyper);

    say("awaiting a response from a server that fails at first");
    let request = http::Request::post(server.url()).body(Body::from("awaited"))?;
    let response = client.clone().oneshot(request).await?;
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await?.to_bytes();
    say(format!("got {:?}", String::from_utf8_lossy(&body)));

    say("fire and forget, through the same client");
    let request = http::Request::post(server.url())
        .extension(Options::default().fire().delay(Duration::from_millis(500)))
        .body(Body::from("fired"))?;
    let response = client.clone().oneshot(request).await?;
    assert_eq!(response.status(), 202);
    let id: RequestId = response.headers()[REQUEST_ID_HEADER].to_str()?.parse()?;
    say(format!("202 Accepted: {id}"));

    let response = client.durable().response(id).await?;
    assert_eq!(response.status(), 200);
    say(format!("its response: {:?}", response.text()?));
    assert_eq!(server.received(), ["awaited", "awaited", "fired"]);
    Ok(())
}

async fn fail_once(number: usize, _body: String) -> u16 {
    if number == 1 { 503 } else { 200 }
}
