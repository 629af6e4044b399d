//! New requests to healthy receivers, with and without a backlog for bad ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use requeuest::sqlx::{self, PgPool};
use requeuest::testkit::Postgres;
use requeuest::{Durable, Options, Request};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::common::report::Report;
use crate::common::{AnyError, request};
use crate::endpoint::{Behavior, Endpoint, Endpoints};
use crate::figures::{Delivery, Figures, Target, arrived, times};
use crate::{Arguments, GRACE, drop_database, durable, migrated};

/// Single requests through `fire`, and as many through `fire_in`.
const SINGLE: usize = 50;
/// Time from one of them to the next.
const PACE: Duration = Duration::from_millis(25);
/// Healthy receivers that share the calls and the drain.
const HEALTHY: usize = 8;
/// How long the slow receiver takes for each answer.
const SLOW: Duration = Duration::from_secs(1);
/// Requests inserted with one call.
const LUMP: usize = 20_000;
/// Requests for each ordering key.
const IN_KEY: usize = 2;
/// Makes the first request of each of $1 keys as it is after one failed attempt. The retries fall
/// due one after the other.
const FAILED_ONCE: &str = "
    UPDATE requeuest.mq_msgs m
    SET attempts = 1, began_at = now(), attempt_at = now() + random() * $1 * interval '50 us'
    FROM (
        SELECT DISTINCT ON (channel_args) id FROM requeuest.mq_msgs
        WHERE seq IS NOT NULL ORDER BY channel_args, seq
    ) first
    WHERE m.id = first.id";
/// How long the runner works on the backlog before the measurement.
const WARM_UP: Duration = Duration::from_secs(2);
/// Longer than any preparation may take.
const PREPARATION: Duration = Duration::from_secs(600);

const MEDIAN: (&str, f64) = ("p50", 250.0);
const P99: (&str, f64) = ("p99", 1000.0);
const RATIO: Target = Target::AtLeast(0.8);

pub(crate) async fn measure(
    postgres: &Postgres,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<(), AnyError> {
    println!(
        "\n{rows} requests wait for a receiver that takes {} s an answer and {rows} for one that \
         never answers,\nand {} ordering keys retry their first request",
        SLOW.as_secs(),
        arguments.keys,
        rows = arguments.rows,
    );
    let without = side(postgres, arguments, report, false).await?;
    let with = side(postgres, arguments, report, true).await?;
    let mut figures = Figures::section(report, "backlog: rates with it / without it");
    for (name, with, without) in [
        ("await_response", with.awaited, without.awaited),
        ("drain", with.drained, without.drained),
    ] {
        figures.show(name, with / without, "×", Some(RATIO));
    }
    Ok(())
}

/// Requests per second.
struct Rates {
    awaited: f64,
    drained: f64,
}

/// Measures everything with the backlog, or without it.
async fn side(
    postgres: &Postgres,
    arguments: &Arguments,
    report: &mut Report,
    with: bool,
) -> Result<Rates, AnyError> {
    let database = migrated(postgres).await?;
    let endpoints = Endpoints::start(2 * SINGLE + arguments.drain)?;
    let bad = if with {
        Some(Bad::prepare(database.pool(), &endpoints, arguments).await?)
    } else {
        None
    };
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(database.pool()).await?;
    }
    let healthy: Result<Vec<_>, _> = (0..HEALTHY)
        .map(|_| endpoints.add(Behavior::Good))
        .collect();
    let bench = Bench {
        durable: durable(database.pool()).await?,
        endpoints: &endpoints,
        healthy: healthy?,
        arguments,
        all_good: !with,
    };
    let mut before = [0; 3];
    if let Some(bad) = &bad {
        bad.slow.wait_for(1, PREPARATION).await?;
        bad.silent.wait_for(1, PREPARATION).await?;
        tokio::time::sleep(WARM_UP).await;
        before = bad.received();
    }
    let section = if with { "with it" } else { "without it" };
    let mut figures = Figures::section(report, format!("backlog: {section}"));
    bench.single(&mut figures).await?;
    let rates = Rates {
        awaited: bench.awaited(&mut figures).await?,
        drained: bench.drained(&mut figures).await?,
    };
    if let Some(bad) = &bad {
        let names = ["slow receiver", "one that never answers", "keys' receiver"];
        for ((name, before), after) in names.into_iter().zip(before).zip(bad.received()) {
            let name = format!("meanwhile, attempts at the {name}");
            figures.show(&name, (after - before) as f64, "", None);
        }
    }
    endpoints.arrivals().expect_once()?;
    bench.durable.shutdown(GRACE).await?;
    drop_database(postgres, &database).await?;
    Ok(rates)
}

/// The receivers that a backlog waits for.
struct Bad {
    slow: Endpoint,
    silent: Endpoint,
    /// The receiver of the ordering keys.
    failing: Endpoint,
}

impl Bad {
    fn received(&self) -> [usize; 3] {
        [&self.slow, &self.silent, &self.failing].map(Endpoint::received)
    }

    /// Inserts the backlog. The first request of each ordering key has failed once. Otherwise, it
    /// would depend on the rest of the backlog when the keys begin to be retried.
    async fn prepare(
        pool: &PgPool,
        endpoints: &Endpoints,
        arguments: &Arguments,
    ) -> Result<Self, AnyError> {
        let (slow, silent, failing) = (
            endpoints.add(Behavior::Slow(SLOW))?,
            endpoints.add(Behavior::Silent)?,
            endpoints.add(Behavior::Unavailable)?,
        );
        let enqueuer = Durable::builder(pool.clone()).runner(false).build()?;
        let ordered = (0..arguments.keys * IN_KEY).map(|number| {
            let key = format!("key {}", number / IN_KEY);
            let request = Request::try_from(request(&failing.url(), &arguments.body))?;
            Ok(request.with(Options::default().ordered(key)))
        });
        let ordered: Vec<Request> = ordered.collect::<Result<_, requeuest::Error>>()?;
        enqueuer.fire_many(ordered).await?;
        sqlx::query(FAILED_ONCE)
            .bind(arguments.keys as i64)
            .execute(pool)
            .await?;
        let began = Instant::now();
        let (slow_url, silent_url) = (slow.url(), silent.url());
        for first in (0..arguments.rows).step_by(LUMP / 2) {
            let rows = (arguments.rows - first).min(LUMP / 2);
            let lump = (0..rows)
                .flat_map(|_| [&slow_url, &silent_url].map(|url| request(url, &arguments.body)));
            enqueuer.fire_many(lump).await?;
        }
        println!(
            "\ninserted the backlog in {:.1} s",
            began.elapsed().as_secs_f64()
        );
        enqueuer.shutdown(GRACE).await?;
        Ok(Self {
            slow,
            silent,
            failing,
        })
    }
}

struct Bench<'a> {
    durable: Durable,
    endpoints: &'a Endpoints,
    healthy: Vec<Endpoint>,
    arguments: &'a Arguments,
    all_good: bool,
}

impl Bench<'_> {
    /// Fires single requests in turn through `fire` and in transactions. The latter wait for a
    /// poll. All of them have one destination.
    async fn single(&self, figures: &mut Figures<'_>) -> Result<(), AnyError> {
        let receiver = &self.healthy[0];
        let mut due = Vec::new();
        let mut ticks = tokio::time::interval(PACE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 0..2 * SINGLE {
            ticks.tick().await;
            let request = request(&receiver.numbered(number), &self.arguments.body);
            if number % 2 == 0 {
                due.push(Instant::now());
                self.durable.fire(request).await?;
            } else {
                let mut transaction = self.durable.pool().begin().await?;
                self.durable.fire_in(&mut *transaction, request).await?;
                due.push(Instant::now());
                transaction.commit().await?;
            }
        }
        let end = self.arguments.deadline(self.all_good);
        let arrivals = self.endpoints.arrivals();
        arrivals.wait_for(0..due.len(), end).await;
        for (name, odd) in [("fire", 0), ("fire_in", 1)] {
            let these = due.iter().enumerate().skip(odd).step_by(2);
            let deliveries: Vec<_> = these
                .map(|(number, &due)| Delivery {
                    due,
                    arrived: arrivals.of(number),
                })
                .collect();
            self.count(figures, &format!("{name}: arrived"), &deliveries)?;
            let times = times(&deliveries, end);
            figures.times(&format!("{name}, to arrival"), &times, &[MEDIAN, P99]);
        }
        Ok(())
    }

    /// The rate of calls that complete within the time.
    async fn awaited(&self, figures: &mut Figures<'_>) -> Result<f64, AnyError> {
        let completed = Arc::new(AtomicUsize::new(0));
        let mut callers = JoinSet::new();
        let began = Instant::now();
        for caller in 0..self.arguments.callers {
            let (durable, completed) = (self.durable.clone(), Arc::clone(&completed));
            let url = self.healthy[caller % HEALTHY].url();
            let body = self.arguments.body.clone();
            callers.spawn(async move {
                loop {
                    durable.await_response(request(&url, &body)).await?;
                    completed.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let failed = tokio::time::timeout(self.arguments.seconds / 2, callers.join_next()).await;
        let rate = completed.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
        // A caller returns only if its call fails.
        if let Ok(Some(caller)) = failed {
            let never: Result<(), AnyError> = caller?;
            never?;
        }
        callers.shutdown().await;
        figures.show("await_response", rate, "/s", None);
        Ok(rate)
    }

    /// The rate from the call of `fire_many` to the last arrival.
    async fn drained(&self, figures: &mut Figures<'_>) -> Result<f64, AnyError> {
        let numbers = 2 * SINGLE..2 * SINGLE + self.arguments.drain;
        let requests = numbers.clone().map(|number| {
            let receiver = &self.healthy[number % HEALTHY];
            request(&receiver.numbered(number), &self.arguments.body)
        });
        let due = Instant::now();
        self.durable.fire_many(requests).await?;
        let end = self.arguments.deadline(self.all_good);
        let arrivals = self.endpoints.arrivals();
        arrivals.wait_for(numbers.clone(), end).await;
        let deliveries: Vec<_> = numbers
            .map(|number| Delivery {
                due,
                arrived: arrivals.of(number),
            })
            .collect();
        self.count(figures, "drain: arrived", &deliveries)?;
        let took = times(&deliveries, end).last().copied().unwrap_or_default();
        let rate = arrived(&deliveries) as f64 / took.as_secs_f64();
        figures.show("drain", rate, "/s", None);
        Ok(rate)
    }

    fn count(
        &self,
        figures: &mut Figures<'_>,
        name: &str,
        deliveries: &[Delivery],
    ) -> Result<(), AnyError> {
        let (arrived, all) = (arrived(deliveries), deliveries.len());
        figures.show(name, arrived as f64, "", Some(Target::AtLeast(all as f64)));
        if self.all_good && arrived < all {
            return Err(format!("{name}: {arrived} of {all}").into());
        }
        Ok(())
    }
}
