//! Metrics for Prometheus: requests to a good and to a broken receiver, and what there is to see.
//!
//! `cargo run --features metrics --example metrics` prints the metrics after a while. With
//! `-- serve` it serves them on port 9000 until it is stopped, for `docs/grafana.json`.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use requeuest::metrics::{BATCH_SIZE_BUCKETS, DURATION_BUCKETS, MetricsRecorder};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, Request, migrate};
use tokio::net::TcpListener;
use tokio::time::sleep;

mod support;
use support::{Result, Server, say};

/// Installs the exporter. Its histograms need limits of buckets.
fn install() -> Result<PrometheusHandle> {
    let exporter = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &BATCH_SIZE_BUCKETS)?
        .install_recorder()?;
    let upkeep = exporter.clone();
    tokio::spawn(async move {
        loop {
            sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    Ok(exporter)
}

fn request(url: &str, body: &str, options: Options) -> Result<Request> {
    let request = http::Request::post(url).body(body.to_owned())?;
    Ok(Request::try_from(request)?.with(options))
}

#[tokio::main]
async fn main() -> Result<()> {
    let serves = std::env::args().any(|argument| argument == "serve");
    let exporter = install()?;
    let database = Postgres::start().await?.database().await?;
    migrate(database.pool()).await?;
    let good = Server::start(|_, _| async { 200 }).await?;
    let broken = Server::start(|number, _| async move { if number % 3 == 0 { 200 } else { 503 } });
    let broken = broken.await?;
    let durable = Durable::builder(database.pool().clone())
        .deliver_all()
        .recorder(Arc::new(MetricsRecorder::new()))
        .build()?;
    if serves {
        let metrics = exporter.clone();
        let app = Router::new().route("/metrics", get(move || async move { metrics.render() }));
        let listener = TcpListener::bind(("127.0.0.1", 9000)).await?;
        say("metrics are on http://127.0.0.1:9000/metrics");
        tokio::spawn(async move { axum::serve(listener, app).await });
    }
    let quick = RetryPolicy::exponential()
        .base(Duration::from_millis(50))
        .max_attempts(4);
    for round in 0.. {
        let orders = Options::default().channel("orders");
        durable
            .fire(request(&good.url(), "an order", orders)?)
            .await?;
        let hooks = Options::default().channel("hooks").retry(quick.clone());
        durable
            .fire(request(&broken.url(), "a hook", hooks)?)
            .await?;
        sleep(Duration::from_millis(100)).await;
        if round == 20 && !serves {
            break;
        }
    }
    durable.shutdown(Duration::from_secs(10)).await?;
    let attempts = good.received().len() + broken.received().len();
    say(format!("the receivers have seen {attempts} attempts"));
    println!("{}", exporter.render());
    Ok(())
}
