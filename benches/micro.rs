//! What a call costs this process in time and allocations, without a network and without waiting
//! for a disk.
//!
//! `cargo bench --bench micro`
//!
//! Everything runs on the measured thread: the lanes, the attempts and the Postgres driver. The
//! transport is a function that answers at once. Postgres runs without `fsync`. The time that
//! Postgres takes is part of the times of the durable calls, but not of their allocations.

use std::convert::Infallible;
use std::future::{Ready, ready};

use bytes::Bytes;
use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use futures_util::future::join_all;
use opentelemetry_sdk::trace::SdkTracerProvider;
use requeuest::encryption::{Key, Keyring, measured};
use requeuest::otel::OpenTelemetry;
use requeuest::testkit::{Postgres, TestDatabase};
use requeuest::{Body, Durable, Request, TraceContext, TraceContextHook};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt, service_fn};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

fn request() -> http::Request<Bytes> {
    http::Request::post("http://api.example.com/v1/charges?expand=customer")
        .header("content-type", "application/json")
        .header("authorization", "Bearer secret")
        .header("user-agent", "billing/1.0")
        .body(Bytes::from_static(&[b'x'; 256]))
        .expect("a valid request")
}

type Answer = Ready<Result<http::Response<Body>, Infallible>>;

fn answer<B>(_: http::Request<B>) -> Answer {
    ready(Ok(http::Response::new(Body::from("ok"))))
}

/// Conversion of a request into the crate's own type.
#[divan::bench]
fn intake(bencher: Bencher<'_, '_>) {
    bencher
        .with_inputs(request)
        .bench_values(|request| Request::try_from(black_box(request)));
}

fn keys() -> Keyring {
    let bytes: Vec<u8> = (0..32).collect();
    Keyring::new(Key::new("bench", bytes).expect("a key"))
}

/// Encrypting a body of this many bytes.
#[divan::bench(args = [0, 1024, 65_536])]
fn seal_body(bencher: Bencher<'_, '_>, len: usize) {
    let (keys, body) = (keys(), vec![b'x'; len]);
    bencher.bench(|| measured::seal_body(&keys, black_box(&body)));
}

/// Decrypting it.
#[divan::bench(args = [0, 1024, 65_536])]
fn open_body(bencher: Bencher<'_, '_>, len: usize) {
    let keys = keys();
    let sealed = measured::seal_body(&keys, &vec![b'x'; len]);
    bencher
        .with_inputs(|| sealed.clone())
        .bench_values(|sealed| measured::open_body(&keys, sealed));
}

/// Encoding the head and the body of a request for its row, with and without encryption.
#[divan::bench(args = [false, true])]
fn encode_request(bencher: Bencher<'_, '_>, encrypted: bool) {
    let encoder = measured::Encoder::new(encrypted.then(keys));
    let request = Request::try_from(request()).expect("a request");
    bencher.bench(|| encoder.request(black_box(&request)));
}

struct Fixture {
    runtime: Runtime,
    durable: Durable,
    // Declared last, so that the handle is dropped before its database.
    _database: TestDatabase,
}

/// Whether requests carry a trace context, and attempts have spans.
#[derive(Clone, Copy, Debug)]
enum Traces {
    Without,
    Hook,
    OpenTelemetry,
}

/// The same context for each call.
struct Fixed(TraceContext);

impl TraceContextHook for Fixed {
    fn extract(&self) -> Option<TraceContext> {
        Some(self.0.clone())
    }
}

fn fixture(traces: Traces) -> Fixture {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let (durable, database) = runtime.block_on(async {
        let postgres = Postgres::shared().await.expect("a Postgres");
        let database = postgres.database().await.expect("a database");
        requeuest::migrate(database.pool()).await.expect("a schema");
        let builder = Durable::builder(database.pool().clone());
        let builder = match traces {
            Traces::Without => builder,
            Traces::Hook => {
                let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
                let context = TraceContext::new(parent).expect("a trace context");
                builder.trace_context(Fixed(context))
            }
            // Spans are recorded, and dropped instead of exported.
            Traces::OpenTelemetry => {
                let provider = SdkTracerProvider::builder().build();
                builder.open_telemetry(OpenTelemetry::new(&provider))
            }
        };
        let durable = builder
            .transport(service_fn(answer::<Body>))
            .build()
            .expect("a handle");
        // Opens the connections and prepares the statements.
        for _ in 0..10 {
            durable.await_response(request()).await.expect("an answer");
        }
        (durable, database)
    });
    Fixture {
        runtime,
        durable,
        _database: database,
    }
}

/// One call after another: no call shares its statements.
#[divan::bench(sample_count = 200)]
fn await_response_alone(bencher: Bencher<'_, '_>) {
    let fixture = fixture(Traces::Without);
    bencher.with_inputs(request).bench_local_values(|request| {
        let awaited = fixture.durable.await_response(request);
        fixture.runtime.block_on(awaited).expect("an answer");
    });
}

const TOGETHER: usize = 64;

/// Many concurrent calls, which share statements. The counts are totals of all calls.
#[divan::bench(
    sample_count = 200,
    args = [Traces::Without, Traces::Hook, Traces::OpenTelemetry],
)]
fn await_response_64_together(bencher: Bencher<'_, '_>, traces: Traces) {
    let fixture = fixture(traces);
    bencher
        .with_inputs(|| (0..TOGETHER).map(|_| request()).collect::<Vec<_>>())
        .input_counter(|requests| ItemsCount::new(requests.len()))
        .bench_local_values(|requests| {
            let calls = requests
                .into_iter()
                .map(|request| fixture.durable.await_response(request));
            for answered in fixture.runtime.block_on(join_all(calls)) {
                answered.expect("an answer");
            }
        });
}

/// The cost of a request that passes through a layer untouched, and of the same request without the
/// layer.
#[divan::bench(args = [false, true])]
fn pass_through(bencher: Bencher<'_, '_>, layered: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let _context = runtime.enter();
    let pool = requeuest::sqlx::PgPool::connect_lazy("postgres://localhost/unused");
    let durable = Durable::builder(pool.expect("a URL"))
        .runner(false)
        .pass_through(|_| true)
        .build()
        .expect("a handle");
    let bare = service_fn(answer::<Body>);
    let request = || request().map(Body::from);
    if layered {
        let mut service = durable.layer().layer(bare);
        bencher.with_inputs(request).bench_local_values(|request| {
            let ready = runtime.block_on(ServiceExt::<http::Request<Body>>::ready(&mut service));
            let answered = runtime.block_on(ready.expect("readiness").call(request));
            answered.expect("an answer");
        });
    } else {
        let mut service = bare;
        bencher.with_inputs(request).bench_local_values(|request| {
            let ready = runtime.block_on(ServiceExt::<http::Request<Body>>::ready(&mut service));
            let answered = runtime.block_on(ready.expect("readiness").call(request));
            answered.expect("an answer");
        });
    }
}
