//! Bad input: each kind has its own typed error, and leaves nothing half-done.

mod bodies;
mod database;
mod refusals;
mod settings;
mod urls;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use requeuest::{
    Body, DeadLetterFilter, Durable, DurableService, Error, HeaderMap, MAX_HEADERS,
    MAX_HEADERS_LEN, MAX_URL_LEN, Options, Request, RequestId, Url, Uuid, reqwest,
};
use reqwest_middleware::ClientWithMiddleware;
use tower::{Layer, ServiceExt};

use crate::support::{
    Server, assert_nothing_persisted, builder, closed_port, eventually_rows, hyper_client, in_time,
    migrated, quick, rows, with_middleware,
};

fn layered<B>(durable: &Durable) -> DurableService<Client<HttpConnector, Body>, B> {
    durable.layer().layer(hyper_client())
}

fn middleware(durable: &Durable) -> ClientWithMiddleware {
    with_middleware(reqwest::Client::new(), durable)
}

fn of_middleware(error: &reqwest_middleware::Error) -> &Error {
    Error::from_middleware(error).unwrap_or_else(|| panic!("not an error of the crate: {error:?}"))
}

fn into_error(error: reqwest_middleware::Error) -> Error {
    match error {
        reqwest_middleware::Error::Middleware(error) => error.downcast().unwrap(),
        reqwest_middleware::Error::Reqwest(error) => panic!("{error:?}"),
    }
}

/// A `GET` request of the `http` crate, which takes relative URLs too.
fn get(url: impl AsRef<str>) -> http::Request<String> {
    http::Request::get(url.as_ref())
        .body(String::new())
        .unwrap()
}

fn assert_refused(error: &Error, field: &str) {
    assert!(error.is_request(), "{error:?}");
    assert_eq!(error.field(), Some(field), "{error:?}");
    assert_eq!(error.request_id(), None);
}

#[tokio::test]
async fn every_entry_point_refuses_a_url_that_is_not_absolute_http() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let client = middleware(&durable);
    for url in ["/relative", "*", "example.com", "ftp://example.com/"] {
        assert_refused(&durable.fire(get(url)).await.unwrap_err(), "url");
        assert_refused(&durable.await_response(get(url)).await.unwrap_err(), "url");
        let refused = durable.fire_in(database.pool(), get(url)).await;
        assert_refused(&refused.unwrap_err(), "url");
        let refused = in_time(layered(&durable).oneshot(get(url))).await;
        assert_refused(&refused.unwrap_err(), "url");
    }
    for url in ["ftp://example.com/", "mailto:a@example.com", "data:,x"] {
        let url = Url::parse(url).unwrap();
        let request = Request::get(url.clone(), HeaderMap::new());
        assert_refused(&durable.fire(&request).await.unwrap_err(), "url");
        let request = reqwest::Request::new(http::Method::GET, url);
        let refused = in_time(client.execute(request)).await;
        assert_refused(of_middleware(&refused.unwrap_err()), "url");
    }
    assert_nothing_persisted(&database).await;
}

#[tokio::test]
async fn every_entry_point_refuses_too_many_or_too_long_headers() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let client = middleware(&durable);
    let with = |count, len| {
        let mut request = get(server.url("/"));
        for _ in 0..count {
            let value = "x".repeat(len).parse().unwrap();
            request.headers_mut().append("a", value);
        }
        request
    };
    for (count, len, limit) in [
        (25_000, 1, "at most 1000 values, but have 25000"),
        (1001, 1, "at most 1000 values, but have 1001"),
        (
            1,
            MAX_HEADERS_LEN,
            "at most 262144 bytes long, but have 262145",
        ),
    ] {
        let request = || with(count, len);
        let mut refused = vec![
            durable.fire(request()).await.unwrap_err(),
            durable.await_response(request()).await.unwrap_err(),
            durable
                .fire_in(database.pool(), request())
                .await
                .unwrap_err(),
            durable.fire_many([request()]).await.unwrap_err(),
            in_time(layered(&durable).oneshot(request()))
                .await
                .unwrap_err(),
        ];
        let request = reqwest::Request::try_from(request()).unwrap();
        refused.push(into_error(client.execute(request).await.unwrap_err()));
        for error in refused {
            assert_refused(&error, "headers");
            assert!(error.to_string().contains(limit), "{error}");
        }
        let trailers = with(count, len).headers().clone();
        let body = Full::new(Bytes::from("x")).with_trailers(async { Some(Ok(trailers)) });
        let request = http::Request::post(server.url("/")).body(body).unwrap();
        let error = in_time(layered(&durable).oneshot(request)).await;
        let error = error.unwrap_err();
        assert_refused(&error, "trailers");
        assert!(error.to_string().contains(limit), "{error}");
    }
    assert_nothing_persisted(&database).await;
    for (count, len) in [(MAX_HEADERS, 1), (2, MAX_HEADERS_LEN / 2 - 1)] {
        durable.fire(with(count, len)).await.unwrap();
    }
}

#[tokio::test]
async fn urls_are_limited_to_8_kib() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let base = server.url("/");
    let longest = format!("{base}{}", "x".repeat(MAX_URL_LEN - base.len() - 1));
    let too_long = format!("{base}{}", "x".repeat(MAX_URL_LEN));

    assert_refused(&durable.fire(get(&too_long)).await.unwrap_err(), "url");
    let refused = in_time(layered(&durable).oneshot(get(&too_long))).await;
    assert_refused(&refused.unwrap_err(), "url");
    let refused = in_time(middleware(&durable).get(&too_long).send()).await;
    assert_refused(of_middleware(&refused.unwrap_err()), "url");
    // Longer than the `http` crate can express.
    let endless = Url::parse(&format!("{base}{}", "x".repeat(100_000))).unwrap();
    let refused = durable.fire(Request::get(endless, HeaderMap::new())).await;
    assert_refused(&refused.unwrap_err(), "url");
    assert_nothing_persisted(&database).await;

    let response = in_time(durable.await_response(get(&longest)))
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(server.url(&server.seen()[0].uri.to_string()), longest);
}

#[tokio::test]
async fn a_password_in_a_url_is_used_and_never_shown() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = builder(&database)
        .retry(quick().max_attempts(2))
        .build()
        .unwrap();
    let with_password = |addr| format!("http://user:hunter2@{addr}/path?token=hunter3");

    let request = Request::try_from(get(with_password(server.addr))).unwrap();
    assert!(request.url().contains("hunter2"));
    assert!(!format!("{request:?}").contains("hunter"), "{request:?}");
    in_time(durable.await_response(request)).await.unwrap();
    let by_url = Request::get(
        Url::parse(&with_password(server.addr)).unwrap(),
        HeaderMap::new(),
    );
    in_time(durable.await_response(&by_url)).await.unwrap();
    for seen in server.seen() {
        // user:hunter2
        assert_eq!(seen.headers["authorization"], "Basic dXNlcjpodW50ZXIy");
        assert_eq!(seen.uri, "/path?token=hunter3");
    }

    let closed = closed_port().await;
    let unreachable = with_password(closed);
    let mut errors = Vec::new();
    let failed = in_time(durable.await_response(get(&unreachable))).await;
    errors.push(failed.unwrap_err());
    // The errors of this client show the URL.
    let talkative = tower::service_fn(|request: http::Request<Body>| async move {
        let text = format!("no way to {} ({0})", request.uri());
        Err::<http::Response<Body>, _>(std::io::Error::other(text))
    });
    let failed = in_time(durable.layer().layer(talkative).oneshot(get(&unreachable))).await;
    errors.push(failed.unwrap_err());
    for error in errors {
        assert!(error.is_discarded());
        let mut shown = format!("{error} {error:?}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            shown = format!("{shown} {cause} {cause:?}");
            source = cause.source();
        }
        assert!(!shown.contains("hunter"), "{shown}");
        assert!(
            error.to_string().contains(&closed.ip().to_string())
                || error.to_string().contains("Connect")
        );
    }
    let failed = in_time(middleware(&durable).get(&unreachable).send()).await;
    let shown = failed.unwrap_err();
    assert!(
        !format!("{shown} {shown:?}").contains("hunter"),
        "{shown:?}"
    );
    for table in ["outcomes", "attempts"] {
        let texts = format!("{table} WHERE error LIKE '%refused%' OR error LIKE '%no way%'");
        assert_eq!(rows(&database, &texts).await, 3, "{table}");
        let leaks = format!("{table} WHERE error LIKE '%hunter%'");
        assert_eq!(rows(&database, &leaks).await, 0, "{table}");
    }
}

#[tokio::test]
async fn an_unknown_id_has_its_own_error() {
    let database = migrated().await;
    let durable = Durable::new(database.pool().clone());
    let id = RequestId::from(Uuid::now_v7());
    let error = in_time(durable.response(id)).await.unwrap_err();
    assert!(error.is_unknown_id(), "{error:?}");
    assert_eq!(error.request_id(), Some(id));
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    assert_eq!(durable.status(id).await.unwrap(), None);
}

#[tokio::test]
async fn a_refused_request_does_not_affect_others() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let durable = Durable::new(database.pool().clone());
    let (bad, good) = tokio::join!(
        durable.await_response(get("/relative")),
        durable.await_response(get(server.url("/"))),
    );
    assert_refused(&bad.unwrap_err(), "url");
    assert_eq!(good.unwrap().status(), 200);
    // Only the good request is there.
    eventually_rows(&database, "outcomes", 1).await;
}

#[tokio::test]
async fn a_framing_that_is_not_the_bodys_is_refused() {
    let database = migrated().await;
    let durable = builder(&database).build().unwrap();
    let server = Server::echo().await;
    let bad = [
        ("content-length", "3"),
        ("content-length", "5"),
        ("transfer-encoding", "gzip, chunked"),
    ];
    for (name, value) in bad {
        let request = || {
            let request = http::Request::post(server.url("/")).header(name, value);
            request.body("body".to_owned()).unwrap()
        };
        let refused = durable.fire(request()).await.unwrap_err();
        assert_refused(&refused, "headers");
        let refused = in_time(layered(&durable).oneshot(request())).await;
        assert_refused(&refused.unwrap_err(), "headers");
        let call = middleware(&durable).post(server.url("/")).body("body");
        let refused = in_time(call.header(name, value).send()).await;
        assert_refused(&into_error(refused.unwrap_err()), "headers");
    }
    assert_nothing_persisted(&database).await;
    assert_eq!(server.count(), 0);
    for (name, value) in [("content-length", "4"), ("transfer-encoding", "chunked")] {
        let request = http::Request::post(server.url("/")).header(name, value);
        let response = in_time(durable.await_response(request.body("body").unwrap())).await;
        assert_eq!(response.unwrap().text().unwrap(), "body", "{name}");
    }
}

/// Each of these is a statement where text becomes one.
const SQL: [&str; 4] = [
    "'; DROP TABLE requeuest.mq_msgs; --",
    "\"; DROP SCHEMA requeuest CASCADE; --",
    "\\'; SELECT pg_sleep(100); -- $1 $$ %s",
    "x'||(SELECT head FROM mq_payloads)||'",
];

#[tokio::test]
async fn text_that_is_sql_is_kept_and_sent_as_it_is() {
    let database = migrated().await;
    let server = Server::echo().await;
    for sql in SQL {
        let durable = builder(&database).channel(sql).build().unwrap();
        let options = Options::default()
            .key(sql)
            .ordered(sql)
            .supersede(sql)
            .limit_key(sql)
            .metadata(serde_json::json!({ sql: sql }));
        let request = || {
            let request = http::Request::post(server.url("/")).header("x-sql", sql);
            let request = request.body(sql).unwrap();
            Request::try_from(request).unwrap().with(options.clone())
        };
        let id = durable.fire(request()).await.unwrap();
        let response = in_time(durable.response(id)).await.unwrap();
        assert_eq!(response.body(), sql);
        assert_eq!(server.seen().last().unwrap().headers["x-sql"], sql);
        assert_eq!(durable.fire(request()).await.unwrap(), id);
        let other = http::Request::post(server.url("/")).body("x").unwrap();
        let other = Request::try_from(other).unwrap().with(options.clone());
        let refused = durable.fire(other).await.unwrap_err();
        assert!(refused.is_key_conflict(), "{refused}");
        let filter = DeadLetterFilter::default().channel(sql);
        assert!(durable.dead_letters(&filter).await.unwrap().is_empty());
    }
    assert_eq!(server.count(), SQL.len());
    assert_eq!(rows(&database, "outcomes").await, SQL.len() as i64);
}
