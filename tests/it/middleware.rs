//! `Durable` as reqwest middleware, in a `ClientWithMiddleware`.

mod context;
mod repetition;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{Extensions, HeaderMap, HeaderValue, Method, StatusCode};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    Body, Durable, DurableBuilder, Error, FailureClass, Options, REQUEST_ID_HEADER, RequestId,
    ReqwestTransport, Status, testkit,
};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Middleware, Next};
use tokio::sync::Notify;
use tower::{Service, service_fn};

use crate::support::{
    LONG, Server, builder, closed_port, count, eventually, in_time, migrated, outcome_of, quick,
    reply, rows,
};

fn wrapped(durable: Durable) -> ClientWithMiddleware {
    ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .build()
}

fn quick_builder(database: &TestDatabase) -> DurableBuilder {
    builder(database).retry(quick())
}

/// Counts the requests that pass through.
#[derive(Clone, Default)]
struct Counting(Arc<AtomicUsize>);

impl Counting {
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl Middleware for Counting {
    async fn handle(
        &self,
        mut request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        let number = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        request.headers_mut().insert("x-counted", number.into());
        next.run(request, extensions).await
    }
}

/// A transport for orphaned requests, and how often it was called.
fn background() -> (
    impl Service<
        http::Request<Body>,
        Response = http::Response<reqwest::Body>,
        Error = reqwest::Error,
        Future: Send,
    > + Clone
    + Send
    + 'static,
    Arc<AtomicUsize>,
) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let service = service_fn(move |request| {
        counted.fetch_add(1, Ordering::SeqCst);
        ReqwestTransport::new(reqwest::Client::new()).call(request)
    });
    (service, calls)
}

fn id_of(response: &reqwest::Response) -> RequestId {
    let id = &response.headers()[REQUEST_ID_HEADER];
    id.to_str().unwrap().parse().unwrap()
}

/// The id of the only request, finished or not.
async fn only_id(database: &TestDatabase) -> RequestId {
    let ids = "SELECT id FROM requeuest.mq_msgs UNION SELECT id FROM requeuest.outcomes";
    let id: uuid::Uuid = sqlx::query_scalar(ids)
        .fetch_one(database.pool())
        .await
        .unwrap();
    id.into()
}

#[tokio::test]
async fn a_wrapped_client_gets_the_response_and_it_is_stored() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(201, seen.body) }).await;
    let client = wrapped(Durable::new(database.pool().clone()));
    let url = server.url("/a?b=%20c");
    let response = in_time(client.post(&url).body("hello").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 201);
    assert_eq!(response.url().as_str(), url);
    assert_eq!(response.text().await.unwrap(), "hello");
    assert_eq!(rows(&database, "outcomes WHERE http_status = 201").await, 1);
}

#[tokio::test]
async fn every_live_attempt_goes_through_the_rest_of_the_stack() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let (transport, background_calls) = background();
    let (outer, inner) = (Counting::default(), Counting::default());
    let mut headers = HeaderMap::new();
    headers.insert("x-default", HeaderValue::from_static("yes"));
    let bottom = reqwest::Client::builder().default_headers(headers);
    let client = ClientBuilder::new(bottom.build().unwrap())
        .with(outer.clone())
        .with(
            quick_builder(&database)
                .transport(transport)
                .build()
                .unwrap(),
        )
        .with(inner.clone())
        .build();

    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    for (number, seen) in seen.iter().enumerate() {
        assert_eq!(seen.headers["x-default"], "yes");
        assert_eq!(seen.headers["x-counted"], (number + 1).to_string());
        assert_eq!(seen.body, "x");
    }
    assert_eq!(outer.count(), 1);
    assert_eq!(inner.count(), 3);
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);
    // The failed attempts are recorded like any others.
    assert_eq!(rows(&database, "attempts WHERE http_status = 503").await, 2);
}

/// A server that never answers its first request.
async fn holding_the_first() -> Server {
    let never = Arc::new(Notify::new());
    Server::start(move |number, seen| {
        let never = Arc::clone(&never);
        async move {
            if number == 0 {
                never.notified().await;
            }
            reply(200, seen.body)
        }
    })
    .await
}

/// Drops a caller while its request is being sent.
async fn abandon(client: &ClientWithMiddleware, server: &Server) {
    let caller = tokio::spawn(client.post(server.url("/")).body("x").send());
    server.wait_for(1).await;
    caller.abort();
    assert!(in_time(caller).await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn an_orphaned_request_finishes_through_the_transport() {
    let database = migrated().await;
    let server = holding_the_first().await;
    let (transport, background_calls) = background();
    let durable = quick_builder(&database)
        .transport(transport)
        .build()
        .unwrap();
    let inner = Counting::default();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .with(inner.clone())
        .build();
    abandon(&client, &server).await;

    let id = only_id(&database).await;
    let response = in_time(durable.response(id)).await.unwrap();
    assert_eq!(response.text().unwrap(), "x");
    assert_eq!(server.count(), 2);
    assert_eq!(inner.count(), 1);
    assert_eq!(background_calls.load(Ordering::SeqCst), 1);
    assert!(!server.seen()[1].headers.contains_key("x-counted"));
    let attempts = "SELECT attempts::bigint FROM requeuest.outcomes";
    assert_eq!(count(&database, attempts).await, 2);
    let abandoned = "attempts WHERE number = 1 AND error_class = 'abandoned'";
    assert_eq!(rows(&database, abandoned).await, 1);
}

#[tokio::test]
async fn an_orphaned_attempt_counts_as_failed_and_backs_off() {
    let database = migrated().await;
    let server = holding_the_first().await;
    let (transport, background_calls) = background();
    let day = Duration::from_secs(24 * 60 * 60);
    let durable = builder(&database)
        .retry(RetryPolicy::constant(day))
        .transport(transport)
        .build()
        .unwrap();
    let client = wrapped(durable.clone());
    abandon(&client, &server).await;
    let id = only_id(&database).await;
    eventually("the request is put back", || async {
        durable.status(id).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    let abandoned = "attempts WHERE error_class = 'abandoned'";
    assert_eq!(rows(&database, abandoned).await, 1);
    assert_eq!(server.count(), 1);

    // Makes the retry due.
    sqlx::query("UPDATE requeuest.mq_msgs SET attempt_at = now()")
        .execute(database.pool())
        .await
        .unwrap();
    let response = in_time(durable.response(id)).await.unwrap();
    assert_eq!(response.text().unwrap(), "x");
    assert_eq!(background_calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_orphaned_last_attempt_ends_the_request() {
    let database = migrated().await;
    let server = holding_the_first().await;
    let durable = builder(&database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    abandon(&wrapped(durable.clone()), &server).await;
    let id = only_id(&database).await;
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Discarded);
    assert!(outcome.into_result().unwrap_err().is_discarded());
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_fired_request_is_accepted_now_and_delivered_later() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let (transport, background_calls) = background();
    let durable = quick_builder(&database)
        .transport(transport)
        .build()
        .unwrap();
    let inner = Counting::default();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .with(inner.clone())
        .build();
    let response = in_time(
        client
            .post(server.url("/"))
            .body("x")
            .with_extension(Options::default().fire())
            .send(),
    )
    .await
    .unwrap();
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let id = id_of(&response);
    assert_eq!(response.text().await.unwrap(), "");
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.into_result().unwrap().status(), 200);
    assert_eq!(background_calls.load(Ordering::SeqCst), 2);
    assert_eq!(inner.count(), 0);
}

#[tokio::test]
async fn options_are_taken_from_a_requests_extensions() {
    let database = migrated().await;
    let server = Server::in_turn(&[404, 200, 503]).await;
    let durable = quick_builder(&database)
        .deliver(["default", "billing"])
        .build()
        .unwrap();
    let client = wrapped(durable);
    let send = |options: Options| async {
        let request = client
            .post(server.url("/"))
            .body("x")
            .with_extension(options);
        in_time(request.send()).await.unwrap()
    };
    let accept = Options::default()
        .accept([StatusCode::OK])
        .channel("billing");
    assert_eq!(send(accept).await.status(), 200);
    assert_eq!(server.count(), 2);
    let billed = "outcomes WHERE channel_name = 'billing'";
    assert_eq!(rows(&database, billed).await, 1);

    // The runner sends a delayed request, and its caller still waits for the response.
    let delay = Duration::from_millis(300);
    let began = std::time::Instant::now();
    let later = Options::default().delay(delay).retry(RetryPolicy::none());
    assert_eq!(send(later).await.status(), 503);
    assert!(began.elapsed() >= delay);
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn pass_through_requests_are_not_persisted_or_retried() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let inner = Counting::default();
    let durable = quick_builder(&database)
        .pass_through(|head| head.method() == Method::GET && head.host() == Some("127.0.0.1"))
        .build()
        .unwrap();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .with(inner.clone())
        .build();
    let response = in_time(client.get(server.url("/")).send()).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(inner.count(), 1);
    for table in ["mq_msgs", "mq_payloads", "outcomes", "attempts"] {
        assert_eq!(rows(&database, table).await, 0, "{table}");
    }

    // reqwest's own error is passed on.
    let url = format!("http://{}/", closed_port().await);
    let error = in_time(client.get(url).send()).await.unwrap_err();
    assert!(error.is_connect(), "{error:?}");
}

#[tokio::test]
async fn outer_middleware_sees_extensions_of_the_last_attempt() {
    #[derive(Clone, Debug, PartialEq)]
    struct Note(&'static str, u16);

    /// Notes the response's status, and checks that earlier attempts left no note.
    struct Noting;

    #[async_trait::async_trait]
    impl Middleware for Noting {
        async fn handle(
            &self,
            request: reqwest::Request,
            extensions: &mut Extensions,
            next: Next<'_>,
        ) -> reqwest_middleware::Result<reqwest::Response> {
            assert_eq!(extensions.get(), Some(&Note("outer", 0)));
            let response = next.run(request, extensions).await?;
            extensions.insert(Note("inner", response.status().as_u16()));
            Ok(response)
        }
    }

    /// Leaves a note before the call, and keeps the note that it finds afterwards.
    struct Outer(Arc<Mutex<Option<Note>>>);

    #[async_trait::async_trait]
    impl Middleware for Outer {
        async fn handle(
            &self,
            request: reqwest::Request,
            extensions: &mut Extensions,
            next: Next<'_>,
        ) -> reqwest_middleware::Result<reqwest::Response> {
            extensions.insert(Note("outer", 0));
            let response = next.run(request, extensions).await;
            *self.0.lock().unwrap() = extensions.get().cloned();
            response
        }
    }

    let database = migrated().await;
    let server = Server::in_turn(&[503, 502, 200]).await;
    let found = Arc::default();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(Outer(Arc::clone(&found)))
        .with(quick_builder(&database).build().unwrap())
        .with(Noting)
        .build();
    in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(server.count(), 3);
    assert_eq!(*found.lock().unwrap(), Some(Note("inner", 200)));
}

#[tokio::test]
async fn a_streamed_body_is_sent_whole_with_each_attempt() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let client = wrapped(quick_builder(&database).build().unwrap());
    let parts = stream::iter(["in ", "parts"].map(|part| Ok::<_, Infallible>(Bytes::from(part))));
    let body = reqwest::Body::wrap_stream(parts);
    in_time(client.post(server.url("/")).body(body).send())
        .await
        .unwrap();
    let bodies: Vec<_> = server.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(bodies, ["in parts", "in parts"]);
}

#[tokio::test]
async fn a_streamed_body_over_the_limit_is_refused_unsent() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = wrapped(
        quick_builder(&database)
            .max_request_body(4)
            .build()
            .unwrap(),
    );
    let parts = stream::iter(["abc", "def"].map(|part| Ok::<_, Infallible>(Bytes::from(part))));
    let body = reqwest::Body::wrap_stream(parts);
    let error = in_time(client.post(server.url("/")).body(body).send())
        .await
        .unwrap_err();
    assert!(Error::from_middleware(&error).unwrap().is_body_too_large());
    assert_eq!(server.count(), 0);
    assert_eq!(rows(&database, "mq_payloads").await, 0);
}

#[tokio::test]
async fn a_request_without_a_body_is_retried_too() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let client = wrapped(quick_builder(&database).build().unwrap());
    in_time(client.get(server.url("/")).send()).await.unwrap();
    for seen in server.seen() {
        assert_eq!(seen.body, "");
        assert!(!seen.headers.contains_key("content-length"));
    }
}

#[tokio::test]
async fn without_any_response_the_stacks_own_error_comes_back() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(quick().max_attempts(3))
        .build()
        .unwrap();
    let inner = Counting::default();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .with(inner.clone())
        .build();
    let closed = closed_port().await;
    let url = format!("http://user:hunter3@{closed}/hunter4?token=hunter2");
    let error = in_time(client.post(url).body("x").send())
        .await
        .unwrap_err();
    assert!(error.is_connect(), "{error:?}");
    assert_eq!(error.url().unwrap().as_str(), format!("http://{closed}/"));
    assert!(
        !format!("{error} {error:?}").contains("hunter"),
        "{error:?}"
    );
    assert_eq!(inner.count(), 3);
    let outcome = outcome_of(&durable, only_id(&database).await).await;
    let recorded = outcome.into_result().unwrap_err();
    assert_eq!(recorded.failure_class(), Some(FailureClass::Connect));
    assert!(
        recorded
            .to_string()
            .contains(&format!("3 attempts to http://{closed}: "))
    );
}

#[tokio::test]
async fn an_inner_middlewares_own_error_comes_back() {
    struct Refuses;

    #[async_trait::async_trait]
    impl Middleware for Refuses {
        async fn handle(
            &self,
            _: reqwest::Request,
            _: &mut Extensions,
            _: Next<'_>,
        ) -> reqwest_middleware::Result<reqwest::Response> {
            Err(reqwest_middleware::Error::middleware(Refused))
        }
    }

    #[derive(Debug)]
    struct Refused;

    impl std::fmt::Display for Refused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("refused")
        }
    }

    impl std::error::Error for Refused {}

    let database = migrated().await;
    let durable = builder(&database).retry(quick().max_attempts(2));
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.build().unwrap())
        .with(Refuses)
        .build();
    let error = in_time(client.post("http://localhost/").body("x").send());
    let reqwest_middleware::Error::Middleware(error) = error.await.unwrap_err() else {
        panic!("not the middleware's error");
    };
    assert!(error.is::<Refused>(), "{error:?}");
}

#[tokio::test]
async fn the_last_response_is_returned_when_retries_are_used_up() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 502, 503]).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(3))
        .build()
        .unwrap();
    let response = in_time(wrapped(durable).post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(server.count(), 3);
    let discarded = "outcomes WHERE status = 'discarded'";
    assert_eq!(rows(&database, discarded).await, 1);
}

#[tokio::test]
async fn errors_of_inner_middleware_are_retried_like_any_other() {
    /// Fails the first attempt.
    struct Moody(AtomicUsize);

    #[async_trait::async_trait]
    impl Middleware for Moody {
        async fn handle(
            &self,
            request: reqwest::Request,
            extensions: &mut Extensions,
            next: Next<'_>,
        ) -> reqwest_middleware::Result<reqwest::Response> {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                let moody = std::io::Error::other("not in the mood");
                return Err(reqwest_middleware::Error::middleware(moody));
            }
            next.run(request, extensions).await
        }
    }

    let database = migrated().await;
    let server = Server::always(200).await;
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(quick_builder(&database).build().unwrap())
        .with(Moody(AtomicUsize::new(0)))
        .build();
    let response = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.count(), 1);
    let error: String = sqlx::query_scalar("SELECT error FROM requeuest.attempts")
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert!(error.contains("not in the mood"), "{error}");
}

#[tokio::test]
async fn a_shut_down_handle_refuses_through_the_middleware() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let client = wrapped(durable.clone());
    durable.shutdown(LONG).await.unwrap();
    let error = in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap_err();
    assert!(Error::from_middleware(&error).unwrap().is_closed());
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn requests_the_runner_claims_use_the_callers_stack_too() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200, 200]).await;
    let (transport, background_calls) = background();
    let durable = quick_builder(&database)
        .transport(transport)
        .build()
        .unwrap();
    let inner = Counting::default();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .with(inner.clone())
        .build();
    let later = Options::default().delay(Duration::from_millis(50));
    for (options, attempts) in [(later, 2), (Options::default().ordered("k"), 3)] {
        let request = client
            .post(server.url("/"))
            .body("x")
            .with_extension(options);
        assert_eq!(in_time(request.send()).await.unwrap().status(), 200);
        assert_eq!(inner.count(), attempts);
    }
    assert_eq!(background_calls.load(Ordering::SeqCst), 0);
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| seen.headers.contains_key("x-counted"))
    );
}
