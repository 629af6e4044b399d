//! Many requests at once: all of them are persisted, or none.
//!
//! `cargo run --example fire_many`

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use axum::Router;
use axum::routing::post;
use futures_util::future::try_join_all;
use requeuest::testkit::Postgres;
use requeuest::{Durable, HeaderMap, Request, Url, migrate};
use tokio::net::TcpListener;

const MANY: usize = 2_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let received = Arc::new(AtomicUsize::new(0));
    let url = server(Arc::clone(&received)).await?;
    let durable = Durable::new(database.pool().clone());
    let hook = |number: usize| {
        let body = format!("hook {number}").into_bytes();
        Request::post(url.clone(), body, HeaderMap::new())
    };

    // An iterator is enough: the requests are made as they are written.
    let began = Instant::now();
    let ids = durable.fire_many((1..=MANY).map(hook)).await?;
    println!("{MANY} requests persisted after {:.1?}", began.elapsed());
    let answers = ids.into_iter().map(|id| durable.response(id));
    let answers = try_join_all(answers).await?;
    assert!(answers.iter().all(|answer| answer.status().is_success()));
    println!("all of them answered after {:.1?}", began.elapsed());

    // A request that is refused keeps all others out.
    let ftp = Url::parse("ftp://example.com/")?;
    let refused = Request::post(ftp, Vec::new(), HeaderMap::new());
    let error = durable.fire_many([hook(1), refused]).await.unwrap_err();
    assert_eq!(error.field(), Some("url"));
    println!("none of these two is persisted: {error}");

    // In your own transaction, a rollback takes all of them back.
    let mut transaction = database.pool().begin().await?;
    let hooks = (1..=MANY).map(hook);
    let ids = durable.fire_many_in(&mut transaction, hooks).await?;
    transaction.rollback().await?;
    assert_eq!(durable.status(ids[0]).await?, None);
    println!("a transaction with {MANY} more was rolled back");

    assert_eq!(received.load(Ordering::Relaxed), MANY);
    println!("the receiver got {MANY} requests");
    Ok(())
}

/// Counts what it receives. It ends with the process.
async fn server(received: Arc<AtomicUsize>) -> Result<Url, Box<dyn Error>> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let url = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
    let count = move || async move {
        received.fetch_add(1, Ordering::Relaxed);
    };
    let router = Router::new().route("/", post(count));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(url)
}
