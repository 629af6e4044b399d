//! Webhooks to many endpoints, some of them bad, and to the good ones alone.

use std::time::{Duration, Instant};

use requeuest::testkit::Postgres;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::common::report::Report;
use crate::common::{AnyError, request};
use crate::endpoint::{Behavior, Endpoint, Endpoints};
use crate::figures::{Delivery, Figures, Target, arrived, millis, times};
use crate::{Arguments, GRACE, drop_database, durable, migrated};

/// How many endpoints behave in each way.
const BEHAVIORS: [(usize, Behavior); 5] = [
    (160, Behavior::Good),
    (20, Behavior::Slow(Duration::from_secs(10))),
    (5, Behavior::Refusing),
    (5, Behavior::Silent),
    (10, Behavior::Limited),
];
/// How often the run looks for requests that are due.
const TICK: Duration = Duration::from_millis(1);

const MEDIAN: (&str, f64) = ("p50", 30.0);
const P99: (&str, f64) = ("p99", 1000.0);

pub(crate) async fn measure(
    postgres: &Postgres,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<(), AnyError> {
    println!(
        "\n{} webhooks a second for {} s to 200 endpoints: 160 good, 20 that take 10 s, 5 that \
         refuse connections,\n5 that never answer, and 10 that answer 429 more than once a second",
        arguments.rate,
        arguments.seconds.as_secs_f64(),
    );
    for good_only in [true, false] {
        side(postgres, arguments, report, good_only).await?;
    }
    Ok(())
}

/// Sends to all endpoints, or only what is for the good ones.
async fn side(
    postgres: &Postgres,
    arguments: &Arguments,
    report: &mut Report,
    good_only: bool,
) -> Result<(), AnyError> {
    let database = migrated(postgres).await?;
    let durable = durable(database.pool()).await?;
    let count = (arguments.rate as f64 * arguments.seconds.as_secs_f64()) as usize;
    let running = Endpoints::start(count)?;
    let endpoints = mixed(&running)?;
    let targets = |number: usize| &endpoints[number % endpoints.len()];

    let began = Instant::now();
    let due =
        |number: usize| began + Duration::from_secs_f64(number as f64 / arguments.rate as f64);
    let mut calls = JoinSet::new();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0..count {
        while due(number) > Instant::now() {
            ticks.tick().await;
        }
        let (is_good, endpoint) = targets(number);
        if good_only && !is_good {
            continue;
        }
        let request = request(&endpoint.numbered(number), &arguments.body);
        let (durable, due) = (durable.clone(), due(number));
        calls.spawn(async move {
            durable.fire(request).await?;
            Ok::<_, AnyError>(due.elapsed())
        });
    }
    let fired_until = Instant::now();
    let end = arguments.deadline(good_only);
    let mut returned = Vec::new();
    while let Some(call) = calls.join_next().await {
        returned.push(call??);
    }
    returned.sort_unstable();

    let good: Vec<_> = (0..count).filter(|&number| targets(number).0).collect();
    let arrivals = running.arrivals();
    arrivals.wait_for(good.iter().copied(), end).await;
    let deliveries: Vec<_> = good
        .into_iter()
        .map(|number| Delivery {
            due: due(number),
            arrived: arrivals.of(number),
        })
        .collect();

    let section = if good_only {
        "endpoints: the good ones alone"
    } else {
        "endpoints: all"
    };
    let mut figures = Figures::section(report, section);
    let (arrived, all) = (arrived(&deliveries), deliveries.len());
    figures.show(
        "arrived at good ones",
        arrived as f64,
        "",
        Some(Target::AtLeast(all as f64)),
    );
    let times = times(&deliveries, end);
    figures.times("fire to arrival at good ones", &times, &[MEDIAN, P99]);
    let gap = longest_gap(&deliveries, began, end);
    figures.show("longest gap of arrivals there", millis(gap), "ms", None);
    figures.times("fire until it returned", &returned, &[]);
    figures.show(
        "firing took",
        (fired_until - began).as_secs_f64(),
        "s",
        None,
    );
    arrivals.expect_once()?;
    if good_only && arrived < all {
        return Err(format!("{arrived} of {all} webhooks arrived").into());
    }
    durable.shutdown(GRACE).await?;
    drop_database(postgres, &database).await
}

/// The endpoints, and whether each is good, in an order in which the bad ones are spread evenly.
fn mixed(running: &Endpoints) -> Result<Vec<(bool, Endpoint)>, AnyError> {
    let mut placed = Vec::new();
    for (count, behavior) in BEHAVIORS {
        for number in 0..count {
            let place = (number as f64 + 0.5) / count as f64;
            let is_good = matches!(behavior, Behavior::Good);
            placed.push((place, (is_good, running.add(behavior)?)));
        }
    }
    placed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    Ok(placed.into_iter().map(|(_, endpoint)| endpoint).collect())
}

/// The longest time without an arrival, from the start to the last arrival, or to the end if there
/// is a request that hasn't arrived.
fn longest_gap(deliveries: &[Delivery], began: Instant, end: Instant) -> Duration {
    let mut moments = vec![began];
    moments.extend(deliveries.iter().map(|one| one.arrived.unwrap_or(end)));
    moments.sort_unstable();
    let gaps = moments.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().unwrap_or_default()
}
