//! Answers that tell whether an attempt was processed: what is repeated, and what is ambiguous.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Method, Response};
use requeuest::{DeadLetterFilter, Guarantee, Options, Request, ReqwestTransport, Status};
use tokio::net::TcpListener;

use super::{at_most_once, key_of, quick_builder};
use crate::support::{Server, in_time, migrated, reply};

/// Doesn't answer the first request in time, says twice that it is in progress, and then that it is
/// done.
async fn busy_server() -> Server {
    Server::start(|number, _| async move {
        match number {
            0 => std::future::pending().await,
            1 | 2 => reply(409, "in progress"),
            3 => reply(425, "too early"),
            _ => reply(200, "done"),
        }
    })
    .await
}

fn impatient(method: Method, url: String) -> Request {
    let request = http::Request::builder().method(method).uri(url).body("x");
    let options = Options::default().attempt_timeout(Duration::from_secs(1));
    Request::try_from(request.unwrap()).unwrap().with(options)
}

#[tokio::test]
async fn a_repetition_that_is_still_in_progress_is_retried() {
    let database = migrated().await;
    let server = busy_server().await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let request = impatient(Method::POST, server.url("/"));
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.text().unwrap(), "done");
    assert!(server.count() >= 5);
    assert_eq!(key_of(&server, 0), key_of(&server, 4));
}

#[tokio::test]
async fn a_409_without_an_open_attempt_is_final() {
    let database = migrated().await;
    let durable = quick_builder(database.pool()).build().unwrap();
    // A 503 says that the first attempt was not processed.
    let server = Server::in_turn(&[503, 409]).await;
    let request = impatient(Method::POST, server.url("/"));
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), server.count()), (409, 2));
    let request = impatient(Method::POST, server.url("/"));
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), server.count()), (409, 3));
    // A receiver can't recognise a repetition that has no key.
    let server = busy_server().await;
    let request = impatient(Method::PUT, server.url("/"));
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!((response.status().as_u16(), server.count()), (409, 2));
}

#[tokio::test]
async fn at_most_once_a_gateways_error_is_ambiguous() {
    let database = migrated().await;
    let durable = quick_builder(database.pool()).build().unwrap();
    for status in [500, 502, 504] {
        let server = Server::start(move |_, _| async move { reply(status, "by a gateway") }).await;
        let error = in_time(durable.await_response(at_most_once(server.url("/"))));
        let error = error.await.unwrap_err();
        assert!(error.is_ambiguous(), "{error:?}");
        assert!(error.to_string().contains(&status.to_string()), "{error}");
        assert_eq!(server.count(), 1);
        let id = error.request_id().unwrap();
        let outcome = durable.outcome(id).await.unwrap();
        assert_eq!(outcome.status(), Status::Ambiguous);
        let response = outcome.response().unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.text().unwrap(), "by a gateway");
        let letters = DeadLetterFilter::default().status(Status::Ambiguous);
        let letters = durable.dead_letters(&letters).await.unwrap();
        let letter = letters.iter().find(|letter| letter.id == id).unwrap();
        assert_eq!(letter.http_status, Some(status));
    }
}

#[tokio::test]
async fn at_most_once_retries_what_was_not_processed() {
    let database = migrated().await;
    let durable = quick_builder(database.pool()).build().unwrap();
    let server = Server::in_turn(&[408, 421, 425, 429, 503, 200]).await;
    let response = in_time(durable.await_response(at_most_once(server.url("/")))).await;
    assert_eq!(response.unwrap().status(), 200);
    assert_eq!(server.count(), 6);
}

/// A server that refuses the first streams, and answers the others with 200.
async fn refusing(streams: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counted = Arc::clone(&counted);
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    if counted.fetch_add(1, Ordering::SeqCst) < streams {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    } else {
                        let _ = respond.send_response(Response::new(()), true);
                    }
                }
            });
        }
    });
    (url, count)
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_at_most_once() {
    let database = migrated().await;
    // Without its own retries, which would not be recorded.
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .retry(reqwest::retry::never())
        .build()
        .unwrap();
    let durable = quick_builder(database.pool()).transport(ReqwestTransport::new(client));
    let durable = durable.build().unwrap();
    let (url, count) = refusing(2).await;
    let request = http::Request::post(url)
        .extension(Options::default().guarantee(Guarantee::AtMostOnce))
        .body("x")
        .unwrap();
    let response = in_time(durable.await_response(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(count.load(Ordering::SeqCst), 3);
    let classes: Vec<String> = sqlx::query_scalar("SELECT error_class FROM requeuest.attempts")
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(classes, ["refused"; 2]);
}
