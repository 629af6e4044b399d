//! `?` on responses and bodies, in functions with each of the usual error types.

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use requeuest::testkit::TestDatabase;
use requeuest::{Body, Durable, DurableLayer};
use serde::Deserialize;
use tower::{Service, ServiceBuilder, ServiceExt};

use crate::support::{Server, hyper_client, in_time, migrated};

#[derive(Debug, Deserialize, PartialEq)]
struct Charge {
    amount: u32,
}

async fn response(
    database: &TestDatabase,
    url: &str,
) -> Result<http::Response<Body>, requeuest::Error> {
    let request = Request::post(url).body(Full::new(Bytes::from(r#"{"amount":5}"#)));
    let mut svc = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .service(hyper_client());
    in_time(svc.ready().await?.call(request.unwrap())).await
}

async fn boxed(database: &TestDatabase, url: &str) -> Result<Bytes, Box<dyn std::error::Error>> {
    let response = response(database, url).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

async fn by_anyhow(database: &TestDatabase, url: &str) -> anyhow::Result<Bytes> {
    let response = response(database, url).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

async fn by_eyre(database: &TestDatabase, url: &str) -> eyre::Result<Bytes> {
    let response = response(database, url).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

#[tokio::test]
async fn a_body_is_collected_with_a_question_mark() {
    let database = migrated().await;
    let server = Server::echo().await;
    let url = server.url("/");
    assert_eq!(boxed(&database, &url).await.unwrap(), r#"{"amount":5}"#);
    assert_eq!(by_anyhow(&database, &url).await.unwrap(), r#"{"amount":5}"#);
    assert_eq!(by_eyre(&database, &url).await.unwrap(), r#"{"amount":5}"#);
}

#[tokio::test]
async fn a_body_is_read_as_bytes_text_and_json() -> anyhow::Result<()> {
    let database = migrated().await;
    let server = Server::echo().await;
    let url = server.url("/");
    let bytes = response(&database, &url)
        .await?
        .into_body()
        .into_bytes()
        .await?;
    assert_eq!(bytes, r#"{"amount":5}"#);
    let text = response(&database, &url).await?.into_body().text().await?;
    assert_eq!(text, r#"{"amount":5}"#);
    let charge: Charge = response(&database, &url).await?.into_body().json().await?;
    assert_eq!(charge, Charge { amount: 5 });

    let durable = Durable::new(database.pool().clone());
    let request = Request::post(url).body("{}")?;
    let response = in_time(durable.await_response(request)).await?;
    assert_eq!(response.text()?, "{}");
    let refused = response.json::<Charge>().unwrap_err();
    assert_eq!(refused.to_string(), "the body is not the expected JSON");
    assert!(
        std::error::Error::source(&refused)
            .unwrap()
            .to_string()
            .contains("amount")
    );
    assert_eq!(response.into_bytes(), "{}");
    Ok(())
}
