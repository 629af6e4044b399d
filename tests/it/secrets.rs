//! Secrets show nowhere: each field of a request and of a response holds one, and a test looks for
//! all of them in what a program can print, in the logs of every crate at `trace`, in the spans and
//! events of every crate as a `tracing` subscriber sees them, and in the tables that are not meant
//! to hold them.

mod hooked;
mod subscriber;

use std::error::Error as StdError;
use std::fmt::Debug;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode};
use requeuest::classify::classify_fn;
use requeuest::migrate::Migrator;
use requeuest::{
    Body, DeadLetterFilter, Durable, DurableBuilder, Error, Options, Outcome, Request, Uuid,
    Verdict, outcome_fn,
};
use serde_json::json;
use sqlx::postgres::PgListener;
use sqlx::{Executor, PgConnection, PgPool};
use tower::service_fn;
use tracing::Instrument;

use self::hooked::OF_HOOKS;
use crate::logs::{Output, application_pool, variable};
use crate::support::{
    LONG, Server, builder, closed_port, eventually, in_time, migrated, other_process, outcome_of,
    part, plays, quick, reply, with_middleware,
};

/// Begins each secret, whose rest names the field.
const CANARY: &str = "knry-";
/// The same as it begins in Base64, in the hexadecimal text of bytes, and in a list of bytes.
const ENCODED: [&str; 3] = ["a25yeS", "6b6e72792d", "107, 110, 114, 121, 45"];

/// The URL of a path on this server, with secrets in its other parts and behind the path.
fn url(authority: &str, path: &str) -> String {
    format!("http://knry-user:knry-password@{authority}{path}/knry-path?token=knry-query")
}

fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in [
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
    ] {
        headers.insert(name, format!("knry-{name}").parse().unwrap());
    }
    let mut marked = HeaderValue::from_static("knry-marked");
    marked.set_sensitive(true);
    headers.insert("x-marked", marked);
    headers
}

/// A request whose every field holds a secret.
fn request(authority: &str, path: &str) -> Request {
    let mut request = http::Request::post(url(authority, path))
        .body("knry-body")
        .unwrap();
    *request.headers_mut() = headers();
    let options = Options::default().metadata(json!({ "note": "knry-metadata" }));
    Request::try_from(request).unwrap().with(options)
}

/// The same with a header that only the handle knows to be secret.
fn named(authority: &str, path: &str) -> Request {
    let mut request = request(authority, path);
    let value = HeaderValue::from_static("knry-named");
    request.headers_mut().insert("x-partner", value);
    request
}

/// Answers with secrets: 503 below `/busy`, with a token below `/token`, else 200.
async fn receiver() -> Server {
    Server::start(|_, seen| async move {
        if seen.uri.path().starts_with("/token") {
            return reply(
                200,
                r#"{"access_token":"knry-token","token_type":"Bearer"}"#,
            );
        }
        let status = if seen.uri.path().starts_with("/busy") {
            503
        } else {
            200
        };
        let mut response = reply(status, "knry-response".repeat(20));
        for name in ["set-cookie", "x-api-key", "x-partner"] {
            let value = format!("knry-response-{name}").parse().unwrap();
            response.headers_mut().append(name, value);
        }
        response
    })
    .await
}

/// Prints a value in each way.
fn show(what: &str, value: &impl Debug) {
    println!("{what}: {value:?} {value:#?}");
}

/// Prints an error and its sources in each way.
fn show_error(what: &str, error: Error) {
    println!("{what}: {error} {error:#}");
    show(what, &error);
    if let Some((_, headers)) = error.response_head() {
        show(what, headers);
    }
    let mut source = error.source();
    while let Some(cause) = source {
        println!("{what}: {cause} {cause:?} {cause:#?}");
        source = cause.source();
    }
    let error = anyhow::Error::new(error);
    println!("{what}: {error:#} {error:?}");
    assert!(format!("{error}").len() < 4096, "{what}");
}

/// Where a text shows a secret.
fn leaks(text: &str) -> Vec<&str> {
    let shows = |line: &&str| {
        let lower = line.to_lowercase();
        lower.contains(CANARY) || ENCODED.iter().any(|encoded| line.contains(encoded))
    };
    text.lines().filter(shows).collect()
}

#[tokio::test]
async fn no_secret_shows_in_what_a_program_prints_logs_or_stores_elsewhere() {
    search("log").await;
}

#[tokio::test]
async fn no_secret_shows_in_the_spans_and_events_of_a_tracing_subscriber() {
    search("tracing").await;
}

/// Has a program show everything, with its logs printed by this crate.
async fn search(logs: &str) {
    let database = migrated().await;
    let server = receiver().await;
    let variables = [
        ("RUST_LOG", "trace".to_owned()),
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.addr.to_string()),
        ("REQUEUEST_TEST_LOGS", logs.to_owned()),
    ];
    let part = part(module_path!(), "show_everything");
    let output = Output::of_part(part, &variables).await;
    // The receiver got what it should get.
    let seen = server.seen();
    assert!(seen.len() > 5, "{}", seen.len());
    assert!(seen.iter().any(|seen| {
        seen.headers
            .get("x-partner")
            .is_some_and(|it| it == "knry-named")
    }));
    let signed = seen.iter().filter(|seen| {
        let is = |name: &str, value: &str| seen.headers.get(name).is_some_and(|it| it == value);
        is("authorization", "Bearer knry-token")
            && is("x-signed", "knry-hook-secret")
            && seen.headers.contains_key("webhook-signature")
    });
    assert!(signed.count() >= 2);

    assert_eq!(leaks(&output.printed), [""; 0]);
    let logged = output.logged.join("\n");
    for crate_of_line in ["requeuest", "sqlx", "hyper_util", "reqwest"] {
        assert!(logged.contains(crate_of_line), "no line of {crate_of_line}");
    }
    if logs == "tracing" {
        for seen in ["] span call", "] event event"] {
            assert!(logged.contains(seen), "no {seen}");
        }
    }
    assert_eq!(leaks(&logged), [""; 0]);

    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class
         WHERE relnamespace = 'requeuest'::regnamespace AND relkind = 'r'",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    assert!(tables.len() > 20, "{tables:?}");
    for table in tables {
        // What requests and responses are kept in.
        let meant = match &*table {
            "mq_payloads" => "- '{head,body,metadata,response_head,response_body}'::text[]",
            table if table.starts_with("outcomes") => "- '{head,body,metadata}'::text[]",
            _ => "",
        };
        let whole = format!("SELECT lower(t::text) FROM requeuest.{table} t");
        let whole: Vec<String> = sqlx::query_scalar(&whole)
            .fetch_all(database.pool())
            .await
            .unwrap();
        for secret in OF_HOOKS {
            let found = whole.iter().find(|row| row.contains(secret));
            assert_eq!(found, None, "{table}");
        }
        let rows = format!("SELECT (to_jsonb(t) {meant})::text FROM requeuest.{table} t");
        let rows: Vec<String> = sqlx::query_scalar(&rows)
            .fetch_all(database.pool())
            .await
            .unwrap();
        assert_eq!(leaks(&rows.join("\n")), [""; 0], "{table}");
    }
    let kept = "SELECT string_agg(head, ' ') FROM requeuest.mq_payloads";
    let kept: String = sqlx::query_scalar(kept)
        .fetch_one(database.pool())
        .await
        .unwrap();
    for field in [
        "user",
        "path",
        "query",
        "authorization",
        "cookie",
        "x-api-key",
    ] {
        assert!(kept.contains(&format!("knry-{field}")), "no {field}");
    }
    let longest = "SELECT max(octet_length(error)) FROM (
            SELECT error FROM requeuest.attempts UNION ALL SELECT error FROM requeuest.outcomes
            UNION ALL SELECT error FROM requeuest.unhandled
        ) e";
    let longest: Option<i32> = sqlx::query_scalar(longest)
        .fetch_one(database.pool())
        .await
        .unwrap();
    assert!((2000..=2048).contains(&longest.unwrap()), "{longest:?}");
}

fn named_builder(pool: &PgPool) -> DurableBuilder {
    Durable::builder(pool.clone())
        .redact_headers(["X-Partner"])
        .retry(quick().max_attempts(2))
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn show_everything() {
    if !plays("show_everything") {
        return;
    }
    if variable("REQUEUEST_TEST_LOGS") == "tracing" {
        subscriber::subscribe();
    }
    env_logger::init();
    // Rust's own hook prints the text of each panic.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("panicked at {:?}", panic.location());
    }));
    let pool = application_pool().await;
    let authority = variable("REQUEUEST_TEST_SERVER");
    let options = (*pool.connect_options()).clone().password("knry-database");
    show("migrator", &Migrator::new().connect_options(options));
    show("builder", &named_builder(&pool));
    show("request", &request(&authority, ""));
    show("options", request(&authority, "").options());

    let durable = named_builder(&pool).build().unwrap();
    show("durable", &durable);
    let call = tracing::info_span!("call");
    answers(&durable, &authority).instrument(call).await;
    refusals(&durable, &pool, &authority).await;
    in_time(durable.shutdown(LONG)).await.unwrap();
    faults(&pool, &authority).await;
    hooks(&pool, &authority).await;
    hooked::attempts(&pool, &authority).await;
    damage(&pool, &authority).await;
}

/// Requests that are answered, and given up.
async fn answers(durable: &Durable, authority: &str) {
    let response = in_time(durable.await_response(named(authority, ""))).await;
    let response = response.unwrap();
    show("outcome", &outcome_of(durable, response.id()).await);
    show("response", &response);
    show(
        "stored",
        &in_time(durable.response(response.id())).await.unwrap(),
    );
    show("http", &http::Response::<Body>::from(response));

    let id = durable.fire(named(authority, "/busy")).await.unwrap();
    show("given up", &outcome_of(durable, id).await);
    let all = DeadLetterFilter::default();
    show("dead letters", &durable.dead_letters(&all).await.unwrap());
    let id = in_time(durable.replay(id)).await.unwrap();
    show("replayed", &outcome_of(durable, id).await);

    let down = closed_port().await.to_string();
    let failed = in_time(durable.await_response(named(&down, ""))).await;
    show_error("refused", failed.unwrap_err());
    let id = durable.fire(named(&down, "")).await.unwrap();
    let outcome = outcome_of(durable, id).await;
    show("fired", &outcome);
    show_error("fired", outcome.into_result().unwrap_err());
    show("dead letters", &durable.dead_letters(&all).await.unwrap());
}

/// Requests that are not persisted.
async fn refusals(durable: &Durable, pool: &PgPool, authority: &str) {
    for bad in [
        "ftp://knry-user:knry-pass@h/knry-path",
        "/knry-path?knry-query",
    ] {
        let request = http::Request::post(bad).body("x").unwrap();
        show_error("bad URL", Request::try_from(request).unwrap_err());
    }
    let of = |key: &str, path: &str| {
        let request = request(authority, path);
        let options = request.options().clone().key(key).delay(LONG);
        request.with(options)
    };
    durable.fire(of("key", "/a")).await.unwrap();
    show_error("conflict", durable.fire(of("key", "/b")).await.unwrap_err());
    // The DETAIL of these errors has the whole row.
    pool.execute(
        "ALTER TABLE requeuest.mq_payloads ADD CONSTRAINT none CHECK (head IS NULL) NOT VALID",
    )
    .await
    .unwrap();
    show_error("row", durable.fire(named(authority, "")).await.unwrap_err());
    show_error("row", durable.fire(of("other", "")).await.unwrap_err());
    let error = durable.fire_in(pool, named(authority, "")).await;
    show_error("row", error.unwrap_err());
    let many = [named(authority, ""), named(authority, "")];
    show_error("row", durable.fire_many(many).await.unwrap_err());
    pool.execute("ALTER TABLE requeuest.mq_payloads DROP CONSTRAINT none")
        .await
        .unwrap();
}

/// An error whose text is long, and whose debug text has more than its text.
#[derive(Debug)]
#[expect(dead_code, reason = "shown by `Debug`")]
struct Verbose {
    url: String,
}

impl std::fmt::Display for Verbose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&"it failed ".repeat(1000))
    }
}

impl StdError for Verbose {}

/// Clients that fail in their own ways, and hooks that panic.
async fn faults(pool: &PgPool, authority: &str) {
    let client = service_fn(|request: http::Request<Body>| async move {
        let url = request.uri().to_string();
        match request.uri().path().get(..5) {
            Some("/text") => Err(Box::<dyn StdError + Send + Sync>::from(format!("no {url}"))),
            Some("/long") => Err(Verbose { url }.into()),
            Some("/pani") => panic!("no way to {url}"),
            _ => Ok(reply(418, "knry-response".repeat(20))),
        }
    });
    let shown = authority.to_owned();
    let durable = named_builder(pool)
        .channel("faults")
        .transport(client)
        .max_response_body(100)
        .classify(classify_fn(move |attempt| match attempt.result() {
            Ok((StatusCode::IM_A_TEAPOT, _)) if attempt.number() > 1 => {
                panic!("no class for {}", url(&shown, ""))
            }
            Ok(_) => Verdict::Retry,
            Err(_) => attempt.default_verdict(),
        }))
        .build()
        .unwrap();
    for path in ["/text", "/long", "/panic", "/large"] {
        let failed = in_time(durable.await_response(named(authority, path))).await;
        show_error(path, failed.unwrap_err());
    }
    let all = DeadLetterFilter::default();
    show("dead letters", &durable.dead_letters(&all).await.unwrap());
    in_time(durable.shutdown(LONG)).await.unwrap();
}

/// Code of the application that sees requests and outcomes.
async fn hooks(pool: &PgPool, authority: &str) {
    let durable = named_builder(pool)
        .channel("hooks")
        .max_handler_failures(1)
        .pass_through(|head| {
            show("head", head);
            false
        })
        .build()
        .unwrap();
    let handler = outcome_fn(async |_: &mut PgConnection, outcome: &Outcome| {
        show("handled", outcome);
        Err::<(), _>(std::io::Error::other(format!(
            "no way to {}",
            url("host", "")
        )))
    });
    let handler = durable.on_outcome("hooks", handler).await.unwrap();
    let client = with_middleware(reqwest::Client::new(), &durable);
    let call = client
        .post(url(authority, ""))
        .headers(headers())
        .body("knry-body");
    in_time(call.send()).await.unwrap();
    eventually("the handler has failed", || async {
        !durable.failed_hand_overs(None).await.unwrap().is_empty()
    })
    .await;
    show("failed", &durable.failed_hand_overs(None).await.unwrap());
    drop(handler);
    in_time(durable.shutdown(LONG)).await.unwrap();
}

/// A row that can't be read.
async fn damage(pool: &PgPool, authority: &str) {
    let durable = named_builder(pool).channel("damage").build().unwrap();
    let idle = named_builder(pool)
        .channel("damage")
        .runner(false)
        .build()
        .unwrap();
    let later = named(authority, "");
    let options = later.options().clone().delay(Duration::from_secs(1));
    let id = idle.fire(later.with(options)).await.unwrap();
    sqlx::query("UPDATE requeuest.mq_payloads SET head = '{' || head WHERE id = $1")
        .bind(requeuest::Uuid::from(id))
        .execute(pool)
        .await
        .unwrap();
    eventually("the request is parked", || async {
        let parked = durable.parked(None).await.unwrap();
        show("parked", &parked);
        !parked.is_empty()
    })
    .await;
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test]
async fn notifications_hold_ids_and_nothing_of_a_request() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let runner = builder(&database).build().unwrap();
    let idle = other_process(&database).await;
    let mut listener = PgListener::connect_with(database.pool()).await.unwrap();
    listener.listen_all(["mq", "mq_default"]).await.unwrap();
    let request = named(&server.addr.to_string(), "");
    let id = idle.fire_in(database.pool(), request).await.unwrap();
    for _ in 0..2 {
        let notified = in_time(listener.recv()).await.unwrap();
        assert_eq!(notified.payload(), "");
    }
    let awaited = tokio::spawn(async move { idle.response(id).await });
    let waiter = "SELECT waiter FROM requeuest.mq_msgs WHERE waiter IS NOT NULL";
    let mut channel = None;
    while channel.is_none() {
        let found: Option<Uuid> = sqlx::query_scalar(waiter)
            .fetch_optional(database.pool())
            .await
            .unwrap();
        channel = found.map(|waiter| format!("requeuest_{}", waiter.simple()));
        tokio::task::yield_now().await;
    }
    listener.listen(&channel.unwrap()).await.unwrap();
    gate.add_permits(10);
    let notified = in_time(listener.recv()).await.unwrap();
    assert_eq!(notified.payload(), id.to_string());
    in_time(awaited).await.unwrap().unwrap();
    in_time(runner.shutdown(LONG)).await.unwrap();
}
