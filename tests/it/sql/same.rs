//! `requeuest.fire`, `Durable::fire_in` and `Durable::statement` store the same rows and refuse the
//! same requests.

use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use requeuest::retry::{Jitter, RetryPolicy};
use requeuest::{
    AcceptedResponse, Durable, Guarantee, IdempotencyHeader, Options, Priority, Request, Uuid,
};
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::of_postgres;
use crate::support::migrated;

/// One request, for both languages.
#[derive(Clone, Debug)]
struct Case {
    method: String,
    url: String,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
    sql: Value,
    rust: Options,
}

fn case(method: &str, url: &str) -> Case {
    Case {
        method: method.to_owned(),
        url: url.to_owned(),
        headers: Vec::new(),
        body: None,
        sql: json!({}),
        rust: Options::default(),
    }
}

fn with(sql: Value, rust: Options) -> Case {
    Case {
        sql,
        rust,
        ..case("POST", "https://a.example/b")
    }
}

fn headed(headers: &[(&str, &str)], body: &str) -> Case {
    let headers = headers.iter();
    Case {
        headers: headers
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect(),
        body: Some(body.into()),
        ..case("POST", "https://a.example/b")
    }
}

impl Case {
    /// `None`: the types of http refuse it.
    fn request(&self) -> Option<Result<Request, requeuest::Error>> {
        let mut request = http::Request::builder()
            .method(&*self.method)
            .uri(&*self.url);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        Some(match &self.body {
            Some(body) => Request::from_http_body(request.body(body.clone()).ok()?),
            None => Request::from_http_empty(request.body(()).ok()?),
        })
    }
}

/// What is stored of a request, without its id and the time.
const STORED: &str = "
    SELECT jsonb_build_array(
        to_jsonb(m) - '{id,attempt_at,created_at,seq,deadline}'::text[], m.seq IS NOT NULL,
        round(extract(epoch FROM m.attempt_at - m.created_at), 1),
        round(extract(epoch FROM m.deadline - m.created_at), 1),
        p.name, replace(p.head, p.id::text, 'ID'), p.body::text, p.metadata,
        (SELECT jsonb_build_array(k.key, k.channel_name, k.fingerprint::text)
         FROM requeuest.request_keys k WHERE k.id = m.id)
    )
    FROM requeuest.mq_msgs m JOIN requeuest.mq_payloads p USING (id) WHERE m.id = $1";

/// The stored rows, or the text of the error and its field.
type Stored = Result<Value, (String, Option<String>)>;

async fn stored(connection: &mut PgConnection, id: Uuid) -> Value {
    sqlx::query_scalar::<_, sqlx::types::JsonValue>(STORED)
        .bind(id)
        .fetch_one(connection)
        .await
        .unwrap()
}

async fn by_rust(
    durable: &Durable,
    request: Result<Request, requeuest::Error>,
    options: &Options,
) -> Stored {
    let mut transaction = durable.pool().begin().await.unwrap();
    let fired = match request {
        Ok(request) => {
            let request = request.with(options.clone());
            durable.fire_in(&mut *transaction, request).await
        }
        Err(error) => Err(error),
    };
    let stored = match fired {
        Ok(id) => Ok(stored(&mut transaction, id.into()).await),
        Err(error) => Err((error.to_string(), error.field().map(Into::into))),
    };
    transaction.rollback().await.unwrap();
    stored
}

/// As for another driver.
async fn by_statement(
    durable: &Durable,
    request: Result<Request, requeuest::Error>,
    options: &Options,
) -> Stored {
    let stated = request.and_then(|request| durable.statement(&request.with(options.clone())));
    let statement = match stated {
        Ok(statement) => statement,
        Err(error) => return Err((error.to_string(), error.field().map(Into::into))),
    };
    let mut transaction = durable.pool().begin().await.unwrap();
    let (request, body) = statement.parameters();
    let id: Uuid = sqlx::query_scalar(statement.sql())
        .bind(request)
        .bind(body)
        .fetch_one(&mut *transaction)
        .await
        .unwrap();
    assert_eq!(statement.id(), id.into());
    let stored = stored(&mut transaction, id).await;
    transaction.rollback().await.unwrap();
    Ok(stored)
}

async fn by_sql(durable: &Durable, case: &Case) -> Stored {
    let mut transaction = durable.pool().begin().await.unwrap();
    let fired: Result<Uuid, _> =
        sqlx::query_scalar("SELECT requeuest.fire($1, $2, $3::text::jsonb, $4, $5::text::jsonb)")
            .bind(&case.method)
            .bind(&case.url)
            .bind(json!(case.headers).to_string())
            .bind(&case.body)
            .bind(case.sql.to_string())
            .fetch_one(&mut *transaction)
            .await;
    let stored = match fired {
        Ok(id) => Ok(stored(&mut transaction, id).await),
        Err(error) => {
            let error = of_postgres(&error);
            assert_eq!(error.code(), "22023", "{case:?}: {error:?}");
            assert!(
                error.hint().is_some_and(|hint| hint.ends_with('.')),
                "{error:?}"
            );
            Err((error.message().to_owned(), error.column().map(Into::into)))
        }
    };
    transaction.rollback().await.unwrap();
    stored
}

async fn assert_same(durable: &Durable, case: &Case) -> bool {
    let sql = by_sql(durable, case).await;
    if let Some(request) = case.request() {
        let rust = by_rust(durable, request, &case.rust).await;
        assert_eq!(sql, rust, "left: SQL, right: Rust, {case:?}");
        let request = case.request().unwrap();
        let stated = by_statement(durable, request, &case.rust).await;
        assert_eq!(stated, rust, "left: a statement, {case:?}");
        rust.is_ok()
    } else {
        let (text, field) = sql.expect_err(&format!("{case:?}"));
        assert!(field.is_some(), "{text}");
        false
    }
}

#[expect(clippy::too_many_lines, reason = "a list of cases")]
fn corpus() -> Vec<Case> {
    let options = Options::default;
    let seconds = Duration::from_secs;
    let century = seconds(101 * 366 * 24 * 3600);
    let policy = RetryPolicy::exponential;
    let long = "x".repeat(256);
    let nested = |depth: usize| (0..depth).fold(json!(1), |value, _| json!([value]));
    let mut cases = vec![
        with(json!({}), options()),
        with(json!({"channel": "billing"}), options().channel("billing")),
        with(
            json!({"channel": null, "key": null, "retry": null, "metadata": null}),
            options(),
        ),
        with(json!({"channel": ""}), options().channel("")),
        with(
            json!({"channel": "x".repeat(56)}),
            options().channel("x".repeat(56)),
        ),
        with(json!({"ordered": "é|o"}), options().ordered("é|o")),
        with(
            json!({"ordered": "o", "halt_on_discard": true}),
            options().ordered("o").halt_on_discard(),
        ),
        with(
            json!({"halt_on_discard": true}),
            options().halt_on_discard(),
        ),
        with(json!({"ordered": ""}), options().ordered("")),
        with(json!({"ordered": long}), options().ordered(&*long)),
        with(json!({"key": "k"}), options().key("k")),
        with(json!({"key": ""}), options().key("")),
        with(json!({"key": long}), options().key(&*long)),
        with(
            json!({"key": "k", "key_owner": "me"}),
            options().key("k").key_owner("me"),
        ),
        with(json!({"key_owner": long}), options().key_owner(&*long)),
        with(json!({"supersede": "s"}), options().supersede("s")),
        with(json!({"supersede": ""}), options().supersede("")),
        with(
            json!({"limit_key": "tenant \"7\""}),
            options().limit_key("tenant \"7\""),
        ),
        with(
            json!({"limit_key": "t", "ordered": "o"}),
            options().limit_key("t").ordered("o"),
        ),
        with(json!({"limit_key": ""}), options().limit_key("")),
        with(json!({"limit_key": long}), options().limit_key(&*long)),
        with(json!({"limit_key": "a://b"}), options().limit_key("a://b")),
        with(json!({"delay": "1 hour"}), options().delay(seconds(3600))),
        with(
            json!({"delay": "101 years 9 mons"}),
            options().delay(century),
        ),
        with(
            json!({"delay": "2 s", "deadline": "00:01:00"}),
            options().delay(seconds(2)).deadline(seconds(60)),
        ),
        with(json!({"deadline": "0 s"}), options().deadline(seconds(0))),
        with(
            json!({"delay": "2 s", "deadline": "2 s"}),
            options().delay(seconds(2)).deadline(seconds(2)),
        ),
        with(
            json!({"deadline": "200 years"}),
            options().deadline(century),
        ),
        with(
            json!({"attempt_timeout": "1.5 s"}),
            options().attempt_timeout(Duration::from_millis(1500)),
        ),
        with(
            json!({"attempt_timeout": "0"}),
            options().attempt_timeout(seconds(0)),
        ),
        with(
            json!({"attempt_timeout": "200 years"}),
            options().attempt_timeout(century),
        ),
        with(
            json!({"guarantee": "at_most_once"}),
            options().guarantee(Guarantee::AtMostOnce),
        ),
        with(json!({"guarantee": "at_least_once"}), options()),
        with(
            json!({"priority": "high"}),
            options().priority(Priority::High),
        ),
        with(
            json!({"priority": "low"}),
            options().priority(Priority::Low),
        ),
        with(json!({"priority": "normal"}), options()),
        with(
            json!({"idempotency_header": "bare"}),
            options().idempotency_header(IdempotencyHeader::bare()),
        ),
        with(
            json!({"idempotency_header": "none"}),
            options().idempotency_header(IdempotencyHeader::none()),
        ),
        with(
            json!({"accept": [404, [200, 204], "success", "any"]}),
            options().accept([
                AcceptedResponse::Status(404),
                AcceptedResponse::Range(200, 204),
                AcceptedResponse::Success,
                AcceptedResponse::Any,
            ]),
        ),
        with(
            json!({"accept": []}),
            options().accept([] as [AcceptedResponse; 0]),
        ),
        with(
            json!({"metadata": {"a": [1, "x  \"y\\", null, 1.5], "b": {}}}),
            options().metadata(json!({"a": [1, "x  \"y\\", null, 1.5], "b": {}})),
        ),
        with(
            json!({"metadata": "é".repeat(2047)}),
            options().metadata("é".repeat(2047)),
        ),
        with(
            json!({"metadata": "é".repeat(2048)}),
            options().metadata("é".repeat(2048)),
        ),
        with(
            json!({"metadata": nested(100)}),
            options().metadata(nested(100)),
        ),
        with(
            json!({"metadata": nested(101)}),
            options().metadata(nested(101)),
        ),
        with(
            json!({"retry": "none"}),
            options().retry(RetryPolicy::none()),
        ),
        with(
            json!({"retry": "webhooks"}),
            options().retry(RetryPolicy::webhooks()),
        ),
        with(json!({"retry": {}}), options().retry(policy())),
        with(
            json!({"retry": {
                "base": "250 ms", "factor": 1.5, "cap": "1 min", "jitter": "equal",
                "max_age": "1 day", "max_attempts": 7, "max_retry_after": "10 min",
            }}),
            options().retry(
                policy()
                    .base(Duration::from_millis(250))
                    .factor(1.5)
                    .cap(seconds(60))
                    .jitter(Jitter::Equal)
                    .max_age(seconds(86400))
                    .max_attempts(7)
                    .max_retry_after(seconds(600)),
            ),
        ),
        with(
            json!({"retry": {"schedule": ["1 s", "2 min"], "max_attempts": 2}}),
            options().retry(RetryPolicy::schedule([seconds(1), seconds(120)]).max_attempts(2)),
        ),
        with(
            json!({"retry": {"constant": "10 ms", "jitter": "full"}}),
            options().retry(RetryPolicy::constant(Duration::from_millis(10)).jitter(Jitter::Full)),
        ),
        with(
            json!({"retry": {"schedule": []}}),
            options().retry(RetryPolicy::schedule([])),
        ),
        with(
            json!({"retry": {"schedule": vec!["1 s"; 1001]}}),
            options().retry(RetryPolicy::schedule([seconds(1); 1001])),
        ),
        with(
            json!({"retry": {"schedule": ["0"]}}),
            options().retry(RetryPolicy::schedule([seconds(0)])),
        ),
        with(
            json!({"retry": {"schedule": ["200 years"]}}),
            options().retry(RetryPolicy::schedule([century])),
        ),
        with(
            json!({"retry": {"constant": "0"}}),
            options().retry(RetryPolicy::constant(seconds(0))),
        ),
        with(
            json!({"retry": {"constant": "200 years"}}),
            options().retry(RetryPolicy::constant(century)),
        ),
        with(
            json!({"retry": {"constant": "1 s", "cap": "2 s"}}),
            options().retry(RetryPolicy::constant(seconds(1)).cap(seconds(2))),
        ),
        with(
            json!({"retry": {"base": "0"}}),
            options().retry(policy().base(seconds(0))),
        ),
        with(
            json!({"retry": {"factor": 0.5}}),
            options().retry(policy().factor(0.5)),
        ),
        with(
            json!({"retry": {"factor": 1e10}}),
            options().retry(policy().factor(1e10)),
        ),
        with(
            json!({"retry": {"cap": "1 ms"}}),
            options().retry(policy().cap(seconds(0))),
        ),
        with(
            json!({"retry": {"cap": "200 years"}}),
            options().retry(policy().cap(century)),
        ),
        with(
            json!({"retry": {"max_age": "200 years"}}),
            options().retry(policy().max_age(century)),
        ),
        with(
            json!({"retry": {"max_retry_after": "200 years"}}),
            options().retry(policy().max_retry_after(century)),
        ),
        with(
            json!({"retry": {"max_attempts": 0}}),
            options().retry(policy().max_attempts(0)),
        ),
        headed(&[("Content-Length", "3")], "abc"),
        headed(&[("Content-Length", "03")], "abc"),
        headed(&[("Content-Length", "+3")], "abc"),
        headed(&[("Content-Length", "4")], "abc"),
        headed(&[("Content-Length", "3"), ("content-length", "3")], "abc"),
        headed(&[("Transfer-Encoding", "Chunked")], "abc"),
        headed(&[("Transfer-Encoding", "gzip")], "abc"),
        headed(
            &[("Transfer-Encoding", "chunked"), ("Content-Length", "3")],
            "abc",
        ),
        headed(
            &[("a", "1"), ("b", "2"), ("A", "3"), ("c", "\"\\\t é\u{85}")],
            "",
        ),
        headed(
            &[
                ("Authorization", "s"),
                ("x", "y"),
                ("Set-Cookie", "a"),
                ("COOKIE", "b"),
            ],
            "x",
        ),
        headed(&[("Idempotency-Key", "mine")], "x"),
        headed(&[("a", "\u{7f}")], "x"),
        headed(&[("a", "x\n")], "x"),
        headed(&[("a b", "x")], "x"),
        headed(&[("", "x")], "x"),
        headed(&[("é", "x")], "x"),
        headed(&[("a", &"x".repeat(262_144))], "x"),
        headed(&[("a", &"x".repeat(262_143))], "x"),
        headed(&vec![("a", "x"); 1000], "x"),
        headed(&vec![("a", "x"); 1001], "x"),
        headed(&[], &"x".repeat(8 * 1024 * 1024 + 1)),
        case("GET", &format!("http://a/{}", "x".repeat(8192 - 10))),
        case("GET", &format!("http://a/{}", "x".repeat(8192 - 9))),
        case("get", "http://a/"),
        case("M-SEARCH", "http://a/"),
        case("", "http://a/"),
        case("GE T", "http://a/"),
    ];
    // The owner of a key by credentials.
    for headers in [
        &[
            ("authorization", "a"),
            ("x-api-key", "é"),
            ("Cookie", "b"),
            ("cookie", "c"),
        ][..],
        &[("proxy-authorization", "a"), ("x", "y")],
    ] {
        for body in ["", "x"] {
            cases.push(Case {
                sql: json!({"key": "k"}),
                rust: options().key("k"),
                ..headed(headers, body)
            });
        }
    }
    for url in [
        "http://a",
        "http://a?b",
        "http://a#b",
        "http://a/b?c#d?e",
        "HTTP://Example.COM:80/",
        "https://u:p@a.example/b/c.json?d=e&f=%zz?/..",
        "http://a@b@c/",
        "http://127.0.0.1:8080//b",
        "http://[::1]/a",
        "http://[2001:DB8::1]:1/",
        "http://[::ffff:7f00:1]/",
        "http://[::7f00:1]/",
        "http://[0::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[1:0:0:2::]/",
        "http://[::1/",
        "http://a/%7Euser/%C3%A9?x=%27|y{z}",
        "http://xn--bcher-kva.example/",
        "http://a/?",
        "http://a/a/../b",
        "http://a/a/.",
        "http://a/a/./b",
        "http://a/a/%2e%2E/b",
        "http://a/.%2e/b",
        "http://a/...",
        "http://a/.well-known/b",
        "http://a/b?x='y'",
        "http://a/b\"c",
        "http://a/{b}",
        "http://a/[b]^c|d`e",
        "http://a/b?[c]^d|e`f\\",
        "http://a/b\\c",
        "http://a/é",
        "http://a/ b",
        "http://a/b?é",
        "http://0x7f.1/",
        "http://127.1/",
        "http://127.0.0.01/",
        "http://127.0.0.1./",
        "http://127.0.0.256/",
        "http://127.0.0.256.example.1/",
        "http://1/",
        "http://a.1a/",
        "http://a_b.example/",
        "http://a!$&'()*+,;=~b/",
        "http://a../",
        "http://a./",
        "http://.a/",
        "http://a:/",
        "http://a:0/",
        "http://a:00080/",
        "http://a:65535/",
        "http://a:65536/",
        "http://a:99999999999999999999/",
        "http://a:b/",
        "http://a:1:2/",
        "http:///",
        "http://:80/",
        "http://@/",
        "ftp://a/",
        "mailto:a@b",
        "/relative",
        "a.example",
        "*",
        "",
        "//a/b",
        "http:a",
        "http:/a",
        "http://a%41/",
        "http://ex ample/",
        "http://bücher.example/",
        "http://example.com\\@evil.example/",
        "http://a<b>/",
    ] {
        cases.push(case("POST", url));
    }
    cases
}

#[tokio::test]
async fn the_same_requests_are_stored_alike_and_refused_alike() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let (mut stored, mut refused) = (0, 0);
    for case in corpus() {
        if assert_same(&durable, &case).await {
            stored += 1;
        } else {
            refused += 1;
        }
    }
    assert!(
        stored > 60 && refused > 60,
        "{stored} stored, {refused} refused"
    );
}

fn any_case() -> impl Strategy<Value = Case> {
    let text = || "[a-zé\"\\\\ ]{1,6}".prop_map(String::from);
    let name = prop_oneof![
        "[A-Za-z!#-]{1,4}",
        Just("Authorization".to_owned()),
        Just("x-api-key".to_owned()),
        Just("cookie".to_owned()),
    ];
    let headers = proptest::collection::vec((name, "[ -~é\t]{0,6}"), 0..6);
    let host = prop_oneof![
        "[a-zA-Z0-9.-]{1,8}",
        "[0-9x]{1,3}[.][0-9]{1,3}[.][0-9]{1,3}[.][0-9]{1,3}",
        "[\\[][0-9a-f]{1,4}::[0-9a-f:]{1,8}[\\]]",
    ];
    let url = (
        host,
        "(:[0-9]{0,3})?",
        "(/[.%2eE]{0,4}|/[!-~]{0,5}){0,3}",
        "([?][!-~]{0,8})?",
    )
        .prop_map(|(host, port, path, query)| format!("https://{host}{port}{path}{query}"));
    let key = proptest::option::of(text());
    (
        ("GET|POST|PATCH|x", url, headers),
        proptest::option::of(text()),
        key,
        text(),
    )
        .prop_map(|((method, url, headers), body, key, ordered)| {
            let (mut sql, mut rust) = (json!({"ordered": ordered}), Options::default());
            rust = rust.ordered(ordered);
            if let Some(key) = key {
                sql["key"] = json!(key);
                rust = rust.key(key);
            }
            Case {
                method,
                url,
                headers,
                body: body.map(String::into_bytes),
                sql,
                rust,
            }
        })
}

#[tokio::test]
async fn any_request_is_stored_alike_or_refused_alike() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    let mut runner = TestRunner::deterministic();
    let mut stored = 0;
    for _ in 0..400 {
        let case = any_case().new_tree(&mut runner).unwrap().current();
        stored += i32::from(assert_same(&durable, &case).await);
    }
    assert!(stored > 40, "{stored}");
}

#[tokio::test]
async fn options_that_rust_has_no_types_for_are_refused_by_name() {
    let database = migrated().await;
    let durable = Durable::builder(database.pool().clone()).runner(false);
    let durable = durable.build().unwrap();
    for (options, field, reason) in [
        (
            json!({"delays": 1, "ab": 2}),
            "options",
            "unknown: `ab`, `delays`",
        ),
        (json!([]), "options", "must be an object"),
        (json!({"key": 7}), "key", "must be a text"),
        (json!({"delay": 7}), "delay", "must be an interval"),
        (json!({"delay": "soon"}), "delay", "must be an interval"),
        (json!({"delay": "-1 s"}), "delay", "must not be negative"),
        (
            json!({"priority": "urgent"}),
            "priority",
            "must be high, normal or low",
        ),
        (
            json!({"guarantee": "x"}),
            "guarantee",
            "must be at_least_once or at_most_once",
        ),
        (
            json!({"halt_on_discard": "yes"}),
            "halt_on_discard",
            "must be true or false",
        ),
        (
            json!({"idempotency_header": "x"}),
            "idempotency_header",
            "must be quoted, bare or none",
        ),
        (
            json!({"sensitive": "x"}),
            "sensitive",
            "must be an array of names of headers",
        ),
        (json!({"accept": 404}), "accept", "must be an array"),
        (
            json!({"accept": [1]}),
            "accept",
            "each must be a status from 100 to 999, a range, success or any",
        ),
        (
            json!({"retry": 3}),
            "retry",
            "must be an object, `webhooks` or `none`",
        ),
        (
            json!({"retry": {"tries": 3}}),
            "retry",
            "has unknown fields: `tries`",
        ),
        (
            json!({"retry": {"jitter": "x"}}),
            "retry",
            "`jitter` must be full, equal or none",
        ),
        (
            json!({"retry": {"schedule": "1 s"}}),
            "retry",
            "`schedule` must be an array of intervals",
        ),
        (
            json!({"retry": {"max_age": 1}}),
            "retry",
            "`max_age` must be an interval",
        ),
        (json!({"metadata": 1e300}), "", ""),
    ] {
        let case = Case {
            sql: options,
            ..case("GET", "http://a/")
        };
        match by_sql(&durable, &case).await {
            Ok(_) => assert_eq!(field, "", "{case:?}"),
            Err(found) => {
                let text = format!("invalid request: {field}: {reason}");
                assert_eq!(found, (text, Some(field.to_owned())));
            }
        }
    }
}

#[tokio::test]
async fn headers_and_arguments_of_another_type_are_refused_by_name() {
    let database = migrated().await;
    for (headers, reason) in [
        ("7", "must be an object, or an array of pairs"),
        ("[\"a\"]", "each must be a name and a text"),
        ("[[\"a\", \"b\", \"c\"]]", "each must be a name and a text"),
        ("[[\"a\"]]", "each must be a name and a text"),
        ("{\"a\": 1}", "each must be a name and a text"),
        ("{\"a\": [[]]}", "each must be a name and a text"),
    ] {
        let error = sqlx::query("SELECT requeuest.fire('GET', 'http://a/', $1::text::jsonb)")
            .bind(headers)
            .execute(database.pool())
            .await
            .unwrap_err();
        let error = of_postgres(&error);
        assert_eq!(
            error.message(),
            format!("invalid request: headers: {reason}")
        );
        assert_eq!(error.column(), Some("headers"));
    }
    for (arguments, field) in [("NULL, 'http://a/'", "method"), ("'GET', NULL", "url")] {
        let statement = format!("SELECT requeuest.fire({arguments})");
        let error = super::refused(database.pool(), &statement).await;
        assert_eq!(of_postgres(&error).column(), Some(field));
    }
}
