//! What a supervisor and a load balancer ask a runner.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use requeuest::Durable;
use requeuest::http::{Method, Request, Response, StatusCode};
use requeuest::metrics::{BATCH_SIZE_BUCKETS, DURATION_BUCKETS};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// How many clients are served at once.
const MAX_CLIENTS: usize = 64;
/// How long the database may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often the exporter folds what was measured, which it otherwise keeps until it is asked.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the exporter of this process. A recorder that is made before it describes nothing.
pub(crate) fn exporter() -> Result<PrometheusHandle, BuildError> {
    let exporter = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)?
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &BATCH_SIZE_BUCKETS)?
        .install_recorder()?;
    let upkeep = exporter.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    Ok(exporter)
}

/// What is known of this process.
#[derive(Clone)]
pub(crate) struct Health {
    durable: Durable,
    metrics: PrometheusHandle,
    is_stopping: Arc<AtomicBool>,
}

impl Health {
    pub(crate) fn new(durable: Durable, metrics: PrometheusHandle) -> Self {
        Self {
            durable,
            metrics,
            is_stopping: Arc::default(),
        }
    }

    /// From now on, the process is not ready.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    async fn answer(&self, method: &Method, path: &str) -> (StatusCode, String) {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
        }
        match path {
            // The process answers. A database that is away is no reason to restart it.
            "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match self.readiness().await {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
            },
            "/metrics" => (StatusCode::OK, self.metrics.render()),
            _ => (
                StatusCode::NOT_FOUND,
                "see /healthz, /readyz and /metrics\n".to_owned(),
            ),
        }
    }

    /// Whether the process delivers: its own runner is registered in the database.
    async fn readiness(&self) -> Result<(), &'static str> {
        if self.is_stopping.load(Ordering::Relaxed) {
            return Err("stopping");
        }
        let runners = tokio::time::timeout(PATIENCE, self.durable.runners()).await;
        let Ok(Ok(runners)) = runners else {
            return Err("the database doesn't answer");
        };
        if runners
            .iter()
            .any(|runner| runner.pid == std::process::id())
        {
            Ok(())
        } else {
            Err("the runner has not registered yet")
        }
    }
}

/// Serves until the process ends.
pub(crate) async fn serve(listener: TcpListener, health: Health) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            // No descriptor is free, for example.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let health = health.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let health = health.clone();
                async move {
                    let path = request.uri().path();
                    let (status, text) = health.answer(request.method(), path).await;
                    let mut response = Response::new(Full::new(Bytes::from(text)));
                    *response.status_mut() = status;
                    Ok::<_, Infallible>(response)
                }
            });
            // A client may leave at any time.
            let _ = http1::Builder::new()
                .keep_alive(false)
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(permit);
        });
    }
}
