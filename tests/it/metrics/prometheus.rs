//! The metrics as Prometheus scrapes them, and the dashboard that shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use requeuest::metrics::{BATCH_SIZE_BUCKETS, DURATION_BUCKETS, MetricsRecorder};
use requeuest::retry::RetryPolicy;
use requeuest::{CircuitBreaker, DestinationPolicy, Options, RateLimit};
use serde_json::Value;

use super::{lapse, usurp};
use crate::support::{
    LONG, Server, builder, eventually_some, in_time, migrated, other_process, post, quick,
};

/// The samples of a metric: labels with their value.
type Samples = Vec<(BTreeMap<String, String>, f64)>;

fn recorder() -> PrometheusRecorder {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &DURATION_BUCKETS)
        .unwrap()
        .set_buckets_for_metric(Matcher::Suffix("_size".to_owned()), &BATCH_SIZE_BUCKETS)
        .unwrap()
        .build_recorder()
}

/// What was scraped, by the names of samples.
struct Scrape {
    samples: BTreeMap<String, Samples>,
}

impl Scrape {
    fn of(exporter: &PrometheusHandle) -> Self {
        let mut samples = BTreeMap::<_, Samples>::new();
        for line in exporter.render().lines() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels = labels.trim_end_matches('}').split("\",");
            let labels = labels.filter_map(|label| label.split_once("=\""));
            let labels = labels
                .map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned()));
            let sample = (labels.collect(), value.parse().unwrap());
            samples.entry(name.to_owned()).or_default().push(sample);
        }
        Self { samples }
    }

    /// The sum of the samples that have these labels. `None` if there are none.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let samples = self.samples.get(name)?.iter();
        let found = samples.filter(|(has, _)| {
            let mut labels = labels.iter();
            labels.all(|(name, value)| has.get(*name).is_some_and(|it| it == value))
        });
        let values: Vec<f64> = found.map(|(_, value)| *value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    fn labels(&self, name: &str) -> BTreeSet<&str> {
        let samples = self.samples[name].iter();
        let labels = samples.flat_map(|(labels, _)| labels.keys());
        labels.map(String::as_str).collect()
    }
}

async fn scraped(exporter: &PrometheusHandle, name: &str, labels: &[(&str, &str)], value: f64) {
    eventually_some(&format!("{value} in {name} {labels:?}"), || async {
        let found = Scrape::of(exporter).sum(name, labels)?;
        (found >= value).then_some(())
    })
    .await;
}

fn dashboard() -> Value {
    serde_json::from_str(include_str!("../../../docs/grafana.json")).unwrap()
}

/// The functions of the dashboard's expressions.
const FUNCTIONS: [&str; 6] = [
    "histogram_quantile",
    "increase",
    "max",
    "min",
    "rate",
    "sum",
];

/// The names that an expression uses, and the labels that it expects of each. Labels in `by (…)`
/// are expected of all.
fn used(expression: &str) -> (Vec<String>, BTreeSet<String>) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = |text: &str| {
        let words = text.split(|c| !is_word(c)).filter(|word| !word.is_empty());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut labels = BTreeSet::new();
    let mut rest = expression.to_owned();
    while let Some(at) = rest.find('{') {
        let end = at + rest[at..].find('}').unwrap();
        for matcher in rest[at + 1..end].split(',') {
            labels.extend(words(matcher).into_iter().next());
        }
        rest.replace_range(at..=end, " ");
    }
    while let Some(at) = rest.find("by (") {
        let end = at + rest[at..].find(')').unwrap();
        labels.extend(words(&rest[at + 4..end]));
        rest.replace_range(at..=end, " ");
    }
    while let Some(at) = rest.find('[') {
        let end = at + rest[at..].find(']').unwrap();
        rest.replace_range(at..=end, " ");
    }
    let mut names = Vec::new();
    for word in words(&rest) {
        let is_number = word.starts_with(|c: char| c.is_ascii_digit());
        if !is_number && !FUNCTIONS.contains(&&*word) {
            names.push(word);
        }
    }
    (names, labels)
}

#[tokio::test]
async fn each_metric_of_the_docs_and_the_dashboard_is_scraped_with_its_labels() {
    let recorder = recorder();
    let exporter = recorder.handle();
    // The test and all tasks of its handles run on this thread.
    let _installed = metrics::set_default_local_recorder(&recorder);
    let database = migrated().await;
    let (held, gate) = Server::held(200).await;
    let (limited, broken) = (Server::always(200).await, Server::always(500).await);
    let origin = |server: &Server| format!("http://{}", server.addr);
    let on = |channel: &str| Options::default().channel(channel);

    // What a handle finds when it starts: a request without a runner, one whose process is gone,
    // and a paused destination.
    let before = other_process(&database).await;
    let waits = post(held.url("/"), "x").with(on("undelivered"));
    before.fire(waits).await.unwrap();
    let claimed = post(held.url("/"), "x").with(on("a"));
    let lapsed = before.fire(claimed).await.unwrap();
    lapse(&database, lapsed).await;
    let paused = before.destination("paused").unwrap();
    paused.pause(None).await.unwrap();
    let rate = DestinationPolicy::default().rate(RateLimit::new(20, Duration::from_secs(1)));
    let breaker = CircuitBreaker::default().open_for(LONG).max_open_for(LONG);
    let durable = builder(&database)
        .channel("a")
        .recorder(Arc::new(MetricsRecorder::new()))
        .destination(origin(&limited), rate)
        .destination(
            origin(&broken),
            DestinationPolicy::default().circuit_breaker(breaker),
        )
        .retention(Duration::from_secs(60))
        .retry(quick())
        .build()
        .unwrap();
    for (name, labels) in [
        ("requeuest_queue_due", &[("channel", "undelivered")][..]),
        (
            "requeuest_destination_state",
            &[("destination", "paused"), ("state", "paused")],
        ),
        ("requeuest_queue_depth", &[("state", "due")]),
    ] {
        scraped(&exporter, name, labels, 1.0).await;
    }

    // A takeover, and a stale result.
    held.wait_for(1).await;
    scraped(&exporter, "requeuest_attempts_in_flight", &[], 1.0).await;
    usurp(&database, lapsed).await;
    gate.add_permits(1);

    // A dead letter, failed attempts, an open breaker, and requests over a limit.
    let dead = Options::default()
        .retry(RetryPolicy::none())
        .limit_key("dead");
    durable
        .fire(post(broken.url("/"), "x").with(dead))
        .await
        .unwrap();
    let to = |server: &Server, number| {
        let url = server.url("/");
        (0..number).map(move |_| post(&url, "x"))
    };
    durable.fire_many(to(&broken, 30)).await.unwrap();
    durable.fire_many(to(&limited, 30)).await.unwrap();
    let opened = (origin(&broken), origin(&limited));
    let opened = (&*opened.0, &*opened.1);
    let event = [("destination", opened.0), ("event", "opened")];
    for (name, labels, value) in [
        (
            "requeuest_leases_taken_over_total",
            &[("channel", "a")][..],
            1.0,
        ),
        ("requeuest_results_stale_total", &[], 1.0),
        ("requeuest_destination_events_total", &event, 1.0),
        (
            "requeuest_limiter_wait_seconds_count",
            &[("destination", opened.1)],
            1.0,
        ),
        (
            "requeuest_requests_finished_total",
            &[("status", "completed")],
            30.0,
        ),
        (
            "requeuest_dead_letters_total",
            &[("destination", "dead")],
            1.0,
        ),
        (
            "requeuest_sweep_last_success_age_seconds",
            &[("part", "outcomes")],
            0.0,
        ),
    ] {
        scraped(&exporter, name, labels, value).await;
    }

    let scrape = Scrape::of(&exporter);
    assert_numbers(&scrape);
    assert_documented(&scrape);
    assert_shown(&scrape);
    if std::env::var_os("REQUEUEST_PRINT_METRICS").is_some() {
        println!("{}", exporter.render());
    }
    in_time(durable.shutdown(Duration::ZERO)).await.unwrap();
}

/// What is known of the requests of the test.
fn assert_numbers(scrape: &Scrape) {
    let a = [("channel", "a")];
    for (name, labels, value) in [
        ("requeuest_requests_enqueued_total", &a[..], 61.0),
        (
            "requeuest_requests_finished_total",
            &[("channel", "a"), ("status", "completed")][..],
            30.0,
        ),
        ("requeuest_dead_letters_total", &[][..], 1.0),
        ("requeuest_results_stale_total", &[], 1.0),
        ("requeuest_leases_taken_over_total", &[], 1.0),
        (
            "requeuest_attempts_total",
            &[("destination", "dead"), ("result", "status")],
            1.0,
        ),
        // The stale result was an answer too.
        ("requeuest_attempts_total", &[("result", "success")], 31.0),
        ("requeuest_request_duration_seconds_count", &a, 31.0),
        ("requeuest_batches_failed_total", &[], 0.0),
        ("requeuest_enqueue_duration_seconds_count", &[], 1.0),
    ] {
        assert_eq!(scrape.sum(name, labels), Some(value), "{name} {labels:?}");
    }
}

/// Every metric of the docs is there, and no other, with its labels.
fn assert_documented(scrape: &Scrape) {
    let docs = include_str!("../../../docs/metrics.md");
    let mut expected = BTreeSet::new();
    for row in docs
        .lines()
        .filter(|line| line.starts_with("| `requeuest_"))
    {
        let row = row.replace('`', "");
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let mut labels: BTreeSet<&str> = cells[2].split(", ").filter(|it| !it.is_empty()).collect();
        let names = if cells[1] == "histogram" {
            ["_bucket", "_sum", "_count"]
                .map(|part| format!("{}{part}", cells[0]))
                .to_vec()
        } else {
            vec![cells[0].to_owned()]
        };
        for name in names {
            assert!(scrape.samples.contains_key(&name), "{name} was not scraped");
            if name.ends_with("_bucket") {
                labels.insert("le");
            }
            assert_eq!(scrape.labels(&name), labels, "{name}");
            labels.remove("le");
            expected.insert(name);
        }
    }
    let scraped: BTreeSet<_> = scrape.samples.keys().cloned().collect();
    assert_eq!(scraped, expected);
}

/// Every panel of the dashboard has what Grafana needs, and shows what there is.
fn assert_shown(scrape: &Scrape) {
    let dashboard = dashboard();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    assert_eq!(dashboard["uid"], "requeuest");
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> = variables.iter().map(|it| text(&it["name"])).collect();
    assert_eq!(names, ["datasource", "channel"]);
    assert_eq!(variables[0]["type"], "datasource");
    let channels = text(&variables[1]["query"]["query"]);
    assert_eq!(
        channels,
        "label_values(requeuest_requests_enqueued_total, channel)"
    );
    let (mut ids, mut places, mut panels) = (BTreeSet::new(), BTreeSet::new(), 0);
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = text(&panel["title"]);
        assert!(!title.is_empty(), "{panel}");
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        let place = ["x", "y"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        assert!(places.insert(place), "{title}");
        assert!(
            place[0] + panel["gridPos"]["w"].as_u64().unwrap() <= 24,
            "{title}"
        );
        if panel["type"] == "row" {
            continue;
        }
        panels += 1;
        assert_eq!(panel["type"], "timeseries", "{title}");
        assert_eq!(panel["datasource"]["type"], "prometheus", "{title}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let unit = text(&panel["fieldConfig"]["defaults"]["unit"]);
        assert!(
            ["s", "short", "ops", "percentunit"].contains(&&*unit),
            "{title}: {unit}"
        );
        assert!(!text(&panel["description"]).is_empty(), "{title}");
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{title}");
        for target in targets {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            assert!(!text(&target["legendFormat"]).is_empty(), "{title}");
            assert_eq!(unit == "s", in_seconds(&text(&target["expr"])), "{title}");
            let (names, labels) = used(&text(&target["expr"]));
            assert!(!names.is_empty(), "{title}");
            for name in names {
                assert!(scrape.samples.contains_key(&name), "{title}: {name}");
                // Prometheus adds the instance.
                let mut known = scrape.labels(&name);
                known.insert("instance");
                for label in &labels {
                    assert!(known.contains(&**label), "{title}: {name} has no {label}");
                }
            }
        }
    }
    assert!(panels >= 20, "{panels}");
}

/// Whether an expression is a time: a metric in seconds that is not turned into a rate of events.
fn in_seconds(expression: &str) -> bool {
    let (names, _) = used(expression);
    names
        .iter()
        .all(|name| name.trim_end_matches("_bucket").ends_with("_seconds"))
}

#[test]
fn the_names_and_labels_of_an_expression_are_found() {
    let expression = r#"
        histogram_quantile(0.5, sum by (le, x) (rate(a_bucket{c=~"$c", d!="e"}[5m]))) / max(b) > 0
    "#;
    let (names, labels) = used(expression);
    assert_eq!(names, ["a_bucket", "b"]);
    let labels: Vec<_> = labels.iter().map(String::as_str).collect();
    assert_eq!(labels, ["c", "d", "le", "x"]);
}
