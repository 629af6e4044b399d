//! What goes in is what is sent, and what comes back is what is returned.

mod cases;
mod raw;

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, TestDatabase};
use requeuest::{
    AcceptedResponse, Body, Durable, DurableBuilder, IdempotencyHeader, Options, ReqwestTransport,
    Status, Url, reqwest,
};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tower::{Layer, ServiceExt};

use crate::support::{LONG, Server, closed_port, count, in_time, migrated, reply};

use cases::{Asked, Case};
use raw::RawServer;

// The differential tests: the same request with and without the crate, to a server that keeps bytes.

/// Enough to meet each oddity several times, and done in a few seconds.
const CASES: u32 = 150;

/// What a client got.
#[derive(Debug, PartialEq)]
struct Got {
    status: StatusCode,
    version: Version,
    reason: Option<String>,
    headers: Vec<(String, String)>,
    body: Bytes,
    url: Option<Url>,
}

impl Got {
    async fn of_http<B>(response: Response<B>) -> Self
    where
        B: http_body::Body<Data = Bytes>,
        B::Error: std::fmt::Debug,
    {
        let (parts, body) = response.into_parts();
        Self {
            status: parts.status,
            version: parts.version,
            reason: parts.extensions.get().map(reason),
            headers: flat(&parts.headers),
            body: body.collect().await.unwrap().to_bytes(),
            url: None,
        }
    }

    async fn of_reqwest(response: reqwest::Response) -> Self {
        Self {
            status: response.status(),
            version: response.version(),
            reason: response.extensions().get().map(reason),
            headers: flat(response.headers()),
            url: Some(response.url().clone()),
            body: response.bytes().await.unwrap(),
        }
    }

    /// The reason phrase is an attachment of hyper's, which is not stored.
    fn stored(mut self) -> Self {
        self.reason = None;
        self
    }
}

fn reason(phrase: &ReasonPhrase) -> String {
    phrase.as_bytes().escape_ascii().to_string()
}

fn flat(headers: &HeaderMap) -> Vec<(String, String)> {
    headers
        .iter()
        .map(|(name, value)| {
            let value = value.as_bytes().escape_ascii().to_string();
            (name.to_string(), value)
        })
        .collect()
}

/// Adds nothing of its own: by default a header tells the receiver of repetitions.
fn builder(database: &TestDatabase) -> DurableBuilder {
    Durable::builder(database.pool().clone()).idempotency_header(IdempotencyHeader::none())
}

/// Sends every case on both ways; what the server saw and what the caller got must be the same.
fn compare<F, G>(
    runtime: &Runtime,
    server: &RawServer,
    allowed: fn(&str) -> bool,
    bare: impl Fn(Case) -> F,
    durable: impl Fn(Case) -> G,
) where
    F: Future<Output = Got>,
    G: Future<Output = Got>,
{
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        max_shrink_iters: 300,
        ..Config::default()
    };
    let tried = TestRunner::new(config).run(&cases::case(allowed), |case| {
        server.answer(&case.answered.to(&case.asked.method));
        runtime.block_on(async {
            let without = in_time(bare(case.clone())).await;
            let without = (server.take_seen(), without);
            let with = in_time(durable(case)).await;
            let with = (server.take_seen(), with);
            assert_eq!(without.0.len(), 1, "sent {:?}", without.0);
            if without == with {
                return Ok(());
            }
            Err(TestCaseError::fail(format!(
                "without: {without:#?}\nwith: {with:#?}"
            )))
        })
    });
    if let Err(error) = tried {
        panic!("{error}");
    }
}

/// `http` takes no URL that needs escaping; reqwest's escapes it.
fn fits_http(target: &str) -> bool {
    target.parse::<http::Uri>().is_ok()
}

impl Asked {
    fn url(&self, server: &RawServer) -> String {
        let credentials = if self.credentials {
            "us%65r:p%40ss@"
        } else {
            ""
        };
        format!("http://{credentials}{}{}", server.addr, self.target)
    }

    fn to_http(&self, server: &RawServer) -> Request<BoxBody<Bytes, Infallible>> {
        let body = match &self.body {
            None => Empty::new().boxed(),
            Some(body) => Full::new(body.clone()).boxed(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.url(server).parse().unwrap();
        *request.version_mut() = self.version;
        *request.headers_mut() = self.headers.clone();
        request
    }

    fn to_reqwest(&self, server: &RawServer, client: &reqwest::Client) -> reqwest::Request {
        let mut builder = client
            .request(self.method.clone(), self.url(server))
            .headers(self.headers.clone())
            .version(self.version);
        if let Some(body) = &self.body {
            builder = builder.body(body.clone());
        }
        builder.build().unwrap()
    }
}

impl Case {
    fn options(&self) -> Options {
        if self.accept_any {
            Options::default().accept([AcceptedResponse::Any])
        } else {
            Options::default().retry(RetryPolicy::none())
        }
    }
}

type HyperClient<B> = Client<HttpConnector, B>;

fn hyper_client<B>() -> HyperClient<B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

/// As the crate's own transport.
fn reqwest_client() -> reqwest::Client {
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .build()
        .unwrap()
}

fn setting() -> (Runtime, TestDatabase, RawServer) {
    let runtime = Runtime::new().unwrap();
    let (database, server) =
        runtime.block_on(async { (migrated().await, RawServer::start().await) });
    (runtime, database, server)
}

#[test]
fn the_layer_changes_nothing() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = hyper_client();
    let service = builder(&database)
        .build_layer()
        .unwrap()
        .layer(hyper_client::<Body>());
    drop(context);
    compare(
        &runtime,
        &server,
        fits_http,
        |case| {
            let sent = bare.request(case.asked.to_http(&server));
            async { Got::of_http(sent.await.unwrap()).await }
        },
        |case| {
            let mut request = case.asked.to_http(&server);
            request.extensions_mut().insert(case.options());
            let sent = service.clone().oneshot(request);
            async { Got::of_http(sent.await.unwrap()).await }
        },
    );
}

#[test]
fn the_layer_changes_nothing_when_another_process_sends() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = hyper_client();
    let _sender = builder(&database)
        .transport(hyper_client::<Body>())
        .build()
        .unwrap();
    let service = builder(&database)
        .runner(false)
        .build_layer()
        .unwrap()
        .layer(hyper_client::<Body>());
    drop(context);
    compare(
        &runtime,
        &server,
        fits_http,
        |case| {
            let sent = bare.request(case.asked.to_http(&server));
            async { Got::of_http(sent.await.unwrap()).await.stored() }
        },
        |case| {
            let mut request = case.asked.to_http(&server);
            request.extensions_mut().insert(case.options());
            let sent = service.clone().oneshot(request);
            async { Got::of_http(sent.await.unwrap()).await.stored() }
        },
    );
}

fn with_middleware(client: reqwest::Client, durable: Durable) -> ClientWithMiddleware {
    ClientBuilder::new(client).with(durable).build()
}

#[test]
fn the_middleware_changes_nothing() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let client = with_middleware(bare.clone(), builder(&database).build().unwrap());
    drop(context);
    compare(
        &runtime,
        &server,
        |_| true,
        |case| {
            let sent = bare.execute(case.asked.to_reqwest(&server, &bare));
            async { Got::of_reqwest(sent.await.unwrap()).await }
        },
        |case| {
            let request = case.asked.to_reqwest(&server, &bare);
            let client = client.clone();
            async move {
                let mut extensions = http::Extensions::new();
                extensions.insert(case.options());
                let sent = client.execute_with_extensions(request, &mut extensions);
                Got::of_reqwest(sent.await.unwrap()).await
            }
        },
    );
}

#[test]
fn the_default_transport_sends_what_a_reqwest_client_sends() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let durable = builder(&database).build().unwrap();
    drop(context);
    compare_with_reqwest(&runtime, &server, &bare, &durable, |got| got);
}

#[test]
fn the_default_transport_of_another_process_sends_what_a_reqwest_client_sends() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let _sender = builder(&database).build().unwrap();
    let durable = builder(&database).runner(false).build().unwrap();
    drop(context);
    compare_with_reqwest(&runtime, &server, &bare, &durable, Got::stored);
}

fn compare_with_reqwest(
    runtime: &Runtime,
    server: &RawServer,
    bare: &reqwest::Client,
    durable: &Durable,
    seen_by: fn(Got) -> Got,
) {
    compare(
        runtime,
        server,
        |_| true,
        |case| {
            let sent = bare.execute(case.asked.to_reqwest(server, bare));
            async move { seen_by(Got::of_reqwest(sent.await.unwrap()).await) }
        },
        |case| {
            let request = case.asked.to_reqwest(server, bare);
            let request = requeuest::Request::try_from(request)
                .unwrap()
                .with(case.options());
            async move {
                let response = durable.await_response(request).await.unwrap();
                seen_by(Got::of_reqwest(response.into()).await)
            }
        },
    );
}

// What the generated cases don't show.

/// Persisted, and later sent by whichever runner gets it.
fn soon() -> Options {
    Options::default().delay(Duration::from_millis(20))
}

/// One attempt, so that a mistake fails instead of being retried.
fn durable(database: &TestDatabase) -> Durable {
    builder(database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap()
}

/// Not compressible, and with every byte in it.
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

fn request_to(url: &str, body: impl Into<Bytes>) -> requeuest::Request {
    Request::post(url)
        .body(body.into())
        .unwrap()
        .try_into()
        .unwrap()
}

#[tokio::test]
async fn sensitive_values_stay_marked_in_storage() {
    let database = migrated().await;
    let flags = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&flags);
    let transport = tower::service_fn(move |request: Request<Body>| {
        let marked = |value: &HeaderValue| (value.clone(), value.is_sensitive());
        record
            .lock()
            .unwrap()
            .extend(request.headers().get_all("x-key").iter().map(marked));
        async {
            let mut secret = HeaderValue::from_static("session");
            secret.set_sensitive(true);
            let response = Response::builder()
                .header("set-cookie", secret)
                .header("set-cookie", "theme=dark")
                .body(Body::empty());
            Ok::<_, Infallible>(response.unwrap())
        }
    });
    let durable = builder(&database).transport(transport).build().unwrap();

    let mut secret = HeaderValue::from_static("secret");
    secret.set_sensitive(true);
    let request = Request::get("http://example.com/")
        .header("x-key", "open")
        .header("x-key", &secret)
        .extension(soon())
        .body("")
        .unwrap();
    let id = durable.fire(request).await.unwrap();
    testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(
        *flags.lock().unwrap(),
        [(HeaderValue::from_static("open"), false), (secret, true)]
    );
    // The outcome comes out of the database now.
    let response = durable.response(id).await.unwrap();
    let cookies = response.headers().get_all("set-cookie").iter();
    let marked: Vec<_> = cookies.map(HeaderValue::is_sensitive).collect();
    assert_eq!(marked, [true, false]);
    assert!(!format!("{response:?}").contains("session"));
}

/// An HTTP/1.1 server that gives this answer to everything.
async fn answering(bytes: &[u8]) -> RawServer {
    let server = RawServer::start().await;
    server.answer(&raw::Answer {
        bytes: bytes.to_vec(),
        close: false,
    });
    server
}

#[tokio::test]
async fn responses_without_a_body_keep_the_length_they_speak_of() {
    let database = migrated().await;
    let durable = durable(&database);
    let layered = durable.layer().layer(hyper_client::<Body>());
    let client = with_middleware(reqwest_client(), durable.clone());
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
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let durable = durable(&database);
    let chunks = &["one ", "", "two ", "three"];

    let layered = durable.layer().layer(hyper_client::<Body>());
    let request = Request::post(server.url("/"))
        .body(streamed(chunks, None))
        .unwrap();
    let response = in_time(layered.oneshot(request)).await.unwrap();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "one two three");

    let client = with_middleware(reqwest_client(), durable);
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

/// A server that answers each body with itself and with trailers, and says in them what trailers came.
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

/// A response's body, and what came of the trailers of request and response.
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
async fn http_2_and_its_trailers_go_both_ways() {
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

    let bare: HyperClient<_> = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let response = in_time(bare.request(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "without");

    let hyper: HyperClient<Body> = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let sender = builder(&database)
        .retry(RetryPolicy::none())
        .transport(hyper.clone())
        .build()
        .unwrap();
    let layered = sender.layer().layer(hyper.clone());
    let response = in_time(layered.oneshot(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "layer");

    let elsewhere = builder(&database)
        .runner(false)
        .build_layer()
        .unwrap()
        .layer(hyper);
    let response = in_time(elsewhere.oneshot(request())).await.unwrap();
    assert_eq!(trailing(response).await, expected(), "another process");

    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let bare = reqwest::Request::try_from(request().map(reqwest::Body::wrap)).unwrap();
    let response: Response<reqwest::Body> = in_time(client.execute(bare)).await.unwrap().into();
    assert_eq!(trailing(response).await, expected(), "without");

    let client = with_middleware(client, durable(&database));
    let with = reqwest::Request::try_from(request().map(reqwest::Body::wrap)).unwrap();
    let response: Response<reqwest::Body> = in_time(client.execute(with)).await.unwrap().into();
    assert_eq!(trailing(response).await, expected(), "middleware");
}

#[tokio::test]
async fn http_2_is_remembered_with_the_stored_response() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let durable = builder(&database)
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    let id = durable
        .fire(request_to(&server.url("/"), "x").with(soon()))
        .await
        .unwrap();
    testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(server.seen()[0].version, Version::HTTP_2);
    let response = durable.response(id).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
}

/// A server that takes requests and never answers.
async fn silent_server() -> Server {
    Server::start(|_, _| std::future::pending()).await
}

#[tokio::test]
async fn a_timeout_of_a_reqwest_request_is_that_of_its_attempts() {
    let database = migrated().await;
    let server = silent_server().await;
    let durable = durable(&database);
    let began = Instant::now();
    let short = Duration::from_millis(150);

    let client = with_middleware(reqwest::Client::new(), durable.clone());
    let request = client.post(server.url("/middleware")).timeout(short);
    let error = in_time(request.send()).await.unwrap_err();
    let error = requeuest::Error::from_middleware(&error).unwrap();
    assert!(error.is_discarded(), "{error:?}");

    let bare = reqwest::Client::new();
    let request = bare.post(server.url("/")).timeout(short).build().unwrap();
    let error = in_time(durable.await_response(request)).await.unwrap_err();
    assert!(error.is_discarded(), "{error:?}");

    let request = bare.post(server.url("/")).timeout(short).build().unwrap();
    let id = durable.fire(request).await.unwrap();
    let outcome = testkit::outcome(&durable, id, LONG).await.unwrap();
    assert_eq!(outcome.status(), Status::Discarded);

    // The handle's own timeout is 30 s.
    assert!(began.elapsed() < Duration::from_secs(15));
    assert_eq!(server.count(), 3);
    let timeouts = "select count(*) from requeuest.outcomes where error_class = 'timeout'";
    assert_eq!(count(&database, timeouts).await, 3);
}

#[tokio::test]
async fn large_binary_bodies_go_both_ways() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move { reply(200, seen.body) }).await;
    let durable = durable(&database);

    let body = noise(1024 * 1024);
    let response = in_time(durable.await_response(request_to(&server.url("/"), body.clone())))
        .await
        .unwrap();
    assert!(response.body() == &body);
    assert!(durable.response(response.id()).await.unwrap().body() == &body);

    // Sent by a runner: bodies of up to 64 KiB come with the claim, others are fetched.
    let later = [0, 1, 65_535, 65_536, 65_537, 1024 * 1024].map(|len| {
        let (durable, server) = (&durable, &server);
        async move {
            let body = noise(len);
            let request = request_to(&server.url(&format!("/{len}")), body.clone()).with(soon());
            let id = durable.fire(request).await.unwrap();
            let outcome = testkit::outcome(durable, id, LONG).await.unwrap();
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

#[tokio::test]
async fn redirects_are_the_clients_affair() {
    let database = migrated().await;
    let server = Server::start(|_, seen| async move {
        let mut response = reply(200, seen.body);
        if let Some(status) = seen.uri.path().strip_prefix("/from/") {
            *response.status_mut() = status.parse().unwrap();
            let target = HeaderValue::from_static("/to?a=%2F#part");
            response.headers_mut().insert("location", target);
        }
        response
    })
    .await;
    let durable = durable(&database);
    let following = reqwest::Client::new();
    for bare in [following, reqwest_client()] {
        let client = with_middleware(bare.clone(), durable.clone());
        for status in [301, 302, 303, 307, 308] {
            let seen_before = server.count();
            let url = server.url(&format!("/from/{status}"));
            let without = in_time(bare.post(&url).body("x").send()).await.unwrap();
            let without = Got::of_reqwest(without).await;
            let seen_between = server.count();
            let with = in_time(client.post(&url).body("x").send()).await.unwrap();
            let with = Got::of_reqwest(with).await;

            // The date may have moved on in between.
            let dateless = |mut got: Got| {
                got.headers.retain(|(name, _)| name != "date");
                got
            };
            assert_eq!(dateless(without), dateless(with));
            let seen = server.seen();
            assert_eq!(seen[seen_before..seen_between], seen[seen_between..]);
        }
    }
}

#[tokio::test]
async fn the_url_of_a_response_is_remembered() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = durable(&database);
    let bare = reqwest_client();
    let url = server.url("/a/../b?c=%2f#part");
    let expected = in_time(bare.get(&url).send()).await.unwrap();
    let request = bare.get(&url).build().unwrap();
    let response = in_time(durable.await_response(request)).await.unwrap();
    let id = response.id();
    let response = reqwest::Response::from(response);
    assert_eq!(response.url(), expected.url());
    let stored = reqwest::Response::from(durable.response(id).await.unwrap());
    assert_eq!(stored.url(), expected.url());
}

#[tokio::test]
async fn a_failing_attempt_shows_no_query_of_any_url_on_its_way() {
    let database = migrated().await;
    let closed = closed_port().await;
    let server = Server::start(move |_, _| async move {
        let mut response = reply(307, "");
        let target = format!("http://{closed}/to?token=hunter2");
        response
            .headers_mut()
            .insert("location", target.parse().unwrap());
        response
    })
    .await;
    let client = with_middleware(reqwest::Client::new(), durable(&database));
    for url in [
        format!("http://{closed}/secret?token=hunter2#hunter3"),
        server.url("/from?token=hunter4"),
    ] {
        let error = in_time(client.post(url).send()).await.unwrap_err();
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }
    let leaks = "select count(*) from requeuest.outcomes where error like '%hunter%'";
    assert_eq!(count(&database, leaks).await, 0);
    let failures = "select count(*) from requeuest.outcomes where error_class = 'connect'";
    assert_eq!(count(&database, failures).await, 2);
}
