//! The crate sends what the caller gave it, and returns what came back.
//!
//! The tests here send the same random requests with and without the crate to a server that keeps
//! bytes, and compare. The modules below test what the random cases don't show.

mod bodies;
mod cases;
mod metadata;
mod raw;
mod target;

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::ext::ReasonPhrase;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{
    AcceptedResponse, Body, Durable, DurableBuilder, IdempotencyHeader, Options, Url, reqwest,
};
use tokio::runtime::Runtime;
use tower::{Layer, ServiceExt};

use crate::support::{self, hyper_client, in_time, migrated, with_middleware};

use cases::{Asked, Case};
use raw::RawServer;

/// Enough to draw each oddity several times in a few seconds.
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

    /// As stored: without the reason phrase, which is an extension of hyper's response.
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

/// Without the idempotency header, which the crate adds to requests by default.
fn plain_builder(database: &TestDatabase) -> DurableBuilder {
    support::builder(database).idempotency_header(IdempotencyHeader::none())
}

/// Sends every case without and with the crate. The server must see the same bytes, and the caller
/// must get the same response.
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

/// The `http` crate refuses some URLs that need escaping, and this crate all URLs that reqwest
/// would change. reqwest changes them.
fn fits_http(target: &str) -> bool {
    let url = Url::parse(&format!("http://a{target}")).unwrap();
    target.parse::<http::Uri>().is_ok() && &url[url::Position::BeforePath..] == target
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

/// A client like the crate's default transport.
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
    let service = plain_builder(&database)
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
    let _sender = plain_builder(&database)
        .transport(hyper_client::<Body>())
        .build()
        .unwrap();
    let service = plain_builder(&database)
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

#[test]
fn the_middleware_changes_nothing() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let client = with_middleware(bare.clone(), &plain_builder(&database).build().unwrap());
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
fn the_default_transport_sends_what_reqwest_sends() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let durable = plain_builder(&database).build().unwrap();
    drop(context);
    compare_with_reqwest(&runtime, &server, &bare, &durable, |got| got);
}

#[test]
fn another_process_sends_what_reqwest_sends() {
    let (runtime, database, server) = setting();
    let context = runtime.enter();
    let bare = reqwest_client();
    let _sender = plain_builder(&database).build().unwrap();
    let durable = plain_builder(&database).runner(false).build().unwrap();
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

/// Delays the request a little, so that a runner sends it instead of the caller.
fn soon() -> Options {
    Options::default().delay(Duration::from_millis(20))
}

/// Makes one attempt only, so that a mistake fails the test instead of being retried.
fn durable(database: &TestDatabase) -> Durable {
    plain_builder(database)
        .retry(RetryPolicy::none())
        .build()
        .unwrap()
}
