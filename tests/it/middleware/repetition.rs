//! Middleware in front of the handle that makes a call more than once.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Extensions;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Durable, Options, RequestId};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};
use reqwest_retry::RetryTransientMiddleware;
use reqwest_retry::policies::ExponentialBackoff;

use super::{holding_the_first, quick_builder};
use crate::layer::repetition::keys;
use crate::support::{Server, eventually, in_time, migrated, quick, rows};

/// A call's result and the id that it left in the extensions.
type Call = (Result<reqwest::Response, Error>, Option<RequestId>);

/// Makes each call twice, with the same extensions.
#[derive(Clone)]
struct Twice {
    /// Called between the two calls.
    between: Arc<dyn Fn() -> futures_util::future::BoxFuture<'static, ()> + Send + Sync>,
    /// The body of the second call, if it differs.
    body: Option<&'static str>,
    /// The options of the second call, if they differ.
    options: Option<Options>,
    first: Arc<Mutex<Option<Call>>>,
    second: Arc<Mutex<Option<RequestId>>>,
}

impl Twice {
    fn new<F>(between: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self {
            between: Arc::new(move || Box::pin(between())),
            body: None,
            options: None,
            first: Arc::default(),
            second: Arc::default(),
        }
    }

    fn in_front_of(&self, durable: Durable) -> ClientWithMiddleware {
        ClientBuilder::new(reqwest::Client::new())
            .with(self.clone())
            .with(durable)
            .build()
    }

    /// The first call's result and id.
    fn first(&self) -> Call {
        self.first.lock().unwrap().take().unwrap()
    }

    /// The second call's id.
    fn second(&self) -> RequestId {
        self.second.lock().unwrap().unwrap()
    }
}

#[async_trait::async_trait]
impl Middleware for Twice {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let again = request.try_clone().unwrap();
        let first = next.clone().run(request, extensions).await;
        let id = extensions.get().copied();
        *self.first.lock().unwrap() = Some((first, id));
        (self.between)().await;
        request = again;
        if let Some(body) = self.body {
            *request.body_mut() = Some(body.into());
        }
        if let Some(options) = &self.options {
            extensions.insert(options.clone());
        }
        let second = next.run(request, extensions).await;
        *self.second.lock().unwrap() = extensions.get().copied();
        second
    }
}

/// Retries three times without noticeable delays.
fn retrying() -> RetryTransientMiddleware<ExponentialBackoff> {
    let short = Duration::from_millis(1);
    let policy = ExponentialBackoff::builder().retry_bounds(short, short);
    RetryTransientMiddleware::new_with_policy(policy.build_with_max_retries(3))
}

async fn all_rows(database: &TestDatabase) -> i64 {
    rows(database, "outcomes").await + rows(database, "mq_msgs").await
}

#[tokio::test]
async fn a_retry_middleware_in_front_multiplies_neither_keys_nor_attempts() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let durable = quick_builder(&database).retry(quick().max_attempts(3));
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(retrying())
        .with(durable.build().unwrap())
        .build();
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(server.count(), 3);
    assert_eq!(keys(&server), 1);
    assert_eq!(all_rows(&database).await, 1);
}

#[tokio::test]
async fn a_completed_call_that_is_made_again_is_a_new_call() {
    let database = migrated().await;
    let server = Server::echo().await;
    let twice = Twice::new(|| async {});
    let client = twice.in_front_of(quick_builder(&database).build().unwrap());
    in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    let (_, first) = twice.first();
    assert_ne!(first, Some(twice.second()));
    assert_eq!(server.count(), 2);
    assert_eq!(keys(&server), 2);
}

#[tokio::test]
async fn another_request_after_a_failed_one_is_a_new_request() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let twice = Twice {
        body: Some("y"),
        ..Twice::new(|| async {})
    };
    let durable = quick_builder(&database).retry(quick().max_attempts(1));
    let client = twice.in_front_of(durable.build().unwrap());
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(twice.first().0.unwrap().status(), 503);
    assert_eq!(server.bodies(), ["x", "y"]);
    assert_eq!(keys(&server), 2);
}

#[tokio::test]
async fn a_call_that_is_told_apart_by_its_options_is_a_new_request() {
    let first = Options::default().key("a").metadata("a");
    for (options, status) in [
        (first.clone().key("b"), 200),
        (first.clone().metadata("b"), 503),
        (first.clone().channel("b").key("a"), 200),
        (Options::default().fire(), 202),
    ] {
        let database = migrated().await;
        let server = Server::in_turn(&[503, 200]).await;
        let twice = Twice {
            options: Some(options.clone()),
            ..Twice::new(|| async {})
        };
        let durable = quick_builder(&database)
            .retry(quick().max_attempts(1))
            .deliver_all();
        let client = twice.in_front_of(durable.build().unwrap());
        let request = client.post(server.url("/")).body("x");
        let response = in_time(request.with_extension(first.clone()).send())
            .await
            .unwrap();
        assert_eq!(twice.first().0.unwrap().status(), 503);
        assert_eq!(response.status(), status, "{options:?}");
        let expected = if status == 503 { 1 } else { 2 };
        server.wait_for(expected).await;
        assert_eq!(keys(&server), expected, "{options:?}");
    }
}

#[tokio::test]
async fn a_call_whose_insert_failed_keeps_its_key() {
    let database = Postgres::shared().await.unwrap().database().await.unwrap();
    let server = Server::echo().await;
    let pool = database.pool().clone();
    // The first call finds no schema.
    let twice = Twice::new(move || {
        let pool = pool.clone();
        async move { requeuest::migrate(&pool).await.unwrap() }
    });
    let client = twice.in_front_of(quick_builder(&database).build().unwrap());
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.text().await.unwrap(), "x");
    let (failed, id) = twice.first();
    let failed = failed.unwrap_err();
    assert!(
        requeuest::Error::from_middleware(&failed)
            .unwrap()
            .is_not_migrated()
    );
    assert_eq!(id, Some(twice.second()));
    assert_eq!(server.count(), 1);
    let key = server.seen()[0].headers["idempotency-key"].clone();
    assert!(key.to_str().unwrap().contains(&twice.second().to_string()));
}

/// Drops its first call once the server has seen the request, and makes it again.
struct Impatient(Server);

#[async_trait::async_trait]
impl Middleware for Impatient {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let again = request.try_clone().unwrap();
        tokio::select! {
            _ = next.clone().run(request, extensions) => panic!("the call was answered"),
            () = self.0.wait_for(1) => {}
        }
        let response = next.run(again, extensions).await;
        assert_eq!(self.0.count(), 2);
        assert_eq!(keys(&self.0), 1);
        response
    }
}

#[tokio::test]
async fn a_dropped_call_that_is_made_again_attaches() {
    let database = migrated().await;
    let server = holding_the_first().await;
    let url = server.url("/");
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(Impatient(server))
        .with(quick_builder(&database).build().unwrap())
        .build();
    let response = in_time(client.post(url).body("x").send()).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "x");
    assert_eq!(rows(&database, "outcomes").await, 1);
    assert_eq!(
        rows(&database, "attempts WHERE error_class = 'abandoned'").await,
        1
    );
    eventually("nothing is left in the queue", || async {
        rows(&database, "mq_msgs").await == 0
    })
    .await;
}

/// Drops its first call as soon as it has begun, and makes it again.
struct Hasty;

#[async_trait::async_trait]
impl Middleware for Hasty {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let again = request.try_clone().unwrap();
        // Polled once: the request is on its way to the database.
        let first = next.clone().run(request, extensions);
        assert!(futures_util::FutureExt::now_or_never(first).is_none());
        next.run(again, extensions).await
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_before_its_insert_is_not_inserted_twice() {
    let database = migrated().await;
    let server = Server::echo().await;
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(Hasty)
        .with(quick_builder(&database).build().unwrap())
        .build();
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.text().await.unwrap(), "x");
    assert_eq!(server.count(), 1);
    assert_eq!(all_rows(&database).await, 1);
}
