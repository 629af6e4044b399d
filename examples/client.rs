//! The older API: a `Client` spawns requests on named channels and retries them until a response is
//! accepted. It is for code written against the older crate; new code uses `Durable`.
//!
//! `cargo run --example client`

use std::time::Duration;

use requeuest::testkit::Postgres;
use requeuest::{Channels, Client, HeaderMap, Request, StatusCode, Url, migrate};

mod support;
use support::{Result, Server, say};

#[tokio::main]
async fn main() -> Result<()> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let server = Server::start(answer).await?;
    let url = Url::parse(&server.url())?;
    let mut client = Client::new(database.pool().clone(), Channels::List(&["shop"])).await?;

    say("any 2xx is accepted, every other response is retried, here a 404");
    let order = Request::post(url.clone(), b"order".to_vec(), HeaderMap::new());
    let response = client.spawn_returning("shop", &order).await?;
    assert_eq!(response.status(), 200);
    say(format!("got {:?}", response.text().await?));

    say("a request can say which responses it accepts");
    let conflict = Request::post(url.clone(), b"conflict".to_vec(), HeaderMap::new())
        .accept_responses([StatusCode::OK, StatusCode::CONFLICT]);
    let response = client.spawn_returning("shop", &conflict).await?;
    assert_eq!(response.status(), 409);

    say("fire and forget, delayed by half a second, with up to five retries");
    let hook = Request::post(url, b"hook".to_vec(), HeaderMap::new());
    let id = client
        .spawn_cfg("shop", &hook, |job| {
            job.set_delay(Duration::from_millis(500)).set_retries(5);
        })
        .await?;
    say(format!("spawned {id}"));
    let response = client.durable().response(id.into()).await?;
    assert_eq!(response.status(), StatusCode::OK);
    say(format!("its response: {:?}", response.text()?));
    assert_eq!(server.received(), ["order", "order", "conflict", "hook"]);

    say("at the end, the listener waits for the attempts in flight");
    if let Some(listener) = client.take_listener() {
        listener.stop().await?;
    }
    Ok(())
}

async fn answer(number: usize, body: String) -> u16 {
    match (number, &*body) {
        (1, _) => 404,
        (_, "conflict") => 409,
        _ => 200,
    }
}
