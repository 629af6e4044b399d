//! What the tests share: a recording HTTP server, a migrated database, requests and clients, and
//! waiting for conditions.

use std::future::Future;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Uri, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use requeuest::encryption::{Key, Keyring};
use requeuest::migrate::{DatabaseRole, Migrator};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::{self, Postgres, TestDatabase};
use requeuest::{
    CircuitBreaker, DestinationPolicy, Durable, DurableBuilder, Options, Outcome, RateLimit,
    RequestId, RetryBudget, Uuid,
};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Executor, PgPool};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// Longer than any step of a test takes on a busy machine, and short enough to wait for.
pub const LONG: Duration = Duration::from_secs(30);

/// A request as the server saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub method: Method,
    pub uri: Uri,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// An HTTP server (1.1, and 2 without TLS) on a loopback port. It records each request before it
/// answers.
pub struct Server {
    pub addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    panicked: Arc<Mutex<Option<String>>>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Answers with the response that `handler` returns. The handler gets the request and its
    /// number, counted from 0.
    pub async fn start<H, F>(handler: H) -> Self
    where
        H: Fn(usize, Seen) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let panicked = Arc::new(Mutex::new(None));
        let handler = Arc::new(handler);
        let (record, failed) = (Arc::clone(&seen), Arc::clone(&panicked));
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (record, failed) = (Arc::clone(&record), Arc::clone(&failed));
                let handler = Arc::clone(&handler);
                let service = service_fn(move |request: Request<Incoming>| {
                    let (record, failed) = (Arc::clone(&record), Arc::clone(&failed));
                    let handler = Arc::clone(&handler);
                    async move {
                        let (parts, body) = request.into_parts();
                        let Ok(body) = body.collect().await else {
                            return Err(std::io::Error::other("the client went away"));
                        };
                        let seen = Seen {
                            method: parts.method,
                            uri: parts.uri,
                            version: parts.version,
                            headers: parts.headers,
                            body: body.to_bytes(),
                        };
                        let number = {
                            let mut record = record.lock().unwrap();
                            record.push(seen.clone());
                            record.len() - 1
                        };
                        // In a separate task, so that a panic of the handler is noticed.
                        tokio::spawn(handler(number, seen)).await.map_err(|error| {
                            *failed.lock().unwrap() = Some(error.to_string());
                            std::io::Error::other("the handler panicked")
                        })
                    }
                });
                tokio::spawn(async move {
                    // Clients may cut the connection.
                    let _ = auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self {
            addr,
            seen,
            panicked,
            accepting,
        }
    }

    /// Answers every request with this status and an empty body.
    pub async fn always(status: u16) -> Self {
        Self::start(move |_, _| async move { reply(status, "") }).await
    }

    /// Answers every request with status 200 and the request's body.
    pub async fn echo() -> Self {
        Self::start(|_, seen| async move { reply(200, seen.body) }).await
    }

    /// Answers with this status and the request's body, once for each permit.
    pub async fn held(status: u16) -> (Self, Arc<Semaphore>) {
        let gate = Arc::new(Semaphore::new(0));
        let wait = Arc::clone(&gate);
        let server = Self::start(move |_, seen| {
            let wait = Arc::clone(&wait);
            async move {
                wait.acquire().await.unwrap().forget();
                reply(status, seen.body)
            }
        })
        .await;
        (server, gate)
    }

    /// Answers with these statuses in turn, and then with the last status for ever.
    pub async fn in_turn(statuses: &'static [u16]) -> Self {
        Self::start(
            move |number, _| async move { reply(statuses[number.min(statuses.len() - 1)], "") },
        )
        .await
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// The bodies of the requests, in the order in which they arrived.
    pub fn bodies(&self) -> Vec<Bytes> {
        self.seen().into_iter().map(|seen| seen.body).collect()
    }

    /// Waits until this many requests have arrived.
    pub async fn wait_for(&self, count: usize) {
        eventually(&format!("{count} requests"), || async {
            self.count() >= count
        })
        .await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        let panicked = self.panicked.lock().unwrap().take();
        if let (Some(panicked), false) = (panicked, std::thread::panicking()) {
            panic!("a handler failed: {panicked}");
        }
    }
}

pub fn reply(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status.try_into().unwrap();
    response
}

/// A port on which no server listens.
pub async fn closed_port() -> SocketAddr {
    TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap()
}

/// A new database for this test.
pub async fn empty() -> TestDatabase {
    Postgres::shared().await.unwrap().database().await.unwrap()
}

/// A new database for this test, with the schema in it.
pub async fn migrated() -> TestDatabase {
    let _ = env_logger::builder().is_test(true).try_init();
    let database = empty().await;
    requeuest::migrate(database.pool()).await.unwrap();
    database
}

/// Polls a condition until it holds, and fails the test if it never does.
pub async fn eventually<F, C>(what: &str, mut condition: C)
where
    C: FnMut() -> F,
    F: Future<Output = bool>,
{
    eventually_some(what, || {
        let holds = condition();
        async move { holds.await.then_some(()) }
    })
    .await;
}

/// Waits until there is a value, and fails the test if that takes too long.
pub async fn eventually_some<F, C, T>(what: &str, mut value: C) -> T
where
    C: FnMut() -> F,
    F: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(value) = value().await {
            return value;
        }
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Awaits the future, and fails the test if that takes too long.
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("took too long")
}

/// A `POST` request with this body.
pub fn post(url: impl AsRef<str>, body: impl Into<Bytes>) -> requeuest::Request {
    let request = Request::post(url.as_ref()).body(body.into()).unwrap();
    request.try_into().unwrap()
}

/// A builder of handles on the test's database.
pub fn builder(database: &TestDatabase) -> DurableBuilder {
    builder_on(database.pool())
}

/// A builder of handles on this pool. With `REQUEUEST_LIMITS=1`, each destination has all kinds of
/// limits. With `REQUEUEST_ENCRYPTION=1`, what is stored is encrypted. Copies of the test binary
/// inherit both.
pub fn builder_on(pool: &PgPool) -> DurableBuilder {
    let mut builder = Durable::builder(pool.clone());
    let wanted = |name| std::env::var(name).is_ok_and(|value| value == "1");
    if wanted("REQUEUEST_LIMITS") {
        builder = builder.destination("*", limits());
    }
    if wanted("REQUEUEST_ENCRYPTION") {
        let bytes: Vec<u8> = (0..32).collect();
        builder = builder.encryption(Keyring::new(Key::new("all", bytes).unwrap()));
    }
    builder
}

/// A handle with the default settings.
pub fn handle(database: &TestDatabase) -> Durable {
    builder(database).build().unwrap()
}

/// Limits that tests of other things meet, and that don't change what these tests expect: permits
/// for a few processes only, tokens that come back soon, and a breaker that is open for a moment.
pub fn limits() -> DestinationPolicy {
    let moment = Duration::from_millis(50);
    let breaker = CircuitBreaker::default()
        .failure_share(0.9)
        // Not below any attempt timeout of a test.
        .window(Duration::from_secs(120))
        .open_for(moment)
        .max_open_for(2 * moment)
        .probes(4)
        .successes(1);
    DestinationPolicy::default()
        .max_concurrency(400)
        .max_concurrency_per_process(100)
        .rate(RateLimit::new(2000, Duration::from_secs(1)))
        .circuit_breaker(breaker)
        .retry_budget(RetryBudget::default().per_second(50))
}

/// Stands in for a handle in another process: its own pool, and no runner.
pub async fn other_process(database: &TestDatabase) -> Durable {
    let pool = PgPool::connect(database.url()).await.unwrap();
    builder_on(&pool).runner(false).build().unwrap()
}

/// A hyper client that speaks plain HTTP.
pub fn hyper_client<B>() -> Client<HttpConnector, B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

/// This client with the handle as its middleware.
pub fn with_middleware(client: reqwest::Client, durable: &Durable) -> ClientWithMiddleware {
    ClientBuilder::new(client).with(durable.clone()).build()
}

/// Waits until a request has ended.
pub async fn outcome_of(durable: &Durable, id: RequestId) -> Outcome {
    testkit::outcome(durable, id, LONG).await.unwrap()
}

/// Fires a request with these options, one with an ordering key too, and one that halts its key.
/// Waits until they have ended. The keys have this number in them.
pub async fn end_three(durable: &Durable, url: &str, number: usize, options: impl Fn() -> Options) {
    for options in [
        options(),
        options().ordered(number.to_string()),
        options()
            .ordered(format!("halted {number}"))
            .halt_on_discard(),
    ] {
        let id = durable.fire(post(url, "x").with(options)).await.unwrap();
        outcome_of(durable, id).await;
    }
}

/// How many rows one of the schema's tables has. `table` may end with a `WHERE` clause.
pub async fn rows(database: &TestDatabase, table: &str) -> i64 {
    count(database, &format!("SELECT count(*) FROM requeuest.{table}")).await
}

/// Waits until one of the schema's tables has this many rows. `table` may end with a `WHERE`
/// clause.
pub async fn eventually_rows(database: &TestDatabase, table: &str, expected: i64) {
    eventually(&format!("{expected} rows in {table}"), || async {
        rows(database, table).await == expected
    })
    .await;
}

/// No table holds anything of a request.
pub async fn assert_nothing_persisted(database: &TestDatabase) {
    for table in ["mq_msgs", "mq_payloads", "outcomes", "attempts"] {
        assert_eq!(rows(database, table).await, 0, "{table}");
    }
}

/// Runs a statement about one request, `$1`, that must change a row.
pub async fn execute(database: &TestDatabase, id: RequestId, statement: &str) {
    let done = sqlx::query(statement)
        .bind(Uuid::from(id))
        .execute(database.pool())
        .await
        .unwrap();
    assert!(done.rows_affected() > 0, "{statement}");
}

/// The id in the only row of one of the schema's tables.
pub async fn only_id(database: &TestDatabase, table: &str) -> RequestId {
    let ids: Vec<Uuid> = sqlx::query_scalar(&format!("SELECT id FROM requeuest.{table}"))
        .fetch_all(database.pool())
        .await
        .unwrap();
    assert_eq!(ids.len(), 1, "rows in {table}");
    ids[0].into()
}

/// A number from the database.
pub async fn count(database: &TestDatabase, query: &str) -> i64 {
    sqlx::query_scalar(query)
        .fetch_one(database.pool())
        .await
        .unwrap()
}

/// Adds outcomes to a slot that ended this many seconds ago, with a retention in seconds.
pub async fn add_outcomes(database: &TestDatabase, slot: i32, number: i32, ago: i32, kept: i32) {
    let add = format!(
        "INSERT INTO requeuest.outcomes
             (slot, id, channel_name, channel_args, status, attempts, created_at, finished_at,
              expires_at)
         SELECT {slot}, gen_random_uuid(), 'c', 'g', 'completed', 1, t.at, t.at,
             t.at + {kept} * interval '1 second'
         FROM (SELECT now() - {ago} * interval '1 second' AS at) t, generate_series(1, {number})"
    );
    sqlx::query(&add).execute(database.pool()).await.unwrap();
}

/// A role that may log in. [`dropped`](Self::dropped) removes it and its rights.
pub struct Role<'a> {
    database: &'a TestDatabase,
    pub name: String,
}

impl<'a> Role<'a> {
    pub async fn create(database: &'a TestDatabase) -> Self {
        Self::named(database, "role").await
    }

    /// A role whose name ends with this one.
    pub async fn named(database: &'a TestDatabase, name: &str) -> Self {
        let name = format!("{}_{name}", database.name());
        let statements = format!("CREATE ROLE {name} LOGIN PASSWORD 'test'");
        database.pool().execute(&*statements).await.unwrap();
        Self { database, name }
    }

    pub fn database(&self) -> &'a TestDatabase {
        self.database
    }

    /// Runs statements with the role's name for each `ROLE`.
    pub async fn granted(&self, statements: &str) {
        let statements = statements.replace("ROLE", &self.name);
        self.database.pool().execute(&*statements).await.unwrap();
    }

    /// Gives the role the rights of this part.
    pub async fn plays(&self, part: DatabaseRole) {
        let migrator = Migrator::new().grants(part, &self.name);
        migrator.run(self.database.pool()).await.unwrap();
    }

    pub fn options(&self) -> PgConnectOptions {
        let options = self.database.options();
        options.username(&self.name).password("test")
    }

    pub fn pool(&self) -> PgPool {
        PgPoolOptions::new().connect_lazy_with(self.options())
    }

    pub async fn dropped(self) {
        let name = &self.name;
        let statements = format!("DROP OWNED BY {name} CASCADE; DROP ROLE {name}");
        self.database.pool().execute(&*statements).await.unwrap();
    }
}

/// Tells a copy of this test binary which part to play.
const PART: &str = "REQUEUEST_TEST_PART";

/// A copy of this test binary that runs just one of a module's ignored tests.
pub fn part(module: &str, name: &str) -> Command {
    // The test binary knows its tests by names without the crate's name.
    let (_, module) = module.split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            &format!("{module}::{name}"),
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env(PART, name)
        .stdin(Stdio::null());
    command
}

/// Whether this process was started to play this part.
pub fn plays(name: &str) -> bool {
    std::env::var(PART).is_ok_and(|part| part == name)
}

/// Retries without noticeable delays, for ever.
pub fn quick() -> RetryPolicy {
    RetryPolicy::exponential()
        .base(Duration::from_millis(1))
        .cap(Duration::from_millis(20))
}

/// Waits until a request that is enqueued now with this delay has been delivered. Runners have
/// listened, polled and sent in the meantime: what should never happen has had its chance.
pub async fn passing(database: &TestDatabase, time: Duration) {
    let server = Server::always(200).await;
    let clock = builder(database).channel("clock").build().unwrap();
    let request = post(server.url("/"), "").with(Options::default().delay(time));
    let id = clock.fire(request).await.unwrap();
    outcome_of(&clock, id).await;
}
