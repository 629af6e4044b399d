//! Answers that are no complete response, and odd ones that are.

use std::convert::Infallible;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use requeuest::classify::{MAX_BROKEN_ANSWERS, Verdict, classify_fn};
use requeuest::{FailureClass, ReqwestTransport, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::raw;
use crate::support::{builder, hyper_client, in_time, migrated, outcome_of, post, quick, rows};

/// A server that answers each request with these bytes, and closes the connection. Counts the
/// requests.
pub async fn answering(bytes: impl Into<Vec<u8>>) -> (SocketAddr, Arc<AtomicUsize>) {
    let (bytes, requests) = (Arc::new(bytes.into()), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&requests);
    let addr = raw(move |mut stream| {
        let (bytes, counted) = (Arc::clone(&bytes), Arc::clone(&counted));
        async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\nx") {
                if !matches!(stream.read_buf(&mut request).await, Ok(1..)) {
                    return;
                }
            }
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_end(&mut request).await;
        }
    })
    .await;
    (addr, requests)
}

pub fn many_headers(count: usize) -> String {
    let mut head = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n".to_owned();
    for number in 1..count {
        write!(head, "x-{number}: {number}\r\n").unwrap();
    }
    head + "\r\ngood"
}

#[tokio::test]
async fn a_receiver_that_only_answers_garbage_gets_ten_attempts() {
    let database = migrated().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let impatient = builder(&database)
        .channel("strict")
        .transport(hyper_client())
        .retry(quick())
        .build()
        .unwrap();
    let (protocol, incomplete) = (FailureClass::Protocol, FailureClass::Incomplete);
    for (handle, answer, class) in [
        (
            &durable,
            "+PONG this is no HTTP\r\n\r\n".to_owned(),
            protocol,
        ),
        (&durable, many_headers(2000), protocol),
        (&impatient, many_headers(300), protocol),
        (
            &durable,
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf".to_owned(),
            incomplete,
        ),
    ] {
        let (addr, requests) = answering(answer).await;
        let url = format!("http://{addr}/");
        let id = handle.fire(post(&url, "x")).await.unwrap();
        let outcome = outcome_of(handle, id).await;
        assert_eq!(outcome.status(), Status::Discarded, "{class}");
        assert_eq!(outcome.attempts(), MAX_BROKEN_ANSWERS);
        let error = in_time(handle.response(id)).await.unwrap_err();
        assert_eq!(error.failure_class(), Some(class), "{error:?}");
        assert_eq!(requests.load(Ordering::SeqCst), 10);
        // The receiver may have acted: the content is kept.
        let kept = format!("mq_payloads WHERE id = '{id}'");
        assert_eq!(rows(&database, &kept).await, 1);
    }
}

/// Answers each request in HTTP/2 with a head of so many KiB.
async fn heads_in_http2(size: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let addr = raw(move |stream| {
        let counted = Arc::clone(&counted);
        async move {
            let service = service_fn(move |_: http::Request<Incoming>| {
                counted.fetch_add(1, Ordering::SeqCst);
                let mut response = http::Response::new(Empty::<Bytes>::new());
                for number in 0..size {
                    let name = HeaderName::try_from(format!("x-{number}")).unwrap();
                    let value = HeaderValue::try_from("v".repeat(1000)).unwrap();
                    response.headers_mut().insert(name, value);
                }
                async { Ok::<_, Infallible>(response) }
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    })
    .await;
    (addr, requests)
}

#[tokio::test]
async fn a_head_in_http2_over_the_limit_gets_ten_attempts() {
    let database = migrated().await;
    // Its limit is 16 KiB.
    let client = reqwest::Client::builder().http2_prior_knowledge();
    let durable = builder(&database)
        .transport(ReqwestTransport::new(client.build().unwrap()))
        .retry(quick())
        .build()
        .unwrap();
    for kilobytes in [20, 2000] {
        let (addr, requests) = heads_in_http2(kilobytes).await;
        let id = durable.fire(post(format!("http://{addr}/"), "x")).await;
        let id = id.unwrap();
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.status(), Status::Discarded, "{kilobytes}");
        assert_eq!(outcome.attempts(), MAX_BROKEN_ANSWERS);
        let error = in_time(durable.response(id)).await.unwrap_err();
        assert_eq!(
            error.failure_class(),
            Some(FailureClass::Protocol),
            "{error:?}"
        );
        assert_eq!(requests.load(Ordering::SeqCst), 10);
    }
    let (addr, _) = heads_in_http2(10).await;
    let response = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
    assert!(response.unwrap().headers().len() >= 10);
}

#[tokio::test]
async fn a_classifier_decides_how_often_garbage_is_retried() {
    let database = migrated().await;
    let durable = builder(&database)
        .retry(quick().max_attempts(12))
        .classify(classify_fn(|_| Verdict::Retry))
        .build()
        .unwrap();
    let (addr, requests) = answering("garbage\r\n\r\n").await;
    let id = durable.fire(post(format!("http://{addr}/"), "x")).await;
    let outcome = outcome_of(&durable, id.unwrap()).await;
    assert_eq!(outcome.status(), Status::Discarded);
    assert_eq!(requests.load(Ordering::SeqCst), 12);
}

#[tokio::test]
async fn a_response_with_many_header_fields_is_a_response() {
    let database = migrated().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let (addr, requests) = answering(many_headers(900)).await;
    let response = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
    let response = response.unwrap();
    assert_eq!(response.headers().len(), 900);
    assert_eq!(response.text().unwrap(), "good");
    assert_eq!(requests.load(Ordering::SeqCst), 1);
    // The same by its id, from the database.
    let again = in_time(durable.response(response.id())).await.unwrap();
    assert_eq!(again.headers(), response.headers());
}

#[tokio::test]
async fn what_follows_a_response_belongs_to_no_other() {
    let database = migrated().await;
    let durable = builder(&database).retry(quick()).build().unwrap();
    let long = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngoodHTTP/1.1 500 Evil\r\n\r\n";
    let (addr, requests) = answering(long).await;
    for number in 1..=3 {
        let response = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
        let response = response.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.text().unwrap(), "good");
        assert_eq!(requests.load(Ordering::SeqCst), number);
    }
}
