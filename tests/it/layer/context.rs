//! What each attempt's request, and each answer, carry in their extensions.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future;
use http::{Extensions, Request, Response};
use http_body_util::Empty;
use requeuest::{AttemptNumber, Body, Channel, HttpClient, Options, RequestId};
use tower::{Layer, ServiceExt, service_fn};

use super::{http_post, id_of, quick_layer, with_options};
use crate::support::{
    builder, eventually_rows, in_time, migrated, other_process, outcome_of, post, quick,
};

/// An attempt's id, number and channel.
pub type Seen = (RequestId, u32, String);

/// What an attempt's extensions hold.
pub fn context_of(extensions: &Extensions) -> Seen {
    let number = extensions.get::<AttemptNumber>().unwrap();
    let channel = extensions.get::<Channel>().unwrap();
    assert_eq!(number.to_string(), number.get().to_string());
    assert_eq!(channel.to_string(), channel.as_str());
    let id = *extensions.get::<RequestId>().unwrap();
    (id, number.get(), channel.to_string())
}

/// A client that answers with these statuses in turn, and notes what each attempt carries.
fn noting(statuses: &'static [u16]) -> (impl HttpClient, Arc<Mutex<Vec<Seen>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let service = service_fn(move |mut request: Request<Body>| {
        let mut noted = noted.lock().unwrap();
        let mut response = Response::new(Empty::<Bytes>::new());
        *response.status_mut() = statuses[noted.len()].try_into().unwrap();
        noted.push(context_of(request.extensions()));
        // The next attempt doesn't see this.
        request.extensions_mut().clear();
        future::ok::<_, Infallible>(response)
    });
    (service, seen)
}

/// The contexts of a request's first attempts.
fn attempts(id: RequestId, channel: &str, count: u32) -> Vec<Seen> {
    (1..=count)
        .map(|number| (id, number, channel.to_owned()))
        .collect()
}

#[tokio::test]
async fn each_attempt_of_the_wrapped_service_knows_id_number_and_channel() {
    let database = migrated().await;
    let (inner, seen) = noting(&[503, 503, 200]);
    let client = quick_layer(&database).layer(inner);
    let response = in_time(client.oneshot(http_post("http://localhost/", "x")))
        .await
        .unwrap();
    let id = *response.extensions().get::<RequestId>().unwrap();
    assert_eq!(*seen.lock().unwrap(), attempts(id, "default", 3));
    assert!(response.headers().is_empty());

    // So does the stored response.
    let stored = other_process(&database).await.response(id).await.unwrap();
    let stored = reqwest::Response::from(stored);
    assert_eq!(stored.extensions().get(), Some(&id));
}

#[tokio::test]
async fn a_polled_request_continues_the_count_of_its_attempts() {
    let database = migrated().await;
    let (inner, seen) = noting(&[503, 503, 200]);
    let layer = builder(&database)
        .deliver(["default", "billing"])
        .retry(quick())
        .build_layer()
        .unwrap();
    let client = layer.layer(inner);
    // Nothing waits for the outcome, so each retry goes back to the queue and is claimed by a poll.
    let options = Options::default().fire().channel("billing");
    let request = with_options(http_post("http://localhost/", "x"), options);
    let response = in_time(client.oneshot(request)).await.unwrap();
    let id = *response.extensions().get::<RequestId>().unwrap();
    assert_eq!(id, id_of(&response));
    eventually_rows(&database, "outcomes", 1).await;
    assert_eq!(*seen.lock().unwrap(), attempts(id, "billing", 3));
}

#[tokio::test]
async fn a_poll_gives_the_callers_own_extensions_the_context_too() {
    let database = migrated().await;
    let (inner, seen) = noting(&[503, 200]);
    let client = quick_layer(&database).layer(inner);
    let later = Options::default().delay(Duration::from_millis(10));
    let request = with_options(http_post("http://localhost/", "x"), later);
    let response = in_time(client.oneshot(request)).await.unwrap();
    let id = *response.extensions().get::<RequestId>().unwrap();
    assert_eq!(*seen.lock().unwrap(), attempts(id, "default", 2));
}

#[tokio::test]
async fn attempts_through_a_registered_transport_know_them_too() {
    let database = migrated().await;
    let (transport, seen) = noting(&[503, 200, 503, 200]);
    let durable = builder(&database)
        .channel("hooks")
        .retry(quick())
        .transport(transport)
        .build()
        .unwrap();
    let request = post("http://localhost/", "x");
    let awaited = in_time(durable.await_response(&request)).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), attempts(awaited.id(), "hooks", 2));

    let fired = durable.fire(&request).await.unwrap();
    outcome_of(&durable, fired).await;
    assert_eq!(seen.lock().unwrap()[2..], attempts(fired, "hooks", 2));
}
