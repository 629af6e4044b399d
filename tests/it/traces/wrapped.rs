//! Who makes the span of an exchange: the crate, or the client that it sends with.

use bytes::Bytes;
use http_body_util::Full;
use requeuest::hooks::{OutgoingAttempt, Refusal, hook_fn_with};
use requeuest::otel::opentelemetry::Context;
use requeuest::otel::opentelemetry::trace::{FutureExt as _, SpanId, Status, TraceContextExt as _};
use requeuest::{Body, HttpClient, ReqwestTransport};
use reqwest_middleware::{ClientBuilder, Middleware, Next};
use tower::{Layer, ServiceExt, service_fn};

use super::exporter::{Traced, attribute, caller, parents, send};
use crate::support::{Server, hyper_client, in_time, migrated};

/// Notes the span that is current while a wrapped client sends.
#[derive(Clone, Default)]
struct Current(std::sync::Arc<std::sync::Mutex<Vec<SpanId>>>);

impl Current {
    fn note(&self) {
        let span = Context::map_current(|current| current.span().span_context().span_id());
        self.0.lock().unwrap().push(span);
    }

    fn take(&self) -> Vec<SpanId> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[async_trait::async_trait]
impl Middleware for Current {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut http::Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.note();
        let answered = next.run(request, extensions).await;
        self.note();
        answered
    }
}

/// A client that notes the span before and after each exchange.
fn noting(current: &Current) -> impl HttpClient + use<> {
    let current = current.clone();
    service_fn(move |request: http::Request<Body>| {
        let (current, client) = (current.clone(), hyper_client::<Body>());
        async move {
            current.note();
            let answered = client.oneshot(request).await;
            current.note();
            answered
        }
    })
}

#[tokio::test]
async fn a_wrapped_client_sends_within_the_attempt_and_without_a_span_of_ours() {
    let (database, traced, current) = (migrated().await, Traced::new(), Current::default());
    let server = Server::always(200).await;
    let mut sent = 0;
    let mut assert_spans = || {
        let (_, process, client) = traced.take();
        assert!(client.is_none());
        let id = process.span_context.span_id();
        assert_eq!(current.take(), [id; 2]);
        assert_eq!(parents(&server)[sent..], [id]);
        sent += 1;
    };
    // A service that a layer wraps.
    let layer = traced
        .builder(&database)
        .channel("layer")
        .build_layer()
        .unwrap();
    let request = http::Request::post(server.url("/")).body(Full::<Bytes>::from("x"));
    let called = layer.layer(noting(&current)).oneshot(request.unwrap());
    in_time(called.with_context(caller())).await.unwrap();
    assert_spans();
    // Another transport.
    let durable = traced
        .builder(&database)
        .channel("b")
        .transport(noting(&current));
    send(&durable.build().unwrap(), &server.url("/")).await;
    assert_spans();
    // The client below the middleware.
    let durable = traced.builder(&database).channel("c").build().unwrap();
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable)
        .with(current.clone());
    let called = client.build().post(server.url("/")).body("x").send();
    in_time(called.with_context(caller())).await.unwrap();
    assert_spans();
    // A client that a hook has chosen.
    let hook = hook_fn_with(
        current.clone(),
        async |current: &Current, attempt: &mut OutgoingAttempt| {
            attempt.send_with(noting(current));
            Ok::<_, Refusal>(())
        },
    );
    let durable = traced.builder(&database).channel("d").on_attempt(hook);
    send(&durable.build().unwrap(), &server.url("/")).await;
    assert_spans();
}

#[tokio::test]
async fn a_plain_reqwest_client_sends_in_a_span_of_ours() {
    let (database, traced) = (migrated().await, Traced::new());
    let server = Server::always(404).await;
    let transport = ReqwestTransport::new(reqwest::Client::new());
    let durable = traced
        .builder(&database)
        .transport(transport)
        .build()
        .unwrap();
    let request = http::Request::builder()
        .method("PURGE")
        .uri(server.url("/"));
    in_time(durable.await_response(request.body("").unwrap()))
        .await
        .unwrap();
    let (send, process, client) = traced.take();
    // The caller has no span.
    assert_eq!(send.parent_span_id, SpanId::INVALID);
    // The caller waits for any final response.
    assert_eq!(process.status, Status::Unset);
    let client = client.unwrap();
    assert_eq!(
        (&*client.name, &client.status),
        ("HTTP", &Status::error(""))
    );
    let method = |name| attribute(&client, name).unwrap();
    assert_eq!(method("http.request.method"), "_OTHER");
    assert_eq!(method("http.request.method_original"), "PURGE");
    assert_eq!(method("error.type"), "404");
}
