//! Programs in the shape of the older crate's documentation, one for each form of its requests.

use std::collections::HashSet;
use std::error::Error;

use requeuest::client::Channels;
use requeuest::error::SpawnError;
use requeuest::{AcceptedResponse, Client, HeaderMap, Method, Request, Url, Uuid};
use sqlx::PgPool;

use super::bodies;
use crate::support::{Server, in_time};

/// A database without the schema, as a new user has it.
async fn empty() -> requeuest::testkit::TestDatabase {
    let postgres = requeuest::testkit::Postgres::shared().await.unwrap();
    postgres.database().await.unwrap()
}

/// As for 0.2 and 0.3.
#[expect(clippy::default_trait_access, reason = "that documentation does it")]
async fn with_constructors(pool: PgPool, target: &str) -> Result<String, Box<dyn Error>> {
    requeuest::migrate(&pool).await?;
    let client = Client::new(pool, Channels::List(&["my_service"])).await?;

    let request = Request::get(target.parse()?, HeaderMap::new());
    client.spawn("my_service", &request).await?;

    let request = Request::post(target.parse()?, Vec::from("some data"), Default::default());
    let response = client.spawn_returning("my_service", &request).await?;
    Ok(response.text().await?)
}

/// As for 0.4 to 0.6, with the builder.
async fn with_builder(pool: PgPool, target: &str) -> Result<String, Box<dyn Error>> {
    requeuest::migrate(&pool).await?;
    let client = Client::new(pool, Channels::List(&["my_service"])).await?;

    let request = Request::builder()
        .method(Method::GET)
        .url(Url::parse(target)?)
        .build();
    client.spawn("my_service", &request).await?;

    let request = Request::builder()
        .url(Url::parse(target)?)
        .method(Method::POST)
        .body("some data")
        .headers(HeaderMap::new())
        .accept_responses(HashSet::from([AcceptedResponse::Success]))
        .build();
    let response = client.spawn_returning("my_service", &request).await?;
    Ok(response.text().await?)
}

/// A configuration is a closure without a result, and a channel may be an owned string.
async fn configured(client: Client, request: Request) -> Result<Uuid, SpawnError> {
    let channel = format!("my_{}", "app");
    client
        .spawn_cfg(channel, &request, |job| {
            job.set_ordered(false);
        })
        .await
}

async fn assert_runs<F>(program: impl FnOnce(PgPool, String) -> F)
where
    F: Future<Output = Result<String, Box<dyn Error>>>,
{
    let database = empty().await;
    let server = Server::echo().await;
    let program = program(database.pool().clone(), server.url("/_api/baz"));
    assert_eq!(in_time(program).await.unwrap(), "some data");
    server.wait_for(2).await;
    let mut sent = bodies(&server);
    sent.sort();
    assert_eq!(sent, ["", "some data"]);
}

#[tokio::test]
async fn the_documented_program_of_0_2_runs_unchanged() {
    assert_runs(|pool, target| async move { with_constructors(pool, &target).await }).await;
}

#[tokio::test]
async fn the_builder_of_0_6_makes_the_same_requests() {
    assert_runs(|pool, target| async move { with_builder(pool, &target).await }).await;
}

#[tokio::test]
async fn a_configuration_of_0_6_compiles_and_spawns() {
    let database = crate::support::migrated().await;
    let server = Server::always(200).await;
    let client = super::serving_all(&database).await;
    let url = Url::parse(&server.url("/")).unwrap();
    let request = Request::get(url, HeaderMap::new());
    in_time(configured(client, request)).await.unwrap();
}

#[test]
fn a_builder_shows_no_secret() {
    let url = Url::parse("https://user:hunter2@example.com/hunter3?token=hunter4").unwrap();
    let builder = Request::builder()
        .url(url)
        .method(Method::GET)
        .body("hunter5");
    let shown = format!("{builder:?}");
    assert!(!shown.contains("hunter"), "{shown}");
}
