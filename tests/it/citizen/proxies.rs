//! Faults of a forward proxy, which are not the destination's.

use requeuest::{CircuitBreaker, DestinationPolicy, DestinationState, ReqwestTransport};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use crate::support::{builder, closed_port, eventually, migrated, outcome_of, post, quick};

/// A proxy that answers each CONNECT with this, or with nothing, and closes the connection.
async fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    format!("http://{addr}")
}

#[tokio::test]
async fn a_proxy_that_is_down_or_refuses_opens_no_breaker() {
    let database = migrated().await;
    let down = closed_port().await;
    let cases = [
        ("down", format!("http://{down}"), false),
        ("silent", answering("").await, false),
        (
            "refused",
            answering("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await,
            false,
        ),
        // The proxy may say so because it can't reach the destination. What it says isn't known.
        (
            "unreachable",
            answering("HTTP/1.1 502 Bad Gateway\r\n\r\n").await,
            true,
        ),
        // Without a proxy. Comes last: what the others have shown is known by then.
        ("direct", String::new(), true),
    ];
    let breaker = CircuitBreaker::default().min_attempts(1);
    let policy = DestinationPolicy::default().circuit_breaker(breaker);
    let mut handles = Vec::new();
    for (name, proxy, is_blamed) in cases {
        let client = reqwest::Client::builder().no_proxy();
        let client = match &*proxy {
            "" => client,
            proxy => client.proxy(reqwest::Proxy::https(proxy).unwrap()),
        };
        let durable = builder(&database)
            .channel(name)
            .transport(ReqwestTransport::new(client.build().unwrap()))
            .destination("*", policy.clone())
            .retry(quick().max_attempts(1))
            .build()
            .unwrap();
        let origin = format!("https://{}", closed_port().await);
        let destination = durable.destination(&origin).unwrap();
        let id = durable.fire(post(&origin, "x")).await.unwrap();
        let outcome = outcome_of(&durable, id).await;
        assert_eq!(outcome.attempts(), 1, "{name}");
        if is_blamed {
            eventually(name, || async {
                destination.status().await.unwrap().state == DestinationState::CircuitOpen
            })
            .await;
        }
        handles.push((name, durable, destination, is_blamed));
    }
    // Each process reports once a second. A second request shows that nothing is in its way.
    for (name, durable, destination, is_blamed) in &handles {
        if !is_blamed {
            let id = durable.fire(post(destination.name(), "x")).await.unwrap();
            assert_eq!(outcome_of(durable, id).await.attempts(), 1, "{name}");
            let status = destination.status().await.unwrap();
            assert_eq!(
                (status.state, status.failures),
                (DestinationState::Open, 0),
                "{name}"
            );
        }
    }
}
