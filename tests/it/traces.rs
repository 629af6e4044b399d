//! Traces: the context of a call reaches each attempt, and spans follow OpenTelemetry's
//! conventions.

mod carried;
mod continued;
mod exporter;
mod spans;
mod wrapped;

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::Full;
use requeuest::{Body, Durable, Options, TraceContext, TraceContextHook};
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, builder, hyper_client, in_time, migrated, other_process, outcome_of, post, quick, rows,
    with_middleware,
};

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

tokio::task_local! {
    /// The context of the task that calls.
    static CURRENT: TraceContext;
}

/// Takes the context of the calling task.
struct OfTask;

impl TraceContextHook for OfTask {
    fn extract(&self) -> Option<TraceContext> {
        CURRENT.try_with(Clone::clone).ok()
    }
}

/// As [`OfTask`], in place of a context that the request has.
struct Replacing;

impl TraceContextHook for Replacing {
    fn extract(&self) -> Option<TraceContext> {
        OfTask.extract()
    }

    fn inject(&self, context: &TraceContext, headers: &mut HeaderMap) {
        context.replace_in(headers);
    }
}

fn context(number: u8) -> TraceContext {
    let parent = format!("00-{number:032x}-00f067aa0ba902b7-01");
    let context = TraceContext::new(&parent).unwrap();
    context.with_tracestate("vendor=a,other=b").unwrap()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?;
    assert!(values.next().is_none(), "{name} twice");
    Some(value.to_str().unwrap())
}

/// The trace contexts that the receiver saw.
fn seen(server: &Server) -> Vec<Option<TraceContext>> {
    let seen = server.seen();
    seen.iter()
        .map(|seen| TraceContext::from_headers(&seen.headers))
        .collect()
}

async fn fire(durable: &Durable, server: &Server) -> requeuest::RequestId {
    durable.fire(post(server.url("/"), "x")).await.unwrap()
}

#[tokio::test]
async fn the_context_of_a_call_reaches_each_attempt_whichever_way_it_is_made() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 200]).await;
    let built = || builder(&database).retry(quick()).trace_context(OfTask);
    let durable = built().build().unwrap();
    let of = |number: u8| vec![Some(context(number)); usize::from(number == 1) + 1];
    let mut expected = Vec::new();

    let id = CURRENT.scope(context(1), fire(&durable, &server)).await;
    outcome_of(&durable, id).await;
    expected.extend(of(1));
    assert_eq!(seen(&server), expected);

    // Awaited.
    let awaited = CURRENT.scope(
        context(2),
        durable.await_response(post(server.url("/"), "x")),
    );
    in_time(awaited).await.unwrap();
    expected.extend(of(2));
    // In a transaction, by the runner.
    let mut tx = database.pool().begin().await.unwrap();
    let fired = durable.fire_in(&mut *tx, post(server.url("/"), "x"));
    let id = CURRENT.scope(context(3), fired).await.unwrap();
    tx.commit().await.unwrap();
    outcome_of(&durable, id).await;
    expected.extend(of(3));
    // Several at once.
    let fired = durable.fire_many([post(server.url("/"), "x")]);
    let ids = CURRENT.scope(context(4), fired).await.unwrap();
    outcome_of(&durable, ids[0]).await;
    expected.extend(of(4));
    // Through a client with middleware.
    let client = with_middleware(reqwest::Client::new(), &durable);
    let sent = client.post(server.url("/")).body("x").send();
    in_time(CURRENT.scope(context(5), sent)).await.unwrap();
    expected.extend(of(5));
    // Through a service that a layer wraps.
    let layer = built().channel("layer").build_layer().unwrap();
    let request = http::Request::post(server.url("/")).body(Full::<Bytes>::from("x"));
    let service = layer.layer(hyper_client::<Body>());
    let sent = service.oneshot(request.unwrap());
    in_time(CURRENT.scope(context(6), sent)).await.unwrap();
    expected.extend(of(6));
    // Outside any trace.
    let id = fire(&durable, &server).await;
    outcome_of(&durable, id).await;
    expected.push(None);
    assert_eq!(seen(&server), expected);
}

#[tokio::test]
async fn a_request_keeps_the_traceparent_that_it_has_unless_the_hook_replaces_it() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let send = async |durable: Durable| {
        let request = http::Request::post(server.url("/"))
            .header("traceparent", PARENT)
            .header("tracestate", "mine=1")
            .body("x");
        let fired = durable.fire(request.unwrap());
        let id = CURRENT.scope(context(1), fired).await.unwrap();
        outcome_of(&durable, id).await;
        let headers = server.seen().pop().unwrap().headers;
        let header = |name| header(&headers, name).map(str::to_owned);
        (
            header("traceparent").unwrap(),
            header("tracestate").unwrap(),
        )
    };
    let own = (PARENT.to_owned(), "mine=1".to_owned());
    assert_eq!(send(builder(&database).build().unwrap()).await, own);
    let keeping = builder(&database).trace_context(OfTask).build().unwrap();
    assert_eq!(send(keeping).await, own);
    let replacing = builder(&database).trace_context(Replacing).build().unwrap();
    let replaced = (
        context(1).traceparent().to_owned(),
        "vendor=a,other=b".to_owned(),
    );
    assert_eq!(send(replacing).await, replaced);
}

#[tokio::test]
async fn a_context_is_stored_and_sent_only_by_a_process_with_the_hook() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let mut enqueuing = builder(&database).runner(false).trace_context(OfTask);
    // In no readable part of what is stored.
    if std::env::var("REQUEUEST_ENCRYPTION").is_err() {
        let key = requeuest::encryption::Key::new("a", (0..32).collect::<Vec<u8>>()).unwrap();
        enqueuing = enqueuing.encryption(requeuest::encryption::Keyring::new(key));
    }
    let other = enqueuing.build().unwrap();
    let options = || Options::default().channel("encrypted");
    let request = post(server.url("/"), "x").with(options());
    CURRENT
        .scope(context(1), other.fire(request))
        .await
        .unwrap();
    let readable = "mq_payloads WHERE head ~ 'traceparent|vendor'";
    assert_eq!(rows(&database, readable).await, 0);

    let other = other_process(&database).await;
    let without = fire(&other, &server).await;
    let with = builder(&database).runner(false).trace_context(OfTask);
    let with = with.build().unwrap();
    let stored = CURRENT.scope(context(2), fire(&with, &server)).await;
    let delivering = builder(&database).build().unwrap();
    for id in [without, stored] {
        outcome_of(&delivering, id).await;
    }
    assert_eq!(seen(&server), [None, None]);
}
