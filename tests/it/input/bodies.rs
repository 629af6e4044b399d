//! Bodies of requests and responses that are too large, and streams that fail.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use requeuest::{Body, Durable, Error, Options, Request, Status, reqwest};
use tower::ServiceExt;

use super::{assert_refused, get, into_error, layered, middleware, of_middleware};
use crate::support::{
    Server, assert_nothing_persisted, builder, in_time, migrated, outcome_of, post, reply,
};

/// A request body of 1000-byte chunks that counts its polls.
struct Chunks {
    count: usize,
    polled: Arc<AtomicUsize>,
    declares: Option<u64>,
    fails_at: Option<usize>,
}

impl Chunks {
    fn new(count: usize) -> Self {
        Self {
            count,
            polled: Arc::default(),
            declares: None,
            fails_at: None,
        }
    }
}

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let number = self.polled.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(if Some(number) == self.fails_at {
            Some(Err(std::io::Error::other("the disk is gone")))
        } else if number < self.count {
            Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 1000]))))
        } else {
            None
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.declares
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// Sends a stream through the layer, and a stream through the middleware.
async fn send_streams(
    durable: &Durable,
    url: &str,
    body: impl Fn() -> Chunks,
) -> [Result<(), Error>; 2] {
    let request = http::Request::post(url).body(body()).unwrap();
    let layer = in_time(layered(durable).oneshot(request)).await.map(drop);
    let request = middleware(durable)
        .post(url)
        .body(reqwest::Body::wrap(body()));
    let middleware = in_time(request.send()).await.map(drop);
    let middleware = middleware.map_err(into_error);
    [layer, middleware]
}

fn assert_body_too_large(error: &Error) {
    assert_refused(error, "body");
    assert!(error.is_body_too_large(), "{error:?}");
    assert!(error.to_string().contains("5000"), "{error}");
}

#[tokio::test]
async fn every_entry_point_refuses_a_body_over_the_limit() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).max_request_body(5000).build().unwrap();
    let of_len = |len| post(server.url("/"), vec![b'x'; len]);

    assert_body_too_large(&durable.fire(of_len(5001)).await.unwrap_err());
    assert_body_too_large(&durable.await_response(of_len(5001)).await.unwrap_err());
    let refused = durable.fire_in(database.pool(), of_len(5001)).await;
    assert_body_too_large(&refused.unwrap_err());
    let too_large = http::Request::post(server.url("/"));
    let too_large = too_large.body(Body::from(vec![b'x'; 5001])).unwrap();
    let refused = in_time(layered(&durable).oneshot(too_large)).await;
    assert_body_too_large(&refused.unwrap_err());
    let request = middleware(&durable)
        .post(server.url("/"))
        .body(vec![b'x'; 5001]);
    let refused = in_time(request.send()).await.unwrap_err();
    assert_body_too_large(of_middleware(&refused));
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);

    in_time(durable.await_response(of_len(5000))).await.unwrap();
    for sent in send_streams(&durable, &server.url("/"), || Chunks::new(5)).await {
        sent.unwrap();
    }
    assert_eq!(server.count(), 3);
    assert!(server.seen().iter().all(|seen| seen.body.len() == 5000));
}

#[tokio::test]
async fn a_stream_is_not_read_past_the_limit() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database).max_request_body(5000).build().unwrap();
    let polled = Arc::new(AtomicUsize::new(0));
    // Each body counts on from where the last body stopped.
    let endless = || Chunks {
        polled: Arc::clone(&polled),
        ..Chunks::new(usize::MAX)
    };
    for sent in send_streams(&durable, &server.url("/"), endless).await {
        assert_body_too_large(&sent.unwrap_err());
    }
    // The sixth chunk of each body exceeds the limit.
    assert_eq!(polled.swap(0, Ordering::Relaxed), 2 * 6);

    // A declared length over the limit is enough: nothing is read.
    let declared = || Chunks {
        declares: Some(5001),
        ..endless()
    };
    for sent in send_streams(&durable, &server.url("/"), declared).await {
        assert_body_too_large(&sent.unwrap_err());
    }
    assert_eq!(polled.load(Ordering::Relaxed), 0);
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_failing_stream_is_refused_with_its_error() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let failing = || Chunks {
        fails_at: Some(2),
        ..Chunks::new(5)
    };
    for sent in send_streams(&durable, &server.url("/"), failing).await {
        let error = sent.unwrap_err();
        assert_refused(&error, "body");
        assert!(!error.is_body_too_large());
        let shown = format!("{error:?}");
        assert!(shown.contains("the disk is gone"), "{shown}");
    }
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_conversion_refuses_a_stream_and_says_what_reads_it() {
    let request = reqwest::Client::new().post("http://example.com/");
    let request = request.body(reqwest::Body::wrap(Chunks::new(1)));
    let refused = Request::from_reqwest(request.build().unwrap()).unwrap_err();
    assert_refused(&refused, "body");
    assert!(refused.to_string().contains("`Durable::fire`"), "{refused}");
}

#[tokio::test]
async fn a_response_over_the_limit_is_final_and_keeps_its_head() {
    let database = migrated().await;
    let server = Server::start(|_, _| async move {
        let mut response = reply(409, vec![b'x'; 5001]);
        response.headers_mut().insert("x-a", "b".parse().unwrap());
        response
    })
    .await;
    let durable = builder(&database).max_response_body(5000).build().unwrap();
    let is_too_large = |error: &Error| {
        assert!(error.is_response_too_large(), "{error:?}");
        let (status, headers) = error.response_head().unwrap();
        assert_eq!(status, StatusCode::CONFLICT);
        assert_eq!(headers["x-a"], "b");
        assert_eq!(headers["content-length"], "5001");
        error.request_id().unwrap()
    };

    let url = server.url("/");
    let mut ids = Vec::new();
    let error = in_time(durable.await_response(get(&url)))
        .await
        .unwrap_err();
    ids.push(is_too_large(&error));
    let error = in_time(layered(&durable).oneshot(get(&url)))
        .await
        .unwrap_err();
    ids.push(is_too_large(&error));
    let error = in_time(middleware(&durable).get(&url).send())
        .await
        .unwrap_err();
    ids.push(is_too_large(of_middleware(&error)));
    let delayed = Options::default().delay(Duration::from_millis(10));
    let accepting = delayed.accept([StatusCode::CONFLICT]);
    let request = Request::try_from(get(&url)).unwrap().with(accepting);
    let id = durable.fire(request).await.unwrap();
    let outcome = outcome_of(&durable, id).await;
    ids.push(is_too_large(&outcome.into_result().unwrap_err()));

    assert_eq!(server.count(), ids.len());
    for id in ids {
        assert_eq!(durable.status(id).await.unwrap(), Some(Status::Completed));
        let again = durable.response(id).await.unwrap_err();
        assert_eq!(is_too_large(&again), id);
    }
}

#[tokio::test]
async fn a_response_at_the_limit_is_returned() {
    let database = migrated().await;
    let server = Server::start(|_, _| async move { reply(200, vec![b'x'; 5000]) }).await;
    let durable = builder(&database).max_response_body(5000).build().unwrap();
    let response = in_time(durable.await_response(get(server.url("/"))))
        .await
        .unwrap();
    assert_eq!(response.body().len(), 5000);
}
