//! Receivers whose responses are slow, invalid or incomplete.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use requeuest::retry::RetryPolicy;
use requeuest::{FailureClass, ReqwestTransport, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use super::{check_ledger, load, short_lease_builder};
use crate::support::{Server, in_time, migrated, post, rows};

const GOOD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood";

#[derive(Clone, Copy, Debug)]
enum Fault {
    NoHeaders,
    SlowBody,
    HalfABody,
    Garbage,
    EndlessBody,
    /// A head that comes byte by byte.
    SlowHead,
    /// Informational responses without an end.
    EndlessHints,
    ManyHeaders,
    LargeHead,
    EarlyHints,
    /// A good response, after which the connection is closed without `connection: close`.
    ClosedWhenIdle,
}

async fn read_request(stream: &mut TcpStream) -> bool {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if !matches!(stream.read_buf(&mut request).await, Ok(1..)) {
            return false;
        }
    }
    true
}

async fn misbehave(fault: Fault, stream: &mut TcpStream) -> std::io::Result<()> {
    match fault {
        Fault::NoHeaders => std::future::pending().await,
        Fault::SlowBody => {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                .await?;
            loop {
                stream.write_all(b"x").await?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Fault::HalfABody => {
            let half = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
            stream.write_all(half).await
        }
        // With a NUL, which Postgres refuses in text.
        Fault::Garbage => stream.write_all(b"\0\xff\xfe garbage\r\n\r\n").await,
        Fault::EndlessBody => {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                .await?;
            let chunk = format!("400\r\n{}\r\n", "x".repeat(0x400));
            loop {
                stream.write_all(chunk.as_bytes()).await?;
            }
        }
        Fault::SlowHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nx-slow: ").await?;
            loop {
                stream.write_all(b"x").await?;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Fault::EndlessHints => loop {
            stream
                .write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                .await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        },
        Fault::ManyHeaders => {
            let headers = "a: b\r\n".repeat(1001);
            let head = format!("HTTP/1.1 200 OK\r\n{headers}content-length: 0\r\n\r\n");
            stream.write_all(head.as_bytes()).await
        }
        Fault::LargeHead => {
            let value = "x".repeat(500 * 1024);
            let head = format!("HTTP/1.1 200 OK\r\nx-large: {value}\r\n\r\n");
            stream.write_all(head.as_bytes()).await
        }
        Fault::EarlyHints => {
            let hints = b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n";
            stream.write_all(hints).await?;
            stream.write_all(GOOD).await
        }
        Fault::ClosedWhenIdle => stream.write_all(GOOD).await,
    }
}

/// Misbehaves on the first connection, then closes it. Answers well on all others. Counts the
/// requests.
async fn faulty(fault: Fault) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    tokio::spawn(async move {
        let mut first = true;
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let counted = Arc::clone(&counted);
            let misbehaves = std::mem::replace(&mut first, false);
            tokio::spawn(async move {
                while read_request(&mut stream).await {
                    counted.fetch_add(1, Ordering::SeqCst);
                    if misbehaves {
                        // The client may close the connection first.
                        let _ = misbehave(fault, &mut stream).await;
                        return;
                    }
                    if stream.write_all(GOOD).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (addr, requests)
}

/// The caller's result, the number of requests that arrived, and the failed attempt's class.
async fn with_fault(fault: Fault) -> (Result<Response, requeuest::Error>, usize, Option<String>) {
    let database = migrated().await;
    let (addr, requests) = faulty(fault).await;
    let durable = short_lease_builder(database.pool())
        .attempt_timeout(Duration::from_secs(1))
        .max_response_body(64 * 1024)
        .build()
        .unwrap();
    let result = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
    if let Ok(response) = &result {
        let again = in_time(durable.response(response.id())).await.unwrap();
        assert_eq!(again.text().unwrap(), "good");
    }
    let class = "SELECT error_class FROM requeuest.attempts ORDER BY number LIMIT 1";
    let class = sqlx::query_scalar(class)
        .fetch_optional(database.pool())
        .await
        .unwrap();
    (result, requests.load(Ordering::SeqCst), class)
}

#[tokio::test]
async fn an_incomplete_or_invalid_response_is_retried() {
    for (fault, class) in [
        (Fault::NoHeaders, "timeout"),
        (Fault::SlowBody, "timeout"),
        (Fault::HalfABody, "incomplete"),
        (Fault::Garbage, "protocol"),
        (Fault::SlowHead, "timeout"),
        (Fault::EndlessHints, "timeout"),
        (Fault::ManyHeaders, "protocol"),
        (Fault::LargeHead, "protocol"),
    ] {
        let (response, requests, failed) = with_fault(fault).await;
        assert_eq!(response.unwrap().text().unwrap(), "good", "{fault:?}");
        assert_eq!((requests, failed.as_deref()), (2, Some(class)), "{fault:?}");
    }
}

#[tokio::test]
async fn an_endless_body_is_read_to_the_limit_and_is_delivered() {
    let (response, requests, _) = with_fault(Fault::EndlessBody).await;
    let error = response.unwrap_err();
    assert!(error.is_response_too_large(), "{error:?}");
    assert_eq!(error.response_head().unwrap().0, 200);
    assert_eq!(requests, 1);
}

/// Sends more than its response on each connection, and leaves it open.
async fn splitting() -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        // One that is sent unasked, and one that a wrong length leaves behind.
        let unasked = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood\
            HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
        let framed_twice = b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\
            transfer-encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n\
            HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
        let answers: [&[u8]; 2] = [unasked, framed_twice];
        for answer in answers.into_iter().cycle() {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                while read_request(&mut stream).await {
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

#[tokio::test]
async fn a_response_that_is_sent_unasked_is_not_taken_for_the_next() {
    let database = migrated().await;
    let addr = splitting().await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    for _ in 0..20 {
        let response = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
        assert_eq!(response.unwrap().text().unwrap(), "good");
    }
}

#[tokio::test]
async fn a_receiver_that_does_not_read_holds_an_attempt_for_its_timeout() {
    let database = migrated().await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let durable = short_lease_builder(database.pool())
        .attempt_timeout(Duration::from_secs(1))
        .retry(RetryPolicy::none())
        .build()
        .unwrap();
    // More than the sockets' buffers take.
    let request = post(url, vec![0; 8 * 1024 * 1024 - 1024]);
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Timeout));
    drop(listener);
}

#[tokio::test]
async fn early_hints_are_not_taken_for_the_response() {
    let (response, requests, failed) = with_fault(Fault::EarlyHints).await;
    assert_eq!(response.unwrap().status(), 200);
    assert_eq!((requests, failed), (1, None));
}

#[tokio::test]
async fn a_connection_closed_between_requests_is_replaced() {
    let database = migrated().await;
    let (addr, requests) = faulty(Fault::ClosedWhenIdle).await;
    let durable = short_lease_builder(database.pool()).build().unwrap();
    for _ in 0..5 {
        let response = in_time(durable.await_response(post(format!("http://{addr}/"), "x"))).await;
        assert_eq!(response.unwrap().text().unwrap(), "good");
    }
    assert_eq!(requests.load(Ordering::SeqCst), 5);
}

/// An HTTP/2 server without TLS whose connections each send GOAWAY after some requests.
async fn leaving_server(after: usize) -> (Server, SocketAddr, Arc<AtomicUsize>) {
    let behind = super::echo_server().await;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let left = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&left);
    let client = reqwest::Client::new();
    let url = behind.url("/");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (client, url, counted) = (client.clone(), url.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                let (enough, served) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
                let reached = Arc::clone(&enough);
                let service = service_fn(move |request: http::Request<Incoming>| {
                    if served.fetch_add(1, Ordering::SeqCst) + 1 == after {
                        reached.notify_one();
                    }
                    let (client, url) = (client.clone(), url.clone());
                    async move {
                        let body = request.into_body().collect().await?.to_bytes();
                        let answer = client.post(url).body(body).send().await;
                        let body = answer.unwrap().bytes().await.unwrap();
                        Ok::<_, hyper::Error>(http::Response::new(Full::<Bytes>::new(body)))
                    }
                });
                let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                tokio::select! {
                    _ = &mut connection => return,
                    () = enough.notified() => {}
                }
                counted.fetch_add(1, Ordering::SeqCst);
                connection.as_mut().graceful_shutdown();
                // The client may have closed the connection first.
                let _ = connection.await;
            });
        }
    });
    (behind, addr, left)
}

#[tokio::test]
async fn a_server_sending_goaway_gets_each_request_once() {
    let database = migrated().await;
    let (server, addr, left) = leaving_server(5).await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let durable = short_lease_builder(database.pool())
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    let ledger = load(&durable, &format!("http://{addr}/"), 8, 10).await;
    let twice = check_ledger("GOAWAY", &durable, &server, ledger).await;
    assert_eq!(twice, 0);
    assert!(left.load(Ordering::SeqCst) > 1);
    let completed = "outcomes WHERE status = 'completed'";
    assert_eq!(rows(&database, completed).await, 80);
}
