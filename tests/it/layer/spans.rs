//! The `tracing` spans in which the wrapped service and transports run.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use requeuest::{AttemptNumber, Body, HttpClient, Options};
use tower::{Layer, Service, ServiceExt, service_fn};
use tracing::subscriber::DefaultGuard;
use tracing::{Instrument, Metadata, info_span};

use super::{http_post, quick_layer, with_options};
use crate::support::{builder, eventually_rows, in_time, migrated, outcome_of, post, quick};

/// Knows the current span of this thread, on which the test and its engine run.
fn subscribe() -> DefaultGuard {
    tracing::subscriber::set_default(tracing_subscriber::registry())
}

/// The name of the span that is current.
fn current() -> Option<&'static str> {
    tracing::Span::current().metadata().map(Metadata::name)
}

type Seen = Arc<Mutex<Vec<(u32, Option<&'static str>, Option<&'static str>)>>>;

/// A client that answers with these statuses in turn. It notes each attempt's number, the span in
/// which it was called, and the span in which its future ran.
fn noting(statuses: &'static [u16]) -> (impl HttpClient, Seen) {
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    let service = service_fn(move |request: Request<Body>| {
        let called = current();
        let noted = Arc::clone(&noted);
        async move {
            tokio::task::yield_now().await;
            let number = request.extensions().get::<AttemptNumber>().unwrap().get();
            let mut noted = noted.lock().unwrap();
            let mut response = Response::new(Empty::<Bytes>::new());
            *response.status_mut() = statuses[noted.len()].try_into().unwrap();
            noted.push((number, called, current()));
            Ok::<_, Infallible>(response)
        }
    });
    (service, seen)
}

fn in_span(number: u32, name: &'static str) -> (u32, Option<&'static str>, Option<&'static str>) {
    (number, Some(name), Some(name))
}

#[tokio::test]
async fn attempts_run_in_the_span_that_was_current_at_the_call() {
    let _subscribed = subscribe();
    let database = migrated().await;
    let (inner, seen) = noting(&[503, 503, 200, 503, 200]);
    let mut client = quick_layer(&database).layer(inner);
    // The future is polled outside of the span, as if other tasks did it.
    let answer =
        info_span!("checkout").in_scope(|| client.call(http_post("http://localhost/", "x")));
    in_time(answer).await.unwrap();
    let expected = [1, 2, 3].map(|number| in_span(number, "checkout"));
    assert_eq!(*seen.lock().unwrap(), expected);

    // Attempts that the runner claims belong to the waiting caller too.
    let later = Options::default().delay(Duration::from_millis(10));
    let request = with_options(http_post("http://localhost/", "x"), later);
    let answer = info_span!("later").in_scope(|| client.call(request));
    in_time(answer).await.unwrap();
    let expected = [1, 2].map(|number| in_span(number, "later"));
    assert_eq!(seen.lock().unwrap()[3..], expected);
}

#[tokio::test]
async fn a_fired_requests_first_attempt_runs_in_the_span_of_its_call() {
    let _subscribed = subscribe();
    let database = migrated().await;
    let (inner, seen) = noting(&[503, 200]);
    let layer = quick_layer(&database);
    let request = with_options(
        http_post("http://localhost/", "x"),
        Options::default().fire(),
    );
    let fired = layer.layer(inner).oneshot(request);
    let response = in_time(fired.instrument(info_span!("order")))
        .await
        .unwrap();
    assert_eq!(response.status(), 202);
    eventually_rows(&database, "outcomes", 1).await;
    // Nothing waits for the retry, so a poll claimed it.
    assert_eq!(
        *seen.lock().unwrap(),
        [in_span(1, "order"), (2, None, None)]
    );
}

#[tokio::test]
async fn a_direct_calls_attempts_run_in_its_span() {
    let _subscribed = subscribe();
    let database = migrated().await;
    let (transport, seen) = noting(&[503, 200, 200]);
    let durable = builder(&database)
        .retry(quick())
        .transport(transport)
        .build()
        .unwrap();
    let request = post("http://localhost/", "x");
    let awaited = durable.await_response(&request);
    in_time(awaited.instrument(info_span!("direct")))
        .await
        .unwrap();
    let expected = [1, 2].map(|number| in_span(number, "direct"));
    assert_eq!(*seen.lock().unwrap(), expected);

    let fired = durable.fire(&request).instrument(info_span!("fired"));
    outcome_of(&durable, fired.await.unwrap()).await;
    assert_eq!(seen.lock().unwrap()[2..], [in_span(1, "fired")]);
}
