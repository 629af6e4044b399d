//! Bodies through the layer, pass-through, and types that aren't `Sync`.

use std::cell::Cell;
use std::convert::Infallible;
use std::error::Error;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{StreamExt, future, stream};
use http::{HeaderMap, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{self, Client};
use requeuest::{Body, DurableLayer, DurableService, REQUEST_ID_HEADER, ResponseFuture};
use tokio::sync::mpsc;
use tower::{Layer, Service, ServiceExt, service_fn};

use super::{INNER, YES, counting, http_post, quick_layer, text};
use crate::support::{
    Server, assert_nothing_persisted, builder, closed_port, hyper_client, in_time, migrated, quick,
    rows,
};

type Hyper = Client<HttpConnector, Body>;

/// A body that is `Send` and not `Sync`.
struct Unshared(Cell<Option<Bytes>>);

impl http_body::Body for Unshared {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
    }
}

#[tokio::test]
async fn callers_may_send_any_body() {
    let database = migrated().await;
    let server = Server::echo().await;
    let client = DurableLayer::new(database.pool().clone()).layer(hyper_client());
    let post = || Request::post(server.url("/"));

    let full = post().body(Full::<Bytes>::from("full")).unwrap();
    let response = in_time(client.clone().oneshot(full)).await.unwrap();
    assert_eq!(text(response).await, "full");

    let empty = post().body(Empty::<Bytes>::new()).unwrap();
    let response = in_time(client.clone().with_body().oneshot(empty))
        .await
        .unwrap();
    assert_eq!(text(response).await, "");

    let frames = ["in ", "three ", "parts"].map(|part| Ok::<_, Infallible>(Frame::data(part)));
    let frames = stream::iter(frames).map(|frame| frame.map(|f| f.map_data(Bytes::from)));
    let streamed = post().body(StreamBody::new(frames)).unwrap();
    let response = in_time(client.clone().with_body().oneshot(streamed))
        .await
        .unwrap();
    assert_eq!(text(response).await, "in three parts");

    let boxed: BoxBody<Bytes, Infallible> = Full::from("boxed").boxed();
    let boxed = post().body(boxed).unwrap();
    let response = in_time(client.clone().with_body().oneshot(boxed))
        .await
        .unwrap();
    assert_eq!(text(response).await, "boxed");

    let unshared = Unshared(Cell::new(Some("unshared".into())));
    let unshared = post().body(unshared).unwrap();
    let response = in_time(client.clone().with_body().oneshot(unshared))
        .await
        .unwrap();
    assert_eq!(text(response).await, "unshared");

    let own = post().body(Body::from("own")).unwrap();
    let response = in_time(client.with_body().oneshot(own)).await.unwrap();
    assert_eq!(text(response).await, "own");

    assert_eq!(rows(&database, "outcomes").await, 6);
}

#[tokio::test]
async fn a_streamed_body_is_sent_whole_with_each_attempt() {
    let database = migrated().await;
    let server = Server::in_turn(&[503, 503, 200]).await;
    let client = quick_layer(&database).layer(hyper_client());
    let frames =
        stream::iter(["a", "b"].map(|part| Ok::<_, Infallible>(Frame::data(Bytes::from(part)))));
    let request = Request::post(server.url("/"))
        .body(StreamBody::new(frames))
        .unwrap();
    in_time(client.oneshot(request)).await.unwrap();
    assert_eq!(server.bodies(), ["ab", "ab", "ab"]);
}

#[tokio::test]
async fn pass_through_requests_are_not_persisted_or_retried() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let layer = builder(&database)
        .retry(quick())
        .pass_through(|head| head.method().is_safe() && head.path() == "/safe")
        .build_layer()
        .unwrap();
    let (client, calls) = counting();
    let client = layer.layer(client);
    let get = Request::get(server.url("/safe"))
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = in_time(client.oneshot(get)).await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(!response.headers().contains_key(REQUEST_ID_HEADER));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_nothing_persisted(&database).await;

    let unreachable = layer.layer(hyper_client());
    let get = Request::get(format!("http://{}/safe", closed_port().await))
        .body(Empty::<Bytes>::new())
        .unwrap();
    let error = in_time(unreachable.oneshot(get)).await.unwrap_err();
    let source = error.source().unwrap();
    assert!(source.is::<legacy::Error>(), "{error:?}");
}

#[tokio::test]
async fn pass_through_bodies_keep_streaming() {
    let database = migrated().await;
    // Answers at once, and streams the request's body back as it comes.
    let echo = service_fn(|request: Request<Body>| {
        let noted = request.extensions().get::<&str>().copied();
        assert_eq!(noted, Some("noted"));
        future::ok::<_, Infallible>(Response::new(request.into_body()))
    });
    let client = builder(&database)
        .pass_through(|_| true)
        .build_layer()
        .unwrap()
        .layer(echo);
    let (input, frames) = mpsc::channel::<Frame<Bytes>>(1);
    let frames = stream::unfold(frames, |mut frames| async {
        let frame = frames.recv().await?;
        Some((Ok::<_, Infallible>(frame), frames))
    });
    let request = Request::post("http://localhost/")
        .extension("noted")
        .body(StreamBody::new(frames))
        .unwrap();
    let response = in_time(client.oneshot(request)).await.unwrap();
    let mut output = response.into_body();
    for part in ["one", "two"] {
        input.send(Frame::data(Bytes::from(part))).await.unwrap();
        let frame = in_time(output.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), part);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert(INNER, YES);
    input.send(Frame::trailers(trailers.clone())).await.unwrap();
    let frame = in_time(output.frame()).await.unwrap().unwrap();
    assert_eq!(frame.into_trailers().unwrap(), trailers);
    drop(input);
    assert!(in_time(output.frame()).await.is_none());
    assert_eq!(rows(&database, "outcomes").await, 0);
}

/// A service that is `Send` and not `Sync`.
#[derive(Clone)]
struct UnsharedService(Cell<u8>);

impl Service<Request<Body>> for UnsharedService {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        self.0.set(self.0.get() + 1);
        future::ok(Response::new(Full::from("unshared")))
    }
}

#[tokio::test]
async fn the_wrapped_service_need_not_be_sync() {
    fn is_send<T: Send>() {}
    fn is_send_and_sync<T: Send + Sync>() {}
    fn future_has_a_name<S, B>(_: &S)
    where
        S: Service<Request<Full<Bytes>>, Future = ResponseFuture<B, Full<Bytes>>>,
        B: Service<Request<Body>>,
    {
    }
    is_send_and_sync::<DurableLayer>();
    is_send_and_sync::<DurableService<Hyper>>();
    is_send::<DurableService<UnsharedService>>();
    is_send::<ResponseFuture<Hyper, Full<Bytes>>>();
    is_send::<ResponseFuture<UnsharedService, Unshared>>();

    let database = migrated().await;
    let client = DurableLayer::new(database.pool().clone()).layer(UnsharedService(Cell::new(0)));
    future_has_a_name(&client);
    assert_eq!(client.get_ref().0.get(), 0);
    let response = tokio::spawn(client.clone().oneshot(http_post("http://localhost/", "x")));
    let response = in_time(response).await.unwrap().unwrap();
    assert_eq!(text(response).await, "unshared");
}
