//! How many requests a second go all the way: persisted, sent, answered, settled.
//!
//! `cargo bench --bench end_to_end -- --callers 64 --requests 20000`
//!
//! The receiver, Postgres (with `fsync` on) and the callers share the machine. Beside the durable calls it measures, in the same
//! run, what bounds them: the exchange alone and bare one-row commits. Compare ratios within one run; absolute figures
//! vary with the machine.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use requeuest::Durable;
use requeuest::testkit::Postgres;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

type AnyError = Box<dyn std::error::Error + Send + Sync>;

const BODY: Bytes = Bytes::from_static(&[b'x'; 256]);

fn main() -> Result<(), AnyError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run())
}

async fn run() -> Result<(), AnyError> {
    let callers = argument("--callers")?.unwrap_or(64);
    let requests = argument("--requests")?.unwrap_or(20_000) / callers * callers;
    let postgres = Postgres::builder().config("fsync", "on").start().await?;
    let database = postgres.database().await?;
    requeuest::migrate(database.pool()).await?;
    let (url, received) = receiver().await?;
    println!(
        "{requests} requests of {} bytes from {callers} callers",
        BODY.len()
    );

    let client = reqwest::Client::new();
    let bare = each(callers, requests, || {
        let (client, url) = (client.clone(), url.clone());
        async move {
            client.post(&url).body(BODY).send().await?.bytes().await?;
            Ok(())
        }
    })
    .await?;
    report("the exchange alone", requests, bare);

    sqlx::query("CREATE TABLE bare (id uuid PRIMARY KEY, body bytea)")
        .execute(database.pool())
        .await?;
    let commits = (requests / 4).max(callers) / callers * callers;
    let bare = each(callers, commits, || async {
        sqlx::query("INSERT INTO bare VALUES (gen_random_uuid(), $1)")
            .bind(&BODY[..])
            .execute(database.pool())
            .await?;
        Ok(())
    })
    .await?;
    report("bare one-row commits", commits, bare);

    let durable = Durable::new(database.pool().clone());
    let request = || http::Request::post(&url).body(BODY);
    durable.await_response(request()?).await?;

    let took = each(callers, requests, || async {
        durable.await_response(request()?).await?;
        Ok(())
    })
    .await?;
    report("await_response", requests, took);

    let before = received.load(Ordering::Relaxed);
    let began = Instant::now();
    let enqueued = each(callers, requests, || async {
        durable.fire(request()?).await?;
        Ok(())
    })
    .await?;
    report("fire, until enqueued", requests, enqueued);
    let unfinished = "SELECT count(*) FROM requeuest.mq_msgs";
    loop {
        let left: i64 = sqlx::query_scalar(unfinished)
            .fetch_one(database.pool())
            .await?;
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    report("fire, until all are settled", requests, began.elapsed());
    let got = received.load(Ordering::Relaxed) - before;
    if got != requests {
        return Err(format!("{requests} were fired and {got} received").into());
    }
    durable.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}

/// Runs a task `count` times over as many concurrent callers.
async fn each<F, T>(callers: usize, count: usize, task: F) -> Result<Duration, AnyError>
where
    F: Fn() -> T,
    T: Future<Output = Result<(), AnyError>>,
{
    let began = Instant::now();
    let one = || async {
        for _ in 0..count / callers {
            task().await?;
        }
        Ok::<_, AnyError>(())
    };
    futures_util::future::try_join_all((0..callers).map(|_| one())).await?;
    Ok(began.elapsed())
}

fn report(what: &str, count: usize, took: Duration) {
    let rate = count as u128 * 1_000_000 / took.as_micros().max(1);
    println!("{what:<28} {rate:>8}/s");
}

fn argument(name: &str) -> Result<Option<usize>, AnyError> {
    let mut arguments = std::env::args()
        .skip_while(|argument| argument != name)
        .skip(1);
    Ok(arguments.next().map(|value| value.parse()).transpose()?)
}

/// A server on its own thread that counts what it gets.
async fn receiver() -> Result<(String, Arc<AtomicUsize>), AnyError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = format!("http://{}/", listener.local_addr()?);
    let received = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&received);
    let mut connections = JoinSet::new();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let counter = Arc::clone(&counter);
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let counter = Arc::clone(&counter);
                async move {
                    let _ = request.into_body().collect().await;
                    counter.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from_static(b"ok"))))
                }
            });
            connections.spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    Ok((url, received))
}
