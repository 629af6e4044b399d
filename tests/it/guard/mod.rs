//! The guard against requests into the sender's own network: each known way round one.

mod doors;
mod proxies;
mod resolving;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use requeuest::guard::Guard;
use requeuest::testkit::TestDatabase;
use requeuest::{
    CircuitBreaker, DestinationPolicy, Durable, FailureClass, Guarantee, HeaderMap, Options,
    Redirects, Request, ReqwestTransport, Status, Url, Verdict,
};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::support::{Server, builder, handle, migrated, outcome_of, post, quick, reply};

/// A resolver that answers with these addresses in turn, and then with the last for ever.
#[derive(Clone)]
struct Answers {
    answers: Arc<Mutex<Vec<Vec<SocketAddr>>>>,
    asked: Arc<AtomicUsize>,
}

impl Answers {
    fn in_turn(answers: &[&[&str]]) -> Self {
        let parsed = |answer: &&[&str]| {
            let addresses = answer.iter();
            addresses
                .map(|ip| SocketAddr::new(ip.parse().unwrap(), 0))
                .collect()
        };
        Self {
            answers: Arc::new(Mutex::new(answers.iter().map(parsed).collect())),
            asked: Arc::default(),
        }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Resolve for Answers {
    fn resolve(&self, _: Name) -> Resolving {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mut answers = self.answers.lock().unwrap();
        let answer = if answers.len() > 1 {
            answers.remove(0)
        } else {
            answers[0].clone()
        };
        let addresses: Addrs = Box::new(answer.into_iter());
        Box::pin(async move { Ok(addresses) })
    }
}

/// A URL of the server by another host.
fn at(server: &Server, host: &str, path: &str) -> String {
    format!("http://{host}:{}{path}", server.addr.port())
}

fn guarded(database: &TestDatabase, guard: Guard) -> Durable {
    let builder = builder(database).retry(quick()).guard(guard);
    builder.build().unwrap()
}

/// Waits until the request is denied at an attempt, and returns the text of it.
async fn denied_at_an_attempt(durable: &Durable, id: requeuest::RequestId) -> String {
    let outcome = outcome_of(durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Discarded, 1)
    );
    let error = outcome.into_result().unwrap_err();
    assert_eq!(error.failure_class(), Some(FailureClass::Denied));
    assert!(error.is_denied() && !error.is_request());
    error.to_string()
}

/// The notations and forms that have led round other guards.
#[tokio::test]
async fn an_address_in_any_notation_or_form_is_refused_at_once() {
    let database = migrated().await;
    let durable = guarded(&database, Guard::new());
    for (way, hosts) in [
        ("literal", &["127.0.0.1", "10.0.0.1", "[::1]"][..]),
        ("mapped", &["[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]),
        ("compatible", &["[::127.0.0.1]", "[::a00:1]"]),
        ("translated", &["[::ffff:0:10.0.0.1]"]),
        ("NAT64", &["[64:ff9b::10.0.0.1]", "[64:ff9b:1::1]"]),
        ("6to4", &["[2002:7f00:1::]", "[2002:a9fe:a9fe::1]"]),
        (
            "Teredo",
            &["[2001:0:808:808::f5ff:fffe]", "[2001:0:a00:1::f7f7:f7f7]"],
        ),
        (
            "ISATAP",
            &["[2a00::5efe:10.0.0.1]", "[2a00::200:5efe:a00:1]"],
        ),
        (
            "link-local",
            &["169.254.0.1", "[fe80::1]", "[fe80:0:0:1::1]", "[febf::1]"],
        ),
        ("site-local", &["[fec0::1]"]),
        ("octal", &["0177.0.0.1", "0177.1", "017700000001"]),
        ("hex", &["0x7f.0.0.1", "0x7f000001", "0x7f.1"]),
        ("short", &["127.1", "127.0.1", "10.1"]),
        ("decimal", &["2130706433", "3232235521"]),
        ("percent-encoded", &["%31%32%37.0.0.1", "127%2e0.0.1"]),
        ("full-width", &["１２７.0.0.1", "127。0。0。1"]),
        ("multicast", &["224.0.0.1", "239.255.255.250", "[ff02::1]"]),
        ("this host", &["0.0.0.0", "0.1.2.3", "0", "[::]"]),
        ("broadcast", &["255.255.255.255", "240.0.0.1"]),
        ("carrier", &["100.64.0.1", "100.127.255.255"]),
        (
            "documentation",
            &["192.0.2.1", "198.51.100.1", "203.0.113.1", "[2001:db8::1]"],
        ),
        ("benchmarking", &["198.18.0.1", "[2001:2::1]"]),
        (
            "metadata",
            &["169.254.169.254", "100.100.100.200", "[fd00:ec2::254]"],
        ),
        (
            "trailing dot",
            &["127.0.0.1.", "0x7f.1.", "localhost.", "a.localhost"],
        ),
    ] {
        for host in hosts {
            let url = Url::parse(&format!("http://u:hunter2@{host}:81/hunter2?hunter2")).unwrap();
            let request = Request::get(url, HeaderMap::new());
            let error = durable.fire(request).await.unwrap_err();
            assert!(
                error.is_denied() && error.is_request(),
                "{way}: {host}: {error:?}"
            );
            assert_eq!(error.field(), Some("url"), "{way}: {host}");
            assert!(
                !format!("{error} {error:?}").contains("hunter2"),
                "{way}: {error:?}"
            );
        }
    }
    // No `Url` has such a host, and an `http::Uri` of one is refused too.
    for host in [
        "[127.0.0.1]",
        "[localhost]",
        "[fe80::1%25eth0]",
        "0177.1",
        "0x7f.1",
    ] {
        assert!(Url::parse(&format!("http://{host}/")).is_err() || !host.starts_with('['));
        if let Ok(request) = http::Request::get(format!("http://{host}/")).body("") {
            let error = durable.fire(request).await.unwrap_err();
            assert!(
                error.is_request() && error.field() == Some("url"),
                "{host}: {error:?}"
            );
        }
    }
    crate::support::assert_nothing_persisted(&database).await;
}

/// A row that was written without the guard: by an older release, another handle, or SQL.
#[tokio::test]
async fn an_address_is_denied_at_the_attempt_and_reaches_no_resolver() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let other = builder(&database).runner(false).build().unwrap();
    let address = other.fire(post(server.url("/hunter2"), "x")).await.unwrap();
    let resolver = Answers::in_turn(&[&["127.0.0.1"]]);
    let guard = Guard::new().resolve_with(resolver.clone());
    let durable = guarded(&database, guard);
    let text = denied_at_an_attempt(&durable, address).await;
    assert!(
        text.contains("the guard denies 127.0.0.1: a loopback address"),
        "{text}"
    );
    assert!(!text.contains("hunter2"), "{text}");
    assert_eq!((server.count(), resolver.asked()), (0, 0));
}

#[tokio::test]
async fn a_denied_attempt_counts_neither_for_nor_against_its_destination() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let url = at(&server, "a.example", "/");
    let breaker = CircuitBreaker::default().min_attempts(1);
    let policy = DestinationPolicy::default().circuit_breaker(breaker);
    let guard = Guard::new().resolve_with(Answers::in_turn(&[&["127.0.0.1"]]));
    let durable = builder(&database).guard(guard).destination("*", policy);
    let durable = durable.build().unwrap();
    let destination = durable.destination(url.trim_end_matches('/')).unwrap();
    for _ in 0..3 {
        let id = durable.fire(post(&url, "x")).await.unwrap();
        denied_at_an_attempt(&durable, id).await;
        // Each process reports once a second.
        crate::support::passing(&database, std::time::Duration::from_secs(1)).await;
        match destination.status().await {
            Ok(status) => assert_eq!((status.attempts, status.failures), (0, 0)),
            Err(error) => assert!(error.is_unknown_destination(), "{error:?}"),
        }
    }
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn a_classifier_can_have_a_denied_request_sent_again() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let answers = Answers::in_turn(&[&["127.0.0.2"], &["127.0.0.1"]]);
    let classifier = requeuest::classify::classify_fn(|attempt| match attempt.result() {
        Err(FailureClass::Denied) => Verdict::Retry,
        _ => attempt.default_verdict(),
    });
    let guard = Guard::new().allow("127.0.0.1").resolve_with(answers);
    let durable = builder(&database)
        .retry(quick())
        .guard(guard)
        .classify(classifier);
    let durable = durable.build().unwrap();
    let id = durable
        .fire(post(at(&server, "a.example", "/"), "x"))
        .await
        .unwrap();
    let outcome = outcome_of(&durable, id).await;
    assert_eq!(
        (outcome.status(), outcome.attempts()),
        (Status::Completed, 2)
    );
}

#[tokio::test]
async fn a_redirect_to_a_denied_address_is_not_followed() {
    let database = migrated().await;
    let secret = Server::always(200).await;
    for location in [
        secret.url("/latest/meta-data?hunter2"),
        at(&secret, "0x7f.1", "/"),
        at(&secret, "[::ffff:127.0.0.1]", "/"),
        at(&secret, "localhost", "/"),
        at(&secret, "b.example", "/"),
    ] {
        let receiver = Server::start({
            let location = location.clone();
            move |_, _| {
                let mut redirect = reply(307, "");
                redirect
                    .headers_mut()
                    .insert("location", location.parse().unwrap());
                async move { redirect }
            }
        })
        .await;
        // The receiver's name is allowed, and the address that it resolves to is not.
        let guard = Guard::new()
            .allow("a.example")
            .resolve_with(Answers::in_turn(&[&["127.0.0.1"]]));
        let durable = builder(&database)
            .guard(guard)
            .redirects(Redirects::follow(3))
            .build()
            .unwrap();
        let request = || post(at(&receiver, "a.example", "/"), "x");
        let id = durable.fire(request()).await.unwrap();
        let text = denied_at_an_attempt(&durable, id).await;
        assert!(
            text.contains("after a redirect") && text.contains("the guard denies"),
            "{text}"
        );
        assert!(
            !text.contains("hunter2") && !text.contains("latest"),
            "{text}"
        );
        // The receiver has the request, so it must not be sent twice.
        let once = Options::default().guarantee(Guarantee::AtMostOnce);
        let id = durable.fire(request().with(once)).await.unwrap();
        assert_eq!(outcome_of(&durable, id).await.status(), Status::Ambiguous);
        assert_eq!((receiver.count(), secret.count()), (2, 0), "{location}");
    }
}

/// The same redirect in a client of the caller's own, built with the guard's parts.
#[tokio::test]
async fn a_client_with_the_guards_parts_denies_names_and_redirects() {
    let database = migrated().await;
    let secret = Server::always(200).await;
    let location = secret.url("/hunter2");
    let receiver = Server::start(move |_, _| {
        let mut redirect = reply(307, "");
        redirect
            .headers_mut()
            .insert("location", location.parse().unwrap());
        async move { redirect }
    })
    .await;
    let resolver = Answers::in_turn(&[&["127.0.0.1"]]);
    let guard = Guard::new().allow("a.example").resolve_with(resolver);
    let client = reqwest::Client::builder()
        .no_proxy()
        .dns_resolver(guard.resolver().unwrap())
        .redirect(guard.redirect_policy(3).unwrap())
        .build()
        .unwrap();
    let durable = builder(&database)
        .guard(guard)
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    for host in ["a.example", "b.example"] {
        let id = durable
            .fire(post(at(&receiver, host, "/"), "x"))
            .await
            .unwrap();
        let text = denied_at_an_attempt(&durable, id).await;
        assert!(
            text.contains("the guard denies") && !text.contains("hunter2"),
            "{text}"
        );
    }
    assert_eq!((receiver.count(), secret.count()), (1, 0));
}

/// reqwest sends credentials with the second request to another origin.
#[tokio::test]
async fn a_client_with_the_guards_parts_follows_no_redirect_within_another_origin() {
    let database = migrated().await;
    let redirecting = |location: String| {
        Server::start(move |_, _| {
            let mut redirect = reply(307, "");
            redirect
                .headers_mut()
                .insert("location", location.parse().unwrap());
            async move { redirect }
        })
    };
    let other = redirecting("/again".to_owned()).await;
    let receiver = redirecting(other.url("/hop")).await;
    let guard = Guard::new().allow("127.0.0.1");
    let client = reqwest::Client::builder()
        .no_proxy()
        .redirect(guard.redirect_policy(10).unwrap())
        .build()
        .unwrap();
    let durable = builder(&database)
        .guard(guard)
        .transport(ReqwestTransport::new(client))
        .build()
        .unwrap();
    let mut request = Request::get(receiver.url("/").parse().unwrap(), HeaderMap::new());
    let secret = "hunter2".parse().unwrap();
    request.headers_mut().insert("authorization", secret);
    let response = durable.await_response(request).await.unwrap();
    assert_eq!(response.status(), 307);
    assert_eq!((receiver.count(), other.count()), (1, 1));
    assert!(!other.seen()[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn the_webhooks_preset_has_a_guard_and_other_handles_have_none() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let request = || post(server.url("/"), "x");
    let preset = builder(&database).webhooks().runner(false).build().unwrap();
    assert!(preset.fire(request()).await.unwrap_err().is_denied());
    let without = builder(&database).webhooks().guard(None).runner(false);
    without.build().unwrap().fire(request()).await.unwrap();
    let plain = handle(&database);
    let id = plain.fire(request()).await.unwrap();
    assert_eq!(outcome_of(&plain, id).await.status(), Status::Completed);
}

#[tokio::test]
async fn a_guard_that_can_not_work_is_refused_by_build() {
    let database = migrated().await;
    let client = || ReqwestTransport::new(reqwest::Client::new());
    let proxied = || Guard::new().trust_proxy("http://smokescreen.example:4750");
    for (builder, field, reason) in [
        (
            builder(&database).guard(Guard::new().allow("10.0.0.0/33")),
            "guard",
            "10.0.0.0/33",
        ),
        (
            builder(&database).guard(Guard::new().deny("10.0.0.1/8")),
            "guard",
            "10.0.0.1/8",
        ),
        (
            builder(&database).guard(Guard::new().allow("*")),
            "guard",
            "`*`",
        ),
        (
            builder(&database).guard(Guard::new().trust_proxy("ftp://a")),
            "guard",
            "the proxy",
        ),
        (
            builder(&database).guard(proxied()).transport(client()),
            "guard",
            "trusts a proxy",
        ),
        (
            builder(&database)
                .redirects(Redirects::follow(1))
                .transport(client()),
            "redirects",
            "a client of your own",
        ),
        (
            builder(&database).redirects(Redirects::follow(21)),
            "redirects",
            "at most 20",
        ),
    ] {
        let error = builder.build().unwrap_err();
        assert!(
            error.is_config() && error.field() == Some(field),
            "{error:?}"
        );
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(proxied().resolver().is_err_and(|error| error.is_config()));
}
