//! `DurableService` in tower stacks.

use std::time::Duration;

use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use requeuest::{
    AttemptNumber, Body, Durable, DurableLayer, DurableService, MapBody, MiddlewareTransport,
    ReqwestTransport,
};
use reqwest_middleware::{ClientBuilder, Extension};
use tower::util::BoxCloneService;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::support::{Server, builder, hyper_client, in_time, migrated, outcome_of, rows};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

async fn text(response: Response<Body>) -> String {
    response.into_body().text().await.unwrap()
}

#[tokio::test]
async fn ready_then_call_with_full_over_hyper() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .service(Client::builder(TokioExecutor::new()).build_http());
    let request = Request::post(server.url("/")).body(Full::new(Bytes::from("full")))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "full");
    Ok(())
}

#[tokio::test]
async fn ready_then_call_over_reqwest() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .service(ReqwestTransport::new(reqwest::Client::new()));
    let request = Request::post(server.url("/")).body(Body::from("own"))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "own");
    Ok(())
}

#[tokio::test]
async fn ready_then_call_with_the_body_of_axum() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .service(hyper_client());
    let request = Request::post(server.url("/")).body(axum::body::Body::from("axum"))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "axum");
    Ok(())
}

#[tokio::test]
async fn ready_then_call_below_a_buffer() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .buffer(8)
        .layer(DurableLayer::new(database.pool().clone()))
        .service(hyper_client());
    let request = Request::post(server.url("/")).body(Full::new(Bytes::from("buffer")))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "buffer");
    Ok(())
}

#[tokio::test]
async fn ready_then_call_below_a_concurrency_limit() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .concurrency_limit(2)
        .layer(DurableLayer::new(database.pool().clone()))
        .service(hyper_client());
    let request = Request::post(server.url("/")).body(Full::new(Bytes::from("limit")))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "limit");
    Ok(())
}

#[tokio::test]
async fn ready_then_call_below_a_timeout() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let mut svc = ServiceBuilder::new()
        .timeout(Duration::from_secs(30))
        .layer(DurableLayer::new(database.pool().clone()))
        .service(hyper_client());
    let request = Request::post(server.url("/")).body(Full::new(Bytes::from("timeout")))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "timeout");
    Ok(())
}

#[tokio::test]
async fn a_service_is_boxed_like_any_other() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let layer = DurableLayer::new(database.pool().clone());
    let svc: BoxCloneService<Request<Full<Bytes>>, _, _> =
        BoxCloneService::new(ServiceBuilder::new().layer(layer).service(hyper_client()));
    let request = Request::post(server.url("/")).body(Full::new(Bytes::from("boxed")))?;
    assert_eq!(text(in_time(svc.oneshot(request)).await?).await, "boxed");
    Ok(())
}

/// The types can be named: in a struct, and as axum's state.
#[derive(Clone)]
struct Shop {
    provider: String,
    client: DurableService<Client<HttpConnector, Body>>,
}

async fn order(State(mut shop): State<Shop>, item: String) -> Result<Response<Body>, String> {
    let charge = Request::post(&shop.provider)
        .body(Body::from(item))
        .map_err(|error| error.to_string())?;
    let client = shop
        .client
        .ready()
        .await
        .map_err(|error| error.to_string())?;
    client.call(charge).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn an_axum_handler_returns_the_response() {
    let database = migrated().await;
    let server = Server::echo().await;
    let layer = DurableLayer::new(database.pool().clone());
    let shop = Shop {
        provider: server.url("/"),
        client: ServiceBuilder::new().layer(layer).service(hyper_client()),
    };
    let router = axum::Router::new()
        .route("/orders", post(order))
        .with_state(shop);
    let request = Request::post("/orders").body(axum::body::Body::from("tea"));
    let response = in_time(router.oneshot(request.unwrap())).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "tea");
}

#[tokio::test]
async fn a_client_over_another_body_is_a_transport() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let axum_client: Client<_, axum::body::Body> =
        Client::builder(TokioExecutor::new()).build_http();
    let mut svc = ServiceBuilder::new()
        .layer(DurableLayer::new(database.pool().clone()))
        .service(MapBody::new(axum_client, axum::body::Body::new));
    let request = Request::post(server.url("/")).body(axum::body::Body::from("mapped"))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "mapped");
    Ok(())
}

#[tokio::test]
async fn a_client_with_middleware_is_a_transport() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::always(200).await;
    let inner = ClientBuilder::new(reqwest::Client::new())
        .with_init(|request: reqwest_middleware::RequestBuilder| request)
        .with(Stamp)
        .build();
    let durable = builder(&database)
        .transport(MiddlewareTransport::from(inner))
        .build()?;
    let request = Request::post(server.url("/")).body("x")?;
    let id = durable.fire(request).await?;
    outcome_of(&durable, id).await;
    assert_eq!(server.seen()[0].headers["x-stamp"], "yes");
    assert_eq!(rows(&database, "outcomes").await, 1);
    Ok(())
}

#[tokio::test]
async fn attempts_pass_a_handle_that_their_transport_contains() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::always(200).await;
    let nested = builder(&database).runner(false).build()?;
    let inner = ServiceBuilder::new()
        .layer(nested.layer())
        .service(MiddlewareTransport::new(
            ClientBuilder::new(reqwest::Client::new())
                .with(nested.clone())
                .build(),
        ));
    let durable = builder(&database).transport(inner).build()?;
    let id = durable
        .fire(Request::post(server.url("/")).body("x")?)
        .await?;
    outcome_of(&durable, id).await;
    assert_eq!(server.count(), 1);
    assert_eq!(rows(&database, "outcomes").await, 1);
    Ok(())
}

#[tokio::test]
async fn a_body_in_memory_passes_a_nested_layer_as_one() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let nested = builder(&database)
        .runner(false)
        .pass_through(|head| head.path() == "/passing")
        .build()?;
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let client = MapBody::new(client, |body: Body| {
        Full::new(Bytes::copy_from_slice(body.as_bytes().unwrap()))
    });
    let inner = nested.layer().layer(client);
    let passing = Request::post(server.url("/passing")).body(Body::from("passing"))?;
    let response = in_time(inner.clone().oneshot(passing)).await?;
    assert_eq!(text(response).await, "passing");

    let durable = builder(&database).transport(inner).build()?;
    let attempt = Request::post(server.url("/")).body("attempt")?;
    let response = in_time(durable.await_response(attempt)).await?;
    assert_eq!(response.text()?, "attempt");
    Ok(())
}

#[tokio::test]
async fn initialisers_of_a_client_with_middleware_reach_its_middleware() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::always(200).await;
    let inner = ClientBuilder::new(reqwest::Client::new())
        .with_init(Extension(Note("from the initialiser")))
        .with(Noting)
        .build();
    let durable = builder(&database)
        .transport(MiddlewareTransport::from(inner))
        .build()?;
    let request = Request::post(server.url("/")).body("x")?;
    let id = durable.fire(request).await?;
    outcome_of(&durable, id).await;
    assert_eq!(server.seen()[0].headers["x-note"], "from the initialiser");
    assert_eq!(server.seen()[0].headers["x-attempt"], "1");
    Ok(())
}

#[derive(Clone)]
struct Note(&'static str);

/// Sends what it finds in the extensions.
struct Noting;

#[async_trait::async_trait]
impl reqwest_middleware::Middleware for Noting {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut http::Extensions,
        next: reqwest_middleware::Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let headers = request.headers_mut();
        if let Some(Note(note)) = extensions.get() {
            headers.insert("x-note", http::HeaderValue::from_static(note));
        }
        if let Some(number) = extensions.get::<AttemptNumber>() {
            headers.insert("x-attempt", number.get().into());
        }
        next.run(request, extensions).await
    }
}

struct Stamp;

#[async_trait::async_trait]
impl reqwest_middleware::Middleware for Stamp {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut http::Extensions,
        next: reqwest_middleware::Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let yes = http::HeaderValue::from_static("yes");
        request.headers_mut().insert("x-stamp", yes);
        next.run(request, extensions).await
    }
}

#[tokio::test]
async fn a_handle_makes_layers_for_any_client() -> Result<(), BoxError> {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = Durable::new(database.pool().clone());
    let mut svc = ServiceBuilder::new()
        .layer(durable.layer())
        .service(hyper_client());
    let request = Request::post(server.url("/")).body(String::from("text"))?;
    let response = in_time(svc.ready().await?.call(request)).await?;
    assert_eq!(text(response).await, "text");
    Ok(())
}
