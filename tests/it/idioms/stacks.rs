//! Stacks ported from reqwest-retry and from tower's `Retry`: the code around them stays, and means
//! the same.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::Full;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{DurableBuilder, FailureClass, MapBody};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use reqwest_retry::RetryTransientMiddleware;
use reqwest_retry::policies::ExponentialBackoff;
use tower::retry::{Policy, RetryLayer};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_http::trace::TraceLayer;

use crate::support::{Server, builder, closed_port, hyper_client, in_time, migrated};

const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(5);

fn ported(database: &TestDatabase) -> DurableBuilder {
    builder(database).retry(RetryPolicy::constant(PAUSE).max_attempts(TRIES))
}

/// What an application makes of a call.
#[derive(Debug, PartialEq)]
enum Became {
    Answered(StatusCode, Bytes),
    TimedOut,
    Unreachable,
}

/// The application's code, which knows nothing of how its stack retries.
async fn charge(client: &ClientWithMiddleware, url: String) -> reqwest_middleware::Result<Became> {
    let request = client.post(url).timeout(Duration::from_millis(300));
    match in_time(request.body("amount=5").send()).await {
        Ok(response) => Ok(Became::Answered(response.status(), response.bytes().await?)),
        Err(error) if error.is_timeout() => Ok(Became::TimedOut),
        Err(error) if error.is_connect() => Ok(Became::Unreachable),
        Err(error) => Err(error),
    }
}

#[tokio::test]
async fn code_over_reqwest_retry_means_the_same_over_durable() {
    let database = migrated().await;
    let policy = ExponentialBackoff::builder()
        .retry_bounds(PAUSE, PAUSE)
        .build_with_max_retries(TRIES - 1);
    let client = reqwest::Client::new();
    let plain = ClientBuilder::new(client.clone()).build();
    let before = ClientBuilder::new(client.clone())
        .with(RetryTransientMiddleware::new_with_policy(policy))
        .build();
    let after = ClientBuilder::new(client)
        .with(ported(&database).build().unwrap())
        .build();
    for client in [before, after.clone()] {
        let recovers = Server::in_turn(&[503, 503, 201]).await;
        let created = Became::Answered(StatusCode::CREATED, Bytes::new());
        let became = charge(&client, recovers.url("/")).await.unwrap();
        assert_eq!((became, recovers.count()), (created, 3));

        let missing = Server::always(404).await;
        let not_found = Became::Answered(StatusCode::NOT_FOUND, Bytes::new());
        let became = charge(&client, missing.url("/")).await.unwrap();
        assert_eq!((became, missing.count()), (not_found, 1));

        let fails = Server::always(500).await;
        let failed = Became::Answered(StatusCode::INTERNAL_SERVER_ERROR, Bytes::new());
        let became = charge(&client, fails.url("/")).await.unwrap();
        assert_eq!((became, fails.count()), (failed, 3));
    }
    // reqwest-retry wraps these errors; durable calls return them as a stack without it does.
    for (client, tries) in [(plain, 1), (after, 3)] {
        let (silent, _never) = Server::held(200).await;
        let became = charge(&client, silent.url("/")).await.unwrap();
        assert_eq!((became, silent.count()), (Became::TimedOut, tries));

        let closed = format!("http://{}/", closed_port().await);
        let became = charge(&client, closed).await.unwrap();
        assert_eq!(became, Became::Unreachable);
    }
}

/// Retries server errors, as applications write it for tower.
#[derive(Clone)]
struct Attempts(u32);

impl<B, E> Policy<Request<Full<Bytes>>, http::Response<B>, E> for Attempts {
    type Future = tokio::time::Sleep;

    fn retry(
        &mut self,
        _: &mut Request<Full<Bytes>>,
        result: &mut Result<http::Response<B>, E>,
    ) -> Option<tokio::time::Sleep> {
        let failed = match result {
            Ok(response) => response.status().is_server_error(),
            Err(_) => true,
        };
        self.0 -= 1;
        (failed && self.0 > 0).then(|| tokio::time::sleep(PAUSE))
    }

    fn clone_request(&mut self, request: &Request<Full<Bytes>>) -> Option<Request<Full<Bytes>>> {
        Some(request.clone())
    }
}

/// The application's code. Only the names of the types differ in what it returns.
async fn status<S, B>(mut client: S, url: &str) -> Result<StatusCode, S::Error>
where
    S: Service<Request<Full<Bytes>>, Response = http::Response<B>>,
{
    let request = Request::post(url).body(Full::from("amount=5")).unwrap();
    let response = in_time(client.ready().await?.call(request)).await?;
    Ok(response.status())
}

#[tokio::test]
async fn code_over_towers_retry_means_the_same_over_the_layer() {
    let database = migrated().await;
    let token = || {
        SetRequestHeaderLayer::overriding(
            http::header::AUTHORIZATION,
            HeaderValue::from_static("Bearer of-the-day"),
        )
    };
    let before = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(RetryLayer::new(Attempts(TRIES)))
        .layer(token())
        .service(hyper_client::<Full<Bytes>>());
    let after = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(ported(&database).build_layer().unwrap())
        .layer(token())
        // The application's client, over the body that it has.
        .service(MapBody::new(
            hyper_client::<Full<Bytes>>(),
            |body: requeuest::Body| {
                Full::new(Bytes::copy_from_slice(body.as_bytes().unwrap_or_default()))
            },
        ));

    let recovers = || Server::in_turn(&[503, 503, 201]);
    let servers = [recovers().await, recovers().await];
    let first = status(before.clone(), &servers[0].url("/")).await.unwrap();
    let second = status(after.clone(), &servers[1].url("/")).await.unwrap();
    assert_eq!((first, second), (StatusCode::CREATED, StatusCode::CREATED));
    for server in servers {
        for seen in server.seen() {
            assert_eq!(seen.headers["authorization"], "Bearer of-the-day");
            assert_eq!(seen.body, "amount=5");
        }
        assert_eq!(server.count(), 3);
    }

    let closed = format!("http://{}/", closed_port().await);
    assert!(status(before, &closed).await.unwrap_err().is_connect());
    let error = status(after, &closed).await.unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Connect));
}
