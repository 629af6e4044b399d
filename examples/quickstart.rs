//! What requeuest does, in a few seconds and without any setup: a call survives a failing server,
//! and other calls survive the process that made them.
//!
//! `cargo run --example quickstart`

use std::env;
use std::future::pending;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, REQUEST_ID_HEADER, RequestId, Status, StatusCode, migrate};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
use sqlx::PgPool;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

mod support;
use support::{Result, Server, say};

/// The time until another process takes over a dead process's requests. Defaults to 15 seconds.
const LEASE: Duration = Duration::from_secs(2);
const WORKER_ORDERS: usize = 6;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match &*arguments {
        [] => timeout(Duration::from_secs(60), story()).await?,
        [role, url] if role == "worker" => worker(&env::var("DATABASE_URL")?, url).await,
        _ => Err("usage: quickstart".into()),
    }
}

async fn story() -> Result<()> {
    say("finding or starting a Postgres");
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let version: String = sqlx::query_scalar("SHOW server_version")
        .fetch_one(database.pool())
        .await?;
    say(format!("Postgres {version} is up and migrated"));

    let (held, mut on_hold) = mpsc::unbounded_channel();
    let overloaded = Arc::new(AtomicBool::new(true));
    let server = server(Arc::clone(&overloaded), held).await?;
    say(format!("a server listens on {}", server.url()));

    let (client, durable) = client(database.pool().clone())?;
    await_an_answer(&client, &server).await?;
    fire_and_forget(&client, &durable, &server).await?;

    say("");
    say("3. Kill a process in the middle of its calls");
    let (mut worker, mut lines) = start_worker(database.url(), &server)?;
    let pid = worker.id().unwrap_or_default();
    say(format!("process {pid} fires {WORKER_ORDERS} calls"));
    let mut calls = Vec::new();
    for _ in 0..WORKER_ORDERS {
        let line = lines.next_line().await?.ok_or("the worker ended early")?;
        let (order, id) = line.split_once(' ').ok_or("unexpected worker output")?;
        calls.push((order.to_owned(), id.parse::<RequestId>()?));
    }
    let (answered, stuck): (Vec<_>, Vec<_>) =
        calls.into_iter().partition(|(order, _)| !is_heavy(order));
    for (_, id) in &answered {
        assert_eq!(durable.response(*id).await?.status(), StatusCode::OK);
    }
    for _ in &stuck {
        on_hold.recv().await.ok_or("the server is gone")?;
    }
    for (_, id) in &stuck {
        assert_eq!(durable.status(*id).await?, Some(Status::Running));
    }
    overloaded.store(false, Ordering::Relaxed);
    worker.start_kill()?;
    assert!(!worker.wait().await?.success());
    let killed = Instant::now();
    say(format!(
        "process {pid} is killed: {} calls were answered, {} were sent without a response",
        answered.len(),
        stuck.len()
    ));
    say(format!(
        "this process takes over the rest once their lease of {LEASE:?} expires"
    ));
    for (order, id) in &stuck {
        assert_eq!(durable.response(*id).await?.status(), StatusCode::OK);
        let times = arrivals(&server, order);
        assert!(times >= 2, "{order} arrived {times} times");
    }
    say(format!(
        "all calls are answered, {:.1} s after the kill",
        killed.elapsed().as_secs_f64()
    ));

    say("");
    say("Every call has arrived, some of them twice. That is `at least once`: the server");
    say("recognises a repetition by an identifier in the call, here the order's name.");
    durable.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}

/// The caller's code, which doesn't know about retries.
async fn await_an_answer(client: &ClientWithMiddleware, server: &Server) -> Result<()> {
    say("");
    say("1. Await a response from a server that fails at first");
    let began = Instant::now();
    let response = client.post(server.url()).body("order-1").send().await?;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(arrivals(server, "order-1"), 3);
    say(format!(
        "the caller waited for {:.1} s and got one response: {:?}",
        began.elapsed().as_secs_f64(),
        response.text().await?
    ));
    Ok(())
}

async fn fire_and_forget(
    client: &ClientWithMiddleware,
    durable: &Durable,
    server: &Server,
) -> Result<()> {
    say("");
    say("2. Fire and forget");
    let began = Instant::now();
    let id = fire(client, &server.url(), "order-2").await?;
    say(format!(
        "persisted in {:.1} ms as {id}",
        began.elapsed().as_secs_f64() * 1000.0
    ));
    let response = durable.response(id).await?;
    assert_eq!(response.status(), StatusCode::OK);
    say(format!(
        "its response can be read later: {:?}",
        response.text()?
    ));
    Ok(())
}

/// The application's existing client with one more middleware.
fn client(pool: PgPool) -> Result<(ClientWithMiddleware, Durable)> {
    let durable = Durable::builder(pool)
        .lease(LEASE)
        .attempt_timeout(Duration::from_secs(5))
        .build()?;
    let client = ClientBuilder::new(reqwest::Client::new())
        .with(durable.clone())
        .build();
    Ok((client, durable))
}

async fn fire(client: &ClientWithMiddleware, url: &str, order: &str) -> Result<RequestId> {
    let response = client
        .post(url)
        .body(order.to_owned())
        .with_extension(Options::default().fire())
        .send()
        .await?;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    Ok(response.headers()[REQUEST_ID_HEADER].to_str()?.parse()?)
}

/// The process that will be killed.
async fn worker(database: &str, url: &str) -> Result<()> {
    let (client, _durable) = client(PgPool::connect(database).await?)?;
    for number in 1..=WORKER_ORDERS {
        let heavy = if number % 2 == 0 { "heavy-" } else { "" };
        let order = format!("{heavy}order-{}", number + 2);
        let id = fire(&client, url, &order).await?;
        println!("{order} {id}");
    }
    // Returns only if the parent process ends. The parent kills this process before that.
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

fn start_worker(database: &str, server: &Server) -> Result<(Child, Lines<BufReader<ChildStdout>>)> {
    let mut worker = Command::new(env::current_exe()?)
        .args(["worker", &server.url()])
        .env("DATABASE_URL", database)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = worker.stdout.take().ok_or("the worker has no output")?;
    Ok((worker, BufReader::new(stdout).lines()))
}

/// Refuses its first two calls. While overloaded, it doesn't answer heavy calls.
async fn server(overloaded: Arc<AtomicBool>, held: mpsc::UnboundedSender<()>) -> Result<Server> {
    Server::start(move |number, order| {
        let (overloaded, held) = (Arc::clone(&overloaded), held.clone());
        async move {
            if number <= 2 {
                return 503;
            }
            if is_heavy(&order) && overloaded.load(Ordering::Relaxed) {
                say(format!("    server: {order:?} -> (no response)"));
                // Fails once `story` has returned, which is fine.
                let _ = held.send(());
                pending::<()>().await;
            }
            200
        }
    })
    .await
}

fn is_heavy(order: &str) -> bool {
    order.starts_with("heavy")
}

fn arrivals(server: &Server, order: &str) -> usize {
    server
        .received()
        .iter()
        .filter(|body| *body == order)
        .count()
}
