//! Panics in code of the application's that an attempt runs.

use std::future::{Ready, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use requeuest::classify::classify_fn;
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    Body, DeadLetter, DeadLetterFilter, FailureClass, Guarantee, Options, Outcome, Request,
    Resolution, Status, outcome_fn,
};
use sqlx::PgConnection;

use crate::support::{
    Server, builder, eventually, eventually_rows, in_time, migrated, outcome_of, post, quick,
};

const SECRET: &str = "no https://user:hunter2@host.example/hunter2 today";

/// A client that panics twice, and then answers.
#[derive(Clone, Default)]
struct Panicking {
    calls: Arc<AtomicUsize>,
    /// Panics when it is polled for readiness.
    unready: bool,
}

impl Panicking {
    fn panics(&self) {
        assert!(self.calls.fetch_add(1, Ordering::SeqCst) >= 2, "{SECRET}");
    }
}

impl tower::Service<http::Request<Body>> for Panicking {
    type Response = http::Response<Body>;
    type Error = tower::BoxError;
    type Future = Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if self.unready {
            self.panics();
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        if !self.unready {
            self.panics();
        }
        ready(Ok(http::Response::new(Body::from("at last"))))
    }
}

/// The class and the text of each recorded attempt.
async fn recorded(database: &TestDatabase) -> Vec<(String, String)> {
    let attempts = "SELECT error_class, error FROM requeuest.attempts ORDER BY number";
    sqlx::query_as(attempts)
        .fetch_all(database.pool())
        .await
        .unwrap()
}

fn assert_safe(text: &str) {
    assert!(text.contains("no https://host.example today"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_panic_keeps_its_text_in_the_record_of_the_attempt() {
    for (unready, class) in [(false, FailureClass::Other), (true, FailureClass::NotReady)] {
        let database = migrated().await;
        let client = Panicking {
            unready,
            ..Panicking::default()
        };
        let durable = builder(&database).retry(quick()).transport(client);
        let durable = durable.build().unwrap();
        let response = in_time(durable.await_response(post("http://127.0.0.1/", "x"))).await;
        assert_eq!(response.unwrap().text().unwrap(), "at last");
        let recorded = recorded(&database).await;
        assert_eq!(recorded.len(), 2);
        for (found, text) in recorded {
            assert_eq!(found, class.as_str());
            assert!(text.starts_with("the client panicked: "), "{text}");
            assert_safe(&text);
        }
    }

    // A classifier, and the function of a policy.
    let database = migrated().await;
    let classify = builder(&database)
        .retry(quick())
        .classify(classify_fn(|_| panic!("{SECRET}")));
    let function = RetryPolicy::from_fn(|_| panic!("{SECRET}"));
    let function = builder(&database).channel("function").retry(function);
    for (builder, start) in [
        (classify, "the classifier panicked: "),
        (function, "the retry policy's function panicked: "),
    ] {
        let durable = builder.build().unwrap();
        let server = Server::in_turn(&[503, 200]).await;
        let response = in_time(durable.await_response(post(server.url("/"), "x"))).await;
        assert_eq!(response.unwrap().status(), 200);
        let recorded = recorded(&database).await;
        let (class, text) = recorded.last().unwrap();
        assert_eq!(class, "status");
        let start = format!("answered with 503 Service Unavailable; {start}");
        assert!(text.starts_with(&start), "{text}");
        assert_safe(text);
        sqlx::query("DELETE FROM requeuest.attempts")
            .execute(database.pool())
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_panic_of_the_last_attempt_is_in_the_dead_letter() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .transport(Panicking::default())
        .build()
        .unwrap();
    let id = durable.fire(post("http://127.0.0.1/", "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Discarded);
    assert_safe(outcome.error().unwrap());

    let server = Server::always(503).await;
    let durable = builder(&database)
        .channel("classify")
        .retry(RetryPolicy::none())
        .classify(classify_fn(|_| panic!("{SECRET}")))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.response().unwrap().status(), 503);
    let error = outcome.error().unwrap();
    assert!(error.starts_with("answered with 503"), "{error}");
    assert_safe(error);
}

/// Middleware that panics at its first call.
struct Stumbling(AtomicUsize);

#[async_trait::async_trait]
impl reqwest_middleware::Middleware for Stumbling {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut http::Extensions,
        next: reqwest_middleware::Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        assert!(self.0.fetch_add(1, Ordering::SeqCst) > 0, "{SECRET}");
        next.run(request, extensions).await
    }
}

#[tokio::test]
async fn a_panic_in_a_callers_own_middleware_is_a_failed_attempt() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .with(Stumbling(AtomicUsize::new(0)))
        .build();
    let response = in_time(client.post(server.url("/")).body("x").send()).await;
    assert_eq!(response.unwrap().status(), 200);
    let recorded = recorded(&database).await;
    assert_eq!(recorded.len(), 1);
    assert_safe(&recorded[0].1);
}

async fn fails(_: &mut PgConnection, _: &Outcome) -> Result<(), sqlx::Error> {
    panic!("{SECRET}")
}

#[tokio::test]
async fn a_handler_that_panics_leaves_its_text_with_the_outcome() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).build().unwrap();
    let handled = durable.on_outcome("default", outcome_fn(fails)).await;
    durable.fire(post(server.url("/"), "x")).await.unwrap();
    let failed = "unhandled WHERE error = 'the handler panicked: no https://host.example today'";
    eventually_rows(&database, failed, 1).await;
    drop(handled);
}

#[tokio::test]
async fn a_reconcile_hook_that_panics_is_asked_again() {
    let database = migrated().await;
    let server = Server::always(502).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let durable = builder(&database)
        .reconcile(move |_: DeadLetter, _: Request| {
            let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                assert!(!first, "{SECRET}");
                Ok(Some(Resolution::Sent))
            }
        })
        .build()
        .unwrap();
    let options = Options::default().guarantee(Guarantee::AtMostOnce);
    let request = post(server.url("/"), "x").with(options);
    let id = durable.fire(request).await.unwrap();
    // After a backoff of seconds, and not after a lease of minutes.
    eventually("the hook has answered", || async {
        durable.status(id).await.unwrap() == Some(Status::Completed)
    })
    .await;
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    let all = DeadLetterFilter::default();
    assert!(durable.dead_letters(&all).await.unwrap().is_empty());
}
