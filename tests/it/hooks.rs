//! Hooks of attempts: what they change, refuse and see, whichever way an attempt is sent.

mod oauth2;
mod refusals;
mod strip;
mod webhooks;

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use http_body_util::Full;
use requeuest::hooks::{OutgoingAttempt, Refusal, header_fn, hook_fn, hook_fn_with, only_to};
use requeuest::testkit::TestDatabase;
use requeuest::{
    AttemptHook, Body, FailureClass, Guarantee, Options, RequestId, ReqwestTransport, Status,
    Verdict,
};
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, builder, hyper_client, in_time, migrated, other_process, outcome_of, post, quick, rows,
    with_middleware,
};

/// Tells attempts apart.
async fn number(attempt: &mut OutgoingAttempt) -> Result<(), Refusal> {
    attempt.set_header("x-attempt", attempt.number())
}

/// The values of a header, in the order in which the requests arrived.
fn values(server: &Server, name: &str) -> Vec<String> {
    let of = |headers: &HeaderMap| {
        let values = headers.get_all(name).iter();
        let values = values.map(|value| value.to_str().unwrap().to_owned());
        values.collect::<Vec<_>>().join(",")
    };
    server.seen().iter().map(|seen| of(&seen.headers)).collect()
}

/// Why the attempts of a request failed: their classes and texts.
async fn failures(database: &TestDatabase, id: RequestId) -> Vec<(String, String)> {
    sqlx::query_as(
        "SELECT error_class, error FROM requeuest.attempts WHERE id = $1 ORDER BY number",
    )
    .bind(requeuest::Uuid::from(id))
    .fetch_all(database.pool())
    .await
    .unwrap()
}

#[tokio::test]
async fn each_attempt_is_changed_and_nothing_of_it_is_stored() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 404]).await;
    let durable = builder(&database)
        .retry(quick())
        .on_attempt(hook_fn(number))
        .on_attempt(header_fn("X-Key", || async {
            Ok::<_, Infallible>("hunter2")
        }))
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Discarded);
    assert_eq!(values(&server, "x-attempt"), ["1", "2", "3"]);
    assert_eq!(values(&server, "x-key"), ["hunter2"; 3]);
    // A dead letter keeps the request.
    assert_eq!(rows(&database, "mq_payloads").await, 1);
    let head = "mq_payloads p WHERE p::text ~ 'hunter2|x-attempt'";
    assert_eq!(rows(&database, head).await, 0);
}

#[tokio::test]
async fn hooks_run_whichever_way_an_attempt_is_sent() {
    let database = migrated().await;
    let server = Server::in_turn(&[200, 200, 503, 200, 503, 200, 503, 200]).await;
    let built = || {
        builder(&database)
            .retry(quick())
            .on_attempt(hook_fn(number))
    };
    let durable = built().build().unwrap();
    // At once.
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&durable, id).await;
    // By the runner.
    let other = other_process(&database).await;
    let id = other.fire(post(server.url("/"), "x")).await.unwrap();
    outcome_of(&other, id).await;
    // With a caller that waits.
    in_time(durable.await_response(post(server.url("/"), "x")))
        .await
        .unwrap();
    // By a caller through its own client.
    let client = with_middleware(reqwest::Client::new(), &durable);
    in_time(client.post(server.url("/")).body("x").send())
        .await
        .unwrap();
    // Through a service that a layer wraps.
    let layer = built().channel("layer").build_layer().unwrap();
    let request = http::Request::post(server.url("/")).body(Full::<Bytes>::from("x"));
    in_time(
        layer
            .layer(hyper_client::<Body>())
            .oneshot(request.unwrap()),
    )
    .await
    .unwrap();
    assert_eq!(
        values(&server, "x-attempt"),
        ["1", "1", "1", "2", "1", "2", "1", "2"]
    );
}

#[tokio::test]
async fn hooks_run_in_order_and_see_what_is_sent() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let mut built = builder(&database).channel("billing");
    for name in ["a", "b", "c"] {
        built = built.on_attempt(hook_fn_with(
            name,
            async |name: &&str, attempt: &mut OutgoingAttempt| {
                let before = attempt.headers().get("x-order").cloned();
                let before = before.map_or(String::new(), |it| it.to_str().unwrap().to_owned());
                attempt.set_header("x-order", format!("{before}{name}"))
            },
        ));
    }
    let origin = format!("http://{}", server.addr);
    let durable = built
        .on_attempt(hook_fn_with(
            origin,
            async |origin: &String, attempt: &mut OutgoingAttempt| {
                assert_eq!(attempt.destination(), *origin);
                assert_eq!(
                    (attempt.method(), attempt.body()),
                    (&http::Method::POST, &b"x"[..])
                );
                assert_eq!(attempt.uri().path_and_query().unwrap(), "/a?b");
                assert_eq!(attempt.channel(), "billing");
                assert_eq!(attempt.limit_key(), Some("tenant-7"));
                assert_eq!(
                    attempt.metadata().unwrap(),
                    &serde_json::json!({"tenant": 7})
                );
                attempt.set_header("x-id", attempt.id().to_string())
            },
        ))
        .build()
        .unwrap();
    let options = Options::default()
        .limit_key("tenant-7")
        .metadata(serde_json::json!({"tenant": 7}));
    let id = durable
        .fire(post(server.url("/a?b"), "x").with(options))
        .await
        .unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(outcome.status(), Status::Completed, "{outcome:?}");
    assert_eq!(values(&server, "x-order"), ["abc"]);
    assert_eq!(values(&server, "x-id"), [id.to_string()]);
}

#[tokio::test]
async fn a_hook_chooses_the_client_also_for_a_waiting_caller() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = reqwest::Client::builder().user_agent("chosen").build();
    let choose = hook_fn_with(
        ReqwestTransport::new(client.unwrap()),
        async |client: &ReqwestTransport, attempt: &mut OutgoingAttempt| {
            if attempt.uri().path() == "/chosen" {
                attempt.send_with(client.clone());
            }
            Ok::<_, Refusal>(())
        },
    );
    let durable = builder(&database).on_attempt(choose).build().unwrap();
    let client = reqwest::Client::builder().user_agent("caller").build();
    let client = with_middleware(client.unwrap(), &durable);
    for path in ["/chosen", "/usual"] {
        in_time(durable.await_response(post(server.url(path), "x")))
            .await
            .unwrap();
        in_time(client.post(server.url(path)).body("x").send())
            .await
            .unwrap();
    }
    assert_eq!(
        values(&server, "user-agent"),
        ["chosen", "chosen", "", "caller"]
    );
}

/// The number of an attempt, and its result.
type Noted = (u32, Result<u16, FailureClass>);

/// Repeats what was answered with 401.
#[derive(Clone, Default)]
struct Seeing {
    results: Arc<Mutex<Vec<Noted>>>,
}

impl AttemptHook for Seeing {
    fn before<'a>(
        &'a self,
        attempt: &'a mut OutgoingAttempt,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>> {
        let number = attempt.number();
        attempt.notes_mut().insert(number);
        Box::pin(async { Ok(()) })
    }

    fn after(
        &self,
        attempt: &OutgoingAttempt,
        result: Result<(StatusCode, &HeaderMap), FailureClass>,
    ) -> Option<Verdict> {
        let result = result.map(|(status, _)| status.as_u16());
        let noted = *attempt.notes().get::<u32>().unwrap();
        self.results.lock().unwrap().push((noted, result));
        (result == Ok(401)).then_some(Verdict::Retry)
    }
}

#[tokio::test]
async fn a_hook_sees_results_and_has_an_attempt_repeated() {
    let database = migrated().await;
    let server = Server::in_turn(&[401, 401, 200]).await;
    let seeing = Seeing::default();
    let durable = builder(&database)
        .retry(quick())
        .on_attempt(seeing.clone())
        .build()
        .unwrap();
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 3)
    );
    let seen = std::mem::take(&mut *seeing.results.lock().unwrap());
    assert_eq!(seen, [(1, Ok(401)), (2, Ok(401)), (3, Ok(200))]);

    // What a request accepts comes first.
    let server = Server::always(401).await;
    let accept = Options::default().accept([requeuest::AcceptedResponse::Any]);
    let response = in_time(durable.await_response(post(server.url("/"), "x").with(accept)))
        .await
        .unwrap();
    assert_eq!(response.status(), 401);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn settings_that_can_not_work_are_refused_when_the_handle_is_built() {
    use requeuest::hooks::OAuth2;

    let database = migrated().await;
    let built = || builder(&database);
    let empty = || async { Ok::<_, Infallible>("") };
    for (builder, field) in [
        (built().hook_timeout(Duration::ZERO), "hook_timeout"),
        (built().hook_timeout(Duration::MAX), "hook_timeout"),
        (built().on_attempt(header_fn("a b", empty)), "on_attempt"),
        (built().on_attempt(header_fn("a\n", empty)), "on_attempt"),
        (
            built().on_attempt(only_to("https://a.example/path", hook_fn(number))),
            "on_attempt",
        ),
        (
            built().on_attempt(only_to("a.example", header_fn("", empty))),
            "on_attempt",
        ),
        (
            built().on_attempt(OAuth2::client_credentials("/token", "id", "hunter2")),
            "on_attempt",
        ),
        (built().strip_headers(["a b"]), "strip_headers"),
        (built().strip_headers(["Idempotency-Key"]), "strip_headers"),
    ] {
        let error = builder.build().unwrap_err();
        assert_eq!(error.field(), Some(field), "{error}");
        assert!(
            error.is_config() && !error.to_string().contains("hunter"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn an_at_most_once_request_that_a_hook_stops_has_not_been_sent() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let twice = async |attempt: &mut OutgoingAttempt| match attempt.number() {
        1 => panic!("the first"),
        2 => Err(Refusal::retry("the second")),
        _ => Ok(()),
    };
    let durable = builder(&database)
        .retry(quick())
        .on_attempt(hook_fn(twice))
        .build()
        .unwrap();
    let once = Options::default().guarantee(Guarantee::AtMostOnce);
    let id = durable
        .fire(post(server.url("/"), "x").with(once))
        .await
        .unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 3)
    );
    assert_eq!(server.count(), 1);
}
