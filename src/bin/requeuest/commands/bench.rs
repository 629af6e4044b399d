//! `requeuest bench`: how fast this database and this machine enqueue and deliver.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use requeuest::Durable;
use requeuest::http::{Request, Response};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::confirm::{self, Yes};
use crate::failure::{Code, Failure};
use crate::json;
use crate::out::Out;
use crate::table::Table;
use crate::target::Target;
use crate::when;

/// How long all requests may take to arrive.
const PATIENCE: Duration = Duration::from_secs(300);
/// Outcomes of the measurement are deleted soon.
const RETENTION: Duration = Duration::from_secs(60);

#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// How many requests
    #[arg(long, short = 'n', value_name = "NUMBER", default_value_t = 2000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// How many callers enqueue at once, and how many attempts are under way at once
    #[arg(long, value_name = "NUMBER", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
    /// How many bytes each body has
    #[arg(long, value_name = "BYTES", default_value_t = 200)]
    body: usize,
    #[command(flatten)]
    yes: Yes,
}

/// When each request was enqueued and when it arrived.
#[derive(Debug, Default)]
struct Clock {
    enqueued: Vec<Option<Instant>>,
    arrived: Vec<Option<Instant>>,
    missing: usize,
}

impl Bench {
    /// Writes into the target's schema, in a channel of its own, and sends to a receiver of its own
    /// on a loopback port.
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        confirm::change(out, target, &self.yes)?;
        drop(target.admin().await?);
        let number = self.requests as usize;
        let clock = Arc::new(Mutex::new(Clock {
            enqueued: vec![None; number],
            arrived: vec![None; number],
            missing: number,
        }));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let receiver = tokio::spawn(receive(listener, Arc::clone(&clock)));
        let channel = format!("requeuest-bench-{}", std::process::id());
        let durable = target
            .builder()
            .channel(channel)
            .concurrency(self.concurrency as usize)
            .max_share(1.0)
            .retention(RETENTION)
            .build()?;
        let began = Instant::now();
        let calls = self
            .enqueue(&durable, &format!("http://{address}/"), &clock)
            .await?;
        let enqueued = began.elapsed();
        let delivered = tokio::time::timeout(PATIENCE, all_arrived(&clock)).await;
        let took = began.elapsed();
        durable.shutdown(Duration::from_secs(10)).await?;
        receiver.abort();
        if delivered.is_err() {
            let missing = lock(&clock).missing;
            return Err(Failure::new(
                Code::Failed,
                format!("{missing} of {number} requests have not arrived"),
            ));
        }
        let (arrivals, last) = arrivals(&clock, began);
        let took = last.unwrap_or(took);
        self.report(
            [("enqueue", enqueued, calls), ("deliver", took, arrivals)],
            out,
        )
    }

    /// Fires all requests, and returns how long each call took.
    async fn enqueue(
        &self,
        durable: &Durable,
        url: &str,
        clock: &Arc<Mutex<Clock>>,
    ) -> Result<Vec<Duration>, Failure> {
        let body = Bytes::from(vec![b'x'; self.body]);
        let mut callers = JoinSet::new();
        for caller in 0..self.concurrency {
            let (durable, clock) = (durable.clone(), Arc::clone(clock));
            let (body, url) = (body.clone(), url.to_owned());
            let numbers = (caller..self.requests).step_by(self.concurrency as usize);
            callers.spawn(async move {
                let mut calls = Vec::new();
                for number in numbers {
                    let request = Request::post(format!("{url}{number}")).body(body.clone());
                    let request = request.map_err(Failure::usage)?;
                    let began = Instant::now();
                    lock(&clock).enqueued[number as usize] = Some(began);
                    durable.fire(request).await?;
                    calls.push(began.elapsed());
                }
                Ok::<_, Failure>(calls)
            });
        }
        let mut calls = Vec::new();
        while let Some(done) = callers.join_next().await {
            calls.extend(done.map_err(|error| Failure::new(Code::Failed, error))??);
        }
        Ok(calls)
    }

    fn report(
        &self,
        parts: [(&'static str, Duration, Vec<Duration>); 2],
        out: &mut Out,
    ) -> Result<(), Failure> {
        let number = f64::from(self.requests);
        let mut table = Table::new(["", "requests/s", "p50", "p95", "p99", "longest"]);
        let mut document = serde_json::Map::new();
        for (name, took, mut times) in parts {
            times.sort_unstable();
            let rate = number / took.as_secs_f64().max(f64::MIN_POSITIVE);
            let of = |percent| percentile(&times, percent);
            let shown = |percent| when::rough(of(percent));
            table.row([
                name.into(),
                format!("{rate:.0}").into(),
                shown(50).into(),
                shown(95).into(),
                shown(99).into(),
                shown(100).into(),
            ]);
            let measured = json!({
                "seconds": json::duration(took),
                "requests_per_second": rate.round(),
                "p50": json::duration(of(50)),
                "p95": json::duration(of(95)),
                "p99": json::duration(of(99)),
                "longest": json::duration(of(100)),
            });
            document.insert(name.to_owned(), measured);
        }
        if out.json {
            document.insert("requests".to_owned(), self.requests.into());
            return out.document(&Value::Object(document));
        }
        out.table(&table)
    }
}

/// Of sorted times, the one that this share of them doesn't exceed.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    let place = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(place).copied().unwrap_or_default()
}

fn lock(clock: &Mutex<Clock>) -> std::sync::MutexGuard<'_, Clock> {
    clock
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn all_arrived(clock: &Mutex<Clock>) {
    while lock(clock).missing > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// How long each request took from its call to the receiver, and when the last one arrived.
fn arrivals(clock: &Mutex<Clock>, began: Instant) -> (Vec<Duration>, Option<Duration>) {
    let clock = lock(clock);
    let pairs = clock.enqueued.iter().zip(&clock.arrived);
    let took = pairs.filter_map(|(from, to)| Some(to.as_ref()?.duration_since((*from)?)));
    let last = clock.arrived.iter().flatten().max();
    (took.collect(), last.map(|last| last.duration_since(began)))
}

/// Answers every request, and notes when it arrived.
async fn receive(listener: TcpListener, clock: Arc<Mutex<Clock>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let clock = Arc::clone(&clock);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let number = request
                    .uri()
                    .path()
                    .trim_start_matches('/')
                    .parse::<usize>();
                if let Ok(number) = number {
                    let mut clock = lock(&clock);
                    // A request may arrive twice; the first time counts.
                    if let Some(arrived @ None) = clock.arrived.get_mut(number) {
                        *arrived = Some(Instant::now());
                        clock.missing -= 1;
                    }
                }
                async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::new()))) }
            });
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_times() {
        let times: Vec<_> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(100));
        assert_eq!(percentile(&times, 99), Duration::from_millis(198));
        assert_eq!(percentile(&times, 100), Duration::from_millis(200));
        assert_eq!(percentile(&times[..1], 50), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
