//! What the crate logs, as an application sees it that only uses the `log` crate.

use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::HeaderValue;
use http_body_util::Full;
use requeuest::retry::RetryPolicy;
use requeuest::{Body, Durable, DurableLayer, Options, Outcome, ReqwestTransport, outcome_fn};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Executor, PgConnection, PgPool};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tower::retry::Retry;
use tower::{Layer, ServiceExt};

use crate::layer::repetition::Tries;
use crate::support::{
    LONG, Role, Server, closed_port, eventually, hyper_client, in_time, migrated, part, plays,
    post, quick,
};

/// What a copy of this binary prints and logs while it plays a part.
pub struct Output {
    pub printed: String,
    pub logged: Vec<String>,
}

impl Output {
    async fn of(name: &str, variables: &[(&str, String)]) -> Self {
        Self::of_part(part(module_path!(), name), variables).await
    }

    pub async fn of_part(mut command: Command, variables: &[(&str, String)]) -> Self {
        command
            .env("RUST_LOG", "requeuest=debug")
            .envs(variables.iter().map(|(name, value)| (name, value)));
        let run = tokio::task::spawn_blocking(move || command.output());
        let output = run.await.unwrap().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (printed, logged) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success(), "{printed}{logged}");
        let logged = logged.lines().map(str::to_owned).collect();
        Self { printed, logged }
    }

    pub fn at(&self, level: &str) -> Vec<&str> {
        let level = format!("[{level}");
        let lines = self.logged.iter().map(|line| &**line);
        lines.filter(|line| line.starts_with(&level)).collect()
    }
}

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap()
}

/// The pool of a part's application.
pub async fn application_pool() -> PgPool {
    let url = variable("REQUEUEST_TEST_DATABASE");
    PgPool::connect(&url).await.unwrap()
}

#[tokio::test]
async fn a_request_that_is_given_up_is_one_warning() {
    // Given up after its retries, and with a final answer that no caller sees.
    for (status, attempts) in [(503, 2), (404, 1)] {
        give_up(status, attempts).await;
    }
}

async fn give_up(status: u16, attempts: usize) {
    let database = migrated().await;
    let server = Server::always(status).await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        (
            "REQUEUEST_TEST_SERVER",
            server.url("/orders/hunter2?token=hunter2"),
        ),
    ];
    let output = Output::of("give_up_a_request", &variables).await;
    let warnings = output.at("WARN");
    let [warning] = &*warnings else {
        panic!("{warnings:#?}");
    };
    let (_, id) = output.printed.split_once("id: ").unwrap();
    let id = id.lines().next().unwrap();
    for part in [
        "a request was given up".to_owned(),
        format!("id={id}"),
        r#"channel="billing""#.to_owned(),
        format!(r#"destination="{}""#, server.url("")),
        format!("attempts={attempts}"),
        format!(r#"reason="answered with {status}"#),
    ] {
        assert!(warning.contains(&part), "no {part} in {warning}");
    }
    let failed = output.at("DEBUG");
    let failed = failed
        .iter()
        .filter(|line| line.contains("an attempt failed"));
    assert_eq!(failed.count(), attempts - 1, "{:#?}", output.logged);
    assert_eq!(output.at("ERROR"), [""; 0]);
    for line in &output.logged {
        assert!(!line.contains("hunter2"), "{line}");
    }
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn give_up_a_request() {
    if !plays("give_up_a_request") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let policy = RetryPolicy::exponential()
        .base(Duration::from_millis(1))
        .max_attempts(2);
    let durable = Durable::builder(pool)
        .channel("billing")
        .retry(policy)
        .build()
        .unwrap();
    let mut request = post(variable("REQUEUEST_TEST_SERVER"), "hunter2");
    let mut secret = HeaderValue::from_static("hunter2");
    secret.set_sensitive(true);
    request.headers_mut().insert("authorization", secret);
    let request = request.with(Options::default());
    let id = durable.fire(request).await.unwrap();
    in_time(durable.outcome(id)).await.unwrap();
    println!("\nid: {id}");
    durable.shutdown(LONG).await.unwrap();
}

#[tokio::test]
async fn a_retry_layer_above_the_layer_is_one_warning() {
    let database = migrated().await;
    let server = Server::always(503).await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.url("")),
    ];
    let output = Output::of("call_below_a_retry_layer", &variables).await;
    let warnings = output.at("WARN");
    let retried = |line: &&&str| line.contains("remove the retry layer");
    assert_eq!(warnings.iter().filter(retried).count(), 1, "{warnings:#?}");
    // Two calls of three tries of two attempts, after two calls without a retry layer.
    assert_eq!(server.count(), 2 * 3 * 2 + 2 * 2);
    let first = warnings.iter().position(|line| retried(&line)).unwrap();
    // The first two calls are different requests, so neither repeats the other.
    assert!(first >= 2, "{warnings:#?}");
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn call_below_a_retry_layer() {
    if !plays("call_below_a_retry_layer") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let builder = Durable::builder(pool).retry(quick().max_attempts(2));
    let layer = builder.build_layer().unwrap();
    let call = |path| {
        let url = format!("{}{path}", variable("REQUEUEST_TEST_SERVER"));
        http::Request::post(url).body(Full::from("x")).unwrap()
    };
    for path in ["/1", "/2"] {
        let client = layer.layer(hyper_client());
        in_time(client.oneshot(call(path))).await.unwrap();
    }
    let tries = Tries {
        left: 2,
        passes_on: false,
    };
    let client = Retry::new(tries, layer.layer(hyper_client()));
    for _ in 0..2 {
        let response = in_time(client.clone().oneshot(call("/"))).await.unwrap();
        assert_eq!(response.status(), 503);
    }
}

#[tokio::test]
async fn an_unreachable_database_is_one_warning() {
    let output = Output::of("look_for_a_database", &[]).await;
    let warnings = output.at("WARN");
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    // The other tries left traces that only a closer look shows.
    assert!(output.at("DEBUG").len() > 3, "{:#?}", output.logged);
    assert!(
        warnings[0].contains("the runner can't start yet"),
        "{}",
        warnings[0]
    );
    assert_eq!(output.at("ERROR"), [""; 0]);
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn look_for_a_database() {
    if !plays("look_for_a_database") {
        return;
    }
    env_logger::init();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let connect = PgConnectOptions::new()
        .host("127.0.0.1")
        .port(listener.local_addr().unwrap().port())
        .username("nobody");
    let durable = Durable::new(PgPool::connect_lazy_with(connect));
    // Each try to start the runner fails, and is followed by another.
    let tries = async {
        for _ in 0..5 {
            let (mut connection, _) = listener.accept().await.unwrap();
            let _ = connection.shutdown().await;
        }
    };
    in_time(tries).await;
    drop(durable);
}

#[tokio::test]
async fn a_sweep_that_keeps_failing_is_one_warning_for_each_part() {
    let database = migrated().await;
    database
        .pool()
        .execute("ALTER TABLE requeuest.attempts RENAME TO renamed")
        .await
        .unwrap();
    let variables = [("REQUEUEST_TEST_DATABASE", database.url().to_owned())];
    let output = Output::of("sweep_without_attempts", &variables).await;
    let warnings = output.at("WARN");
    let [warning] = &*warnings else {
        panic!("{warnings:#?}");
    };
    let expected = "the sweep of old rows fails part=\"attempts\"";
    assert!(warning.contains(expected), "{warning}");
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn sweep_without_attempts() {
    if !plays("sweep_without_attempts") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let durable = Durable::builder(pool.clone())
        .retention(Duration::from_secs(60))
        .runner(false)
        .build()
        .unwrap();
    for sweep in 0..3 {
        let key = "INSERT INTO requeuest.request_keys
                       (channel_name, key, id, fingerprint, created_at)
                   VALUES ('c', 'k', gen_random_uuid(), '', now() - interval '1 day')";
        pool.execute(key).await.unwrap();
        eventually(&format!("sweep {sweep}"), || async {
            let keys = "SELECT count(*) FROM requeuest.request_keys";
            let keys: i64 = sqlx::query_scalar(keys).fetch_one(&pool).await.unwrap();
            keys == 0
        })
        .await;
    }
    durable.shutdown(LONG).await.unwrap();
}

/// Writes the log to the standard error, and counts the lines with a text.
struct Counting {
    text: &'static str,
    count: Arc<AtomicUsize>,
}

impl Counting {
    fn init(text: &'static str) -> Arc<AtomicUsize> {
        let count = Arc::default();
        let counting = Self {
            text,
            count: Arc::clone(&count),
        };
        let target = env_logger::Target::Pipe(Box::new(counting));
        env_logger::Builder::from_default_env()
            .target(target)
            .init();
        count
    }
}

impl Write for Counting {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let found = String::from_utf8_lossy(line).matches(self.text).count();
        self.count.fetch_add(found, Ordering::SeqCst);
        std::io::stderr().write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

#[tokio::test]
async fn polls_that_always_fail_are_one_warning() {
    let database = migrated().await;
    let role = Role::create(&database).await;
    role.granted(
        "GRANT USAGE ON SCHEMA requeuest TO ROLE;
         GRANT SELECT, INSERT, DELETE ON ALL TABLES IN SCHEMA requeuest TO ROLE;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA requeuest TO ROLE;
         GRANT UPDATE ON requeuest.runners, requeuest.undelivered_channels TO ROLE;
         INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
         VALUES (gen_random_uuid(), 'default', '0000|d|x', now())",
    )
    .await;
    let url = role.options().to_url_lossy().to_string();
    let variables = [("REQUEUEST_TEST_DATABASE", url)];
    let output = Output::of("poll_without_the_right", &variables).await;
    let warnings = output.at("WARN");
    // The sweep may have come by as well.
    let of_runner = |line: &&&str| line.contains("runner");
    let warnings: Vec<_> = warnings.iter().filter(of_runner).collect();
    let [warning] = &*warnings else {
        panic!("{warnings:#?}");
    };
    assert!(warning.contains("the runner is replaced"), "{warning}");
    role.dropped().await;
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn poll_without_the_right() {
    if !plays("poll_without_the_right") {
        return;
    }
    let replaced = Counting::init("the runner is replaced");
    let pool = application_pool().await;
    let durable = Durable::new(pool);
    for number in 1..=3 {
        eventually("another replacement", || async {
            replaced.load(Ordering::SeqCst) >= number
        })
        .await;
    }
    drop(durable);
}

#[tokio::test]
async fn a_thousand_requests_to_a_receiver_that_is_down_are_few_warnings() {
    let database = migrated().await;
    let down = closed_port().await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", format!("http://{down}/")),
    ];
    let output = Output::of("give_up_a_thousand_requests", &variables).await;
    let warnings = output.at("WARN");
    assert!((1..=20).contains(&warnings.len()), "{}", warnings.len());
    let given_up = |line: &&&str| line.contains("a request was given up");
    let in_all = output.at("DEBUG").iter().filter(given_up).count() + warnings.len();
    assert_eq!(in_all, 1000);
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn give_up_a_thousand_requests() {
    if !plays("give_up_a_thousand_requests") {
        return;
    }
    let given_up = Counting::init("a request was given up");
    let pool = application_pool().await;
    let policy = RetryPolicy::exponential().max_attempts(1);
    let durable = Durable::builder(pool).retry(policy).build().unwrap();
    let url = variable("REQUEUEST_TEST_SERVER");
    // One destination alone would be asked for longer, because its attempts fail.
    let requests = (0..1000).map(|number| {
        let options = Options::default().limit_key(format!("{}", number % 20));
        post(&url, "x").with(options)
    });
    durable.fire_many(requests).await.unwrap();
    eventually("all are given up", || async {
        given_up.load(Ordering::SeqCst) == 1000
    })
    .await;
    durable.shutdown(LONG).await.unwrap();
}

#[tokio::test]
async fn many_requests_that_cannot_be_read_are_few_warnings() {
    let database = migrated().await;
    let variables = [("REQUEUEST_TEST_DATABASE", database.url().to_owned())];
    let output = Output::of("park_many_requests", &variables).await;
    let warnings = output.at("WARN");
    assert!((1..=20).contains(&warnings.len()), "{}", warnings.len());
    let parked = |line: &&&str| line.contains("and is parked");
    let in_all = output.at("DEBUG").iter().filter(parked).count() + warnings.len();
    assert_eq!(in_all, 300);
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn park_many_requests() {
    if !plays("park_many_requests") {
        return;
    }
    let parked = Counting::init("and is parked");
    let pool = application_pool().await;
    let enqueues = Durable::builder(pool.clone())
        .runner(false)
        .build()
        .unwrap();
    let requests = (0..300).map(|_| post("http://localhost:1/", "x"));
    enqueues.fire_many(requests).await.unwrap();
    pool.execute("UPDATE requeuest.mq_payloads SET head = '{}'")
        .await
        .unwrap();
    let durable = Durable::new(pool);
    eventually("all are parked", || async {
        parked.load(Ordering::SeqCst) == 300
    })
    .await;
    drop(durable);
}

#[tokio::test]
async fn what_cannot_be_read_is_one_warning() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.url("/hunter2")),
    ];
    let output = Output::of("read_what_a_newer_version_wrote", &variables).await;
    let mut warnings = output.at("WARN");
    warnings.sort_unstable();
    let [request, outcome] = &*warnings else {
        panic!("{warnings:#?}");
    };
    for part in [
        "a request can't be read by this version and is parked",
        "id=0",
        r#"channel="default""#,
        "unknown field `new`, at line 1, column ",
    ] {
        assert!(request.contains(part), "no {part} in {request}");
    }
    for part in [
        "an outcome can't be read by this version and is not handed over",
        "id=0",
        "a newer version wrote it, in format 2",
    ] {
        assert!(outcome.contains(part), "no {part} in {outcome}");
    }
    let again = |text: &str| {
        let lines = output.at("DEBUG");
        lines.iter().filter(|line| line.contains(text)).count()
    };
    assert_eq!(again("a request still can't be read"), 3);
    assert_eq!(again("an outcome still can't be read"), 3);
    assert_eq!(output.at("ERROR"), [""; 0]);
    for line in &output.logged {
        assert!(!line.contains("hunter2"), "{line}");
    }
    assert_eq!(server.count(), 1);
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn read_what_a_newer_version_wrote() {
    if !plays("read_what_a_newer_version_wrote") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let execute = async |statement: &str| pool.execute(statement).await.unwrap().rows_affected();
    let count = async |from: &str| {
        let query = format!("SELECT count(*) FROM requeuest.{from}");
        sqlx::query_scalar::<_, i64>(&query)
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    let durable = Durable::new(pool.clone());
    let handler = || {
        outcome_fn(async |_: &mut PgConnection, _: &Outcome| Ok::<_, std::convert::Infallible>(()))
    };
    drop(durable.on_outcome("default", handler()).await.unwrap());
    let url = variable("REQUEUEST_TEST_SERVER");
    durable.await_response(post(&url, "hunter2")).await.unwrap();
    execute("UPDATE requeuest.outcomes SET format = 2").await;
    let delayed = Options::default().delay(LONG);
    let request = post(&url, "hunter2").with(delayed);
    durable.fire(request).await.unwrap();
    let newer = r#"UPDATE requeuest.mq_payloads
        SET head = replace(head, '"delivery":{', '"delivery":{"new":"hunter2",')"#;
    assert_eq!(execute(newer).await, 1);
    execute("UPDATE requeuest.mq_msgs SET attempt_at = now()").await;
    let _subscription = durable.on_outcome("default", handler()).await.unwrap();
    for look in 0..4 {
        let parked = format!(
            "mq_msgs WHERE state = 'parked' AND claim_no = {}",
            2 * look + 2
        );
        eventually("another look at the request", || async {
            count(&parked).await == 1
        })
        .await;
        eventually("another look at the outcome", || async {
            count("unhandled WHERE due_at > now() AND parked_since IS NOT NULL").await == 1
        })
        .await;
        if look < 3 {
            execute(
                "UPDATE requeuest.mq_payloads SET parked_since = parked_since - interval '5 s'",
            )
            .await;
            execute("UPDATE requeuest.mq_msgs SET attempt_at = now()").await;
            execute("UPDATE requeuest.unhandled SET due_at = now()").await;
        }
    }
    durable.shutdown(LONG).await.unwrap();
}

#[tokio::test]
async fn parked_outcomes_and_a_handler_that_is_gone_are_one_warning_each() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.url("/")),
    ];
    let output = Output::of("park_outcomes_and_lose_the_handler", &variables).await;
    let warnings = output.at("WARN");
    let [fails, parked, gone] = &*warnings else {
        panic!("{warnings:#?}");
    };
    assert!(fails.contains("a handler failed"), "{fails}");
    for part in [
        "an outcome is parked, because its handler has failed too often",
        r#"channel="default""#,
        "failures=2",
        r#"error="no luck at https://ledger""#,
    ] {
        assert!(parked.contains(part), "{part}: {parked}");
    }
    let expected = "outcomes wait for a handler, and no process has one";
    assert!(gone.contains(expected), "{gone}");
    assert!(gone.contains(r#"channel="default""#), "{gone}");
    let infos = output.at("INFO").join("\n");
    for line in [
        "a handler's subscription is dropped",
        "no outcome waits for a handler that is gone any more",
    ] {
        assert!(infos.contains(line), "{line}: {infos}");
    }
    for line in &output.logged {
        assert!(!line.contains("hunter2"), "{line}");
    }
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn park_outcomes_and_lose_the_handler() {
    if !plays("park_outcomes_and_lose_the_handler") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let durable = Durable::builder(pool.clone())
        .retention(Duration::from_secs(60))
        .max_handler_failures(2)
        .build()
        .unwrap();
    let url = variable("REQUEUEST_TEST_SERVER");
    let broken = outcome_fn(async |_: &mut PgConnection, _: &Outcome| {
        Err(std::io::Error::other(
            "no luck at https://user:hunter2@ledger/hunter2",
        ))
    });
    let subscription = durable.on_outcome("default", broken).await.unwrap();
    durable.await_response(post(&url, "hunter2")).await.unwrap();
    eventually("the outcome is parked", || async {
        let failed = durable.failed_hand_overs(None).await.unwrap();
        failed.first().is_some_and(|one| one.parked)
    })
    .await;
    // Sweeps look for channels that only have parked outcomes, and for one with another.
    drop(subscription);
    let age = "UPDATE requeuest.handler_heartbeats SET seen_at = now() - interval '3 min'";
    pool.execute(age).await.unwrap();
    sweeps(&durable, 1).await;
    durable.await_response(post(&url, "hunter2")).await.unwrap();
    sweeps(&durable, 2).await;
    let handler = outcome_fn(async |_: &mut PgConnection, _: &Outcome| Ok::<_, sqlx::Error>(()));
    durable
        .on_outcome("default", handler)
        .await
        .unwrap()
        .detach();
    eventually("the other outcome is handled", || async {
        durable.handled_channels().await.unwrap()[0].waiting == 0
    })
    .await;
    sweeps(&durable, 1).await;
    durable.shutdown(LONG).await.unwrap();
}

/// Waits for this many whole sweeps.
async fn sweeps(durable: &Durable, count: usize) {
    for _ in 0..count {
        let began = std::time::Instant::now();
        eventually("a sweep", || async {
            durable.sweep_parts().iter().any(|part| {
                part.name == "handlers"
                    && part.last_success.is_some_and(|ago| ago < began.elapsed())
            })
        })
        .await;
    }
}

#[tokio::test]
async fn refusals_of_the_database_show_no_row_in_the_log() {
    let database = migrated().await;
    let server = Server::echo().await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.url("/hunter2")),
    ];
    let output = Output::of("meet_refusals", &variables).await;
    for constraint in ["of_results", "of_handlers", "of_requests"] {
        let named = |line: &String| line.contains(constraint);
        assert!(
            output.logged.iter().any(named),
            "no {constraint} in {:#?}",
            output.logged
        );
    }
    for line in &output.logged {
        let shows = line.contains("hunter2") || line.contains("Failing row");
        assert!(!shows, "{line}");
    }
}

async fn keep_a_secret(transaction: &mut PgConnection, _: &Outcome) -> Result<(), sqlx::Error> {
    transaction
        .execute("INSERT INTO public.secrets VALUES ('hunter2')")
        .await?;
    Ok(())
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn meet_refusals() {
    if !plays("meet_refusals") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    for statement in [
        "ALTER TABLE requeuest.outcomes ADD CONSTRAINT of_results CHECK (body IS NULL)",
        "CREATE TABLE secrets (secret text CONSTRAINT of_handlers CHECK (secret IS NULL))",
    ] {
        pool.execute(statement).await.unwrap();
    }
    let durable = Durable::new(pool.clone());
    let handler = durable.on_outcome("default", outcome_fn(keep_a_secret));
    let _handled = handler.await.unwrap();
    let request = || post(variable("REQUEUEST_TEST_SERVER"), "hunter2");
    let id = durable.fire(request()).await.unwrap();
    in_time(durable.outcome(id)).await.unwrap();
    eventually("the handler fails", || async {
        let failures = "SELECT coalesce(max(failures), 0)::bigint FROM requeuest.unhandled";
        let failures: i64 = sqlx::query_scalar(failures).fetch_one(&pool).await.unwrap();
        failures > 0
    })
    .await;
    pool.execute(
        "ALTER TABLE requeuest.mq_payloads ADD CONSTRAINT of_requests CHECK (head IS NULL)
         NOT VALID",
    )
    .await
    .unwrap();
    durable.fire(request()).await.unwrap_err();
    durable.shutdown(LONG).await.unwrap();
}

#[tokio::test]
async fn a_second_service_of_a_layer_is_one_warning() {
    let database = migrated().await;
    let variables = [("REQUEUEST_TEST_DATABASE", database.url().to_owned())];
    let output = Output::of("wrap_services", &variables).await;
    let second = |line: &&str| line.contains("wraps a second service");
    let warnings: Vec<_> = output.at("WARN").into_iter().filter(second).collect();
    let [warning] = &*warnings else {
        panic!("{:#?}", output.logged);
    };
    assert!(warning.contains(r#"channel="twice""#), "{warning}");
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn wrap_services() {
    if !plays("wrap_services") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let builder = |channel: &str| Durable::builder(pool.clone()).channel(channel);
    // Where the background has a transport of its own, the wrapped services don't take part in it.
    let own = ReqwestTransport::new(reqwest::Client::new());
    let given = builder("given").transport(own).build_layer::<Body>();
    let plain: DurableLayer = builder("plain").build().unwrap().layer();
    for layer in [given.unwrap(), plain] {
        drop((layer.layer(hyper_client()), layer.layer(hyper_client())));
    }
    // A clone is no second service.
    let once = builder("once").build_layer::<Body>().unwrap();
    let service = once.layer(hyper_client());
    drop(service.clone());
    let twice = builder("twice").build_layer::<Body>().unwrap();
    for _ in 0..4 {
        drop(twice.clone().layer(hyper_client()));
    }
}

#[tokio::test]
async fn a_layer_that_wraps_nothing_is_one_warning() {
    let output = Output::of("wrap_nothing", &[]).await;
    let idle = |line: &&str| line.contains("the layer has wrapped no service");
    let warnings: Vec<_> = output.at("WARN").into_iter().filter(idle).collect();
    let [warning] = &*warnings else {
        panic!("{:#?}", output.logged);
    };
    assert!(warning.contains(r#"channel="idle""#), "{warning}");
}

#[tokio::test(start_paused = true)]
#[ignore = "a part of another test"]
async fn wrap_nothing() {
    if !plays("wrap_nothing") {
        return;
    }
    env_logger::init();
    // The runner doesn't ask for the database before it has a client.
    let pool = || PgPool::connect_lazy("postgres://127.0.0.1:9/none").unwrap();
    let builder = |channel: &str| Durable::builder(pool()).channel(channel);
    let _idle = builder("idle").build_layer::<Body>().unwrap();
    let _quiet = builder("quiet").runner(false).build_layer::<Body>();
    drop(builder("dropped").build_layer::<Body>().unwrap());
    let late = builder("late").build_layer::<Body>().unwrap();
    tokio::time::sleep(Duration::from_secs(9)).await;
    let _service = late.layer(hyper_client());
    tokio::time::sleep(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn a_channel_that_no_runner_delivers_is_one_warning() {
    let database = migrated().await;
    let server = Server::always(200).await;
    let variables = [
        ("REQUEUEST_TEST_DATABASE", database.url().to_owned()),
        ("REQUEUEST_TEST_SERVER", server.url("/?token=hunter2")),
    ];
    let output = Output::of("fire_into_a_channel_without_a_runner", &variables).await;
    let warnings = output.at("WARN");
    let [warning] = &*warnings else {
        panic!("{warnings:#?}");
    };
    for part in [
        "no runner delivers",
        r#"channels=["emials", "orders"]"#,
        "count=2",
    ] {
        assert!(warning.contains(part), "no {part} in {warning}");
    }
}

#[tokio::test]
#[ignore = "a part of another test"]
async fn fire_into_a_channel_without_a_runner() {
    if !plays("fire_into_a_channel_without_a_runner") {
        return;
    }
    env_logger::init();
    let pool = application_pool().await;
    let durable = Durable::builder(pool.clone())
        .deliver(["emails"])
        .build()
        .unwrap();
    let request = |channel: &str| {
        let options = Options::default().channel(channel);
        post(variable("REQUEUEST_TEST_SERVER"), "x").with(options)
    };
    for _ in 0..3 {
        durable.fire(request("emials")).await.unwrap();
    }
    let mut transaction = pool.begin().await.unwrap();
    durable
        .fire_in(&mut *transaction, request("orders"))
        .await
        .unwrap();
    durable
        .fire_in(&mut *transaction, request("emails"))
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    // The channels have been looked at in the meantime.
    let delay = Options::default()
        .channel("emails")
        .delay(Duration::from_secs(5));
    let late = post(variable("REQUEUEST_TEST_SERVER"), "x").with(delay);
    let id = durable.fire(late).await.unwrap();
    in_time(durable.outcome(id)).await.unwrap();
    durable.shutdown(LONG).await.unwrap();
}
