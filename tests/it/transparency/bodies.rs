//! Bodies: empty, streamed and large, and trailers.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use requeuest::retry::RetryPolicy;
use requeuest::{Body, reqwest};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};

use super::raw::{Answer, RawServer};
use super::{durable, flat, plain_builder, reqwest_client, soon};
use crate::support::{Server, hyper_client, in_time, migrated, outcome_of, post, with_middleware};

/// Incompressible bytes of every value.
fn noise(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

/// An HTTP/1.1 server that answers every request with these bytes.
async fn answering(bytes: &[u8]) -> RawServer {
    let server = RawServer::start().await;
    server.answer(&Answer {
        bytes: bytes.to_vec(),
        close: false,
    });
    server
}

#[tokio::test]
async fn responses_without_a_body_keep_their_content_length() {
    let database = migrated().await;
    let durable = durable(&database);
    let layered = durable.layer().layer(hyper_client::<Body>());
    let client = with_middleware(reqwest_client(), &durable);
    for (method, status, length) in [
        ("HEAD", 200, Some("5")),
        ("GET", 204, None),
        ("GET", 304, Some("5")),
        ("HEAD", 404, Some("5")),
    ] {
        let length_line = length.map_or(String::new(), |len| format!("content-length: {len}\r\n"));
        let answer = format!("HTTP/1.1 {status} X\r\n{length_line}\r\n");
        let server = answering(answer.as_bytes()).await;
        let url = format!("http://{}/", server.addr);
        let request = || {
            let request = Request::builder().method(method).uri(&url);
            request.body(String::new()).unwrap()
        };
        let expected = (StatusCode::from_u16(status).unwrap(), length, 0);
        let of = |status, headers: &HeaderMap, body: &[u8]| {
            let got = headers.get("content-length").map(HeaderValue::to_str);
            assert_eq!((status, got.map(Result::unwrap), body.len()), expected);
        };

        let response = in_time(durable.await_response(request())).await.unwrap();
        of(response.status(), response.headers(), response.body());
        let stored = durable.response(response.id()).await.unwrap();
        of(stored.status(), stored.headers(), stored.body());

        let response = in_time(layered.clone().oneshot(request())).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        of(parts.status, &parts.headers, &body);

        let request = reqwest::Request::try_from(request()).unwrap();
        let response = in_time(client.execute(request)).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        of(status, &headers, &response.bytes().await.unwrap());
    }
}

/// A body of several chunks, with trailers at the end.
fn streamed(
    chunks: &'static [&'static str],
    trailers: Option<HeaderMap>,
) -> impl http_body::Body<Data = Bytes, Error = Infallible> + Send + Sync + 'static {
    let data = chunks
        .iter()
        .map(|chunk| Frame::data(Bytes::from_static(chunk.as_bytes())));
    let frames: Vec<_> = data
        .chain(trailers.map(Frame::trailers))
        .map(Ok::<_, Infallible>)
        .collect();
    StreamBody::new(futures_util::stream::iter(frames))
}

#[tokio::test]
async fn streamed_bodies_arrive_whole() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = durable(&database);
    let chunks = &["one ", "", "two ", "three"];

    let layered = durable.layer().layer(hyper_client::<Body>());
    let request = Request::post(server.url("/"))
        .body(streamed(chunks, None))
        .unwrap();
    let response = in_time(layered.oneshot(request)).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "one two three");

    let client = with_middleware(reqwest_client(), &durable);
    let request = client
        .post(server.url("/"))
        .body(reqwest::Body::wrap(streamed(chunks, None)));
    let response = in_time(request.send()).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "one two three");

    for seen in server.seen() {
        assert_eq!(seen.body, "one two three");
        assert_eq!(seen.headers["content-length"], "13");
        assert!(!seen.headers.contains_key("transfer-encoding"));
    }
    assert_eq!(server.count(), 2);
}

fn trailers(value: &'static str) -> HeaderMap {
    let value = HeaderValue::from_static(value);
    HeaderMap::from_iter([(http::HeaderName::from_static("x-trailer"), value)])
}

/// A server that answers with the request's body and trailers, and adds the trailer `x-answered`.
async fn trailing_server() -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(|request: Request<Incoming>| async {
                let version = format!("{:?}", request.version());
                let body = request.into_body().collect().await?;
                let mut answered = body.trailers().cloned().unwrap_or_default();
                answered.insert("x-answered", HeaderValue::from_static("yes"));
                let body = Full::new(body.to_bytes())
                    .with_trailers(async { Some(Ok::<_, Infallible>(answered)) });
                let response = Response::builder().header("x-version", version).body(body);
                Ok::<_, hyper::Error>(response.unwrap())
            });
            tokio::spawn(async move {
                let connection = auto::Builder::new(TokioExecutor::new());
                // Clients may cut the connection.
                let _ = connection
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    url
}

/// The versions of response and request, and the response's body and trailers.
async fn trailing<B>(response: Response<B>) -> (Version, String, Bytes, Vec<(String, String)>)
where
    B: http_body::Body<Data = Bytes>,
    B::Error: std::fmt::Debug,
{
    let version = response.headers()["x-version"].to_str().unwrap().to_owned();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    let trailers = flat(body.trailers().expect("no trailers came"));
    (parts.version, version, body.to_bytes(), trailers)
}

#[tokio::test]
async fn http_2_trailers_pass_in_both_directions() {
    let database = migrated().await;
    let url = trailing_server().await;
    let request = || {
        Request::post(&url)
            .version(Version::HTTP_2)
            .body(streamed(&["hello"], Some(trailers("sent"))))
            .unwrap()
    };
    let expected = || {
        let trailers = [("x-trailer", "sent"), ("x-answered", "yes")];
        let trailers = trailers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        (
            Version::HTTP_2,
            "HTTP/2.0".to_owned(),
            Bytes::from("hello"),
            trailers.to_vec(),
        )
    };

    let bare: Client<HttpConnector, _> = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let response = in_time(bare.request(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "without");

    let hyper: Client<HttpConnector, Body> = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let sender = plain_builder(&database)
        .retry(RetryPolicy::none())
        .transport(hyper.clone())
        .build()
        .unwrap();
    let layered = sender.layer().layer(hyper.clone());
    let response = in_time(layered.oneshot(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "layer");

    let other_process = plain_builder(&database)
        .runner(false)
        .build_layer()
        .unwrap()
        .layer(hyper);
    let response = in_time(other_process.oneshot(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "another process");

    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let bare = reqwest::Request::try_from(request().map(reqwest::Body::wrap)).unwrap();
    let response: Response<reqwest::Body> = in_time(client.execute(bare)).await.unwrap().into();
    assert_eq!(trailing(response).await, expected(), "without");

    let client = with_middleware(client, &durable(&database));
    let with = reqwest::Request::try_from(request().map(reqwest::Body::wrap)).unwrap();
    let response: Response<reqwest::Body> = in_time(client.execute(with)).await.unwrap().into();
    assert_eq!(trailing(response).await, expected(), "middleware");
}

#[tokio::test]
async fn large_binary_bodies_pass_in_both_directions() {
    let database = migrated().await;
    let server = Server::echo().await;
    let durable = durable(&database);

    let body = noise(1024 * 1024);
    let response = in_time(durable.await_response(post(server.url("/"), body.clone())))
        .await
        .unwrap();
    assert!(response.body() == &body);
    assert!(durable.response(response.id()).await.unwrap().body() == &body);

    // A runner sends these. It gets bodies of up to 64 KiB with the claim and fetches larger ones.
    let later = [0, 1, 65_535, 65_536, 65_537, 1024 * 1024].map(|len| {
        let (durable, server) = (&durable, &server);
        async move {
            let body = noise(len);
            let request = post(server.url(&format!("/{len}")), body.clone()).with(soon());
            let id = durable.fire(request).await.unwrap();
            let outcome = outcome_of(durable, id).await;
            assert!(outcome.into_result().unwrap().body() == &body, "{len}");
            let seen = server.seen().into_iter();
            let mut seen = seen.filter(|seen| seen.uri.path() == format!("/{len}"));
            assert!(seen.next().unwrap().body == body, "{len}");
            assert!(seen.next().is_none(), "{len}");
            assert!(durable.response(id).await.unwrap().body() == &body);
        }
    });
    futures_util::future::join_all(later).await;
}
