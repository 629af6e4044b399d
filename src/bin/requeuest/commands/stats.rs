//! `requeuest stats`: what there is, and what has happened lately.

use clap::Args;
use requeuest::RunnerInfo;
use requeuest::admin::{Activity, ActivityPoint, Count, Counts, Window};
use serde_json::{Value, json};

use super::status_style;
use crate::failure::Failure;
use crate::json;
use crate::out::Out;
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::when;

#[derive(Args, Debug)]
pub(crate) struct Stats {
    /// How far back: hour, by the minute, or day, by ten minutes
    #[arg(long, value_name = "WINDOW", default_value = "hour")]
    window: Window,
}

impl Stats {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let admin = target.admin().await?;
        let counts = admin.counts().await?;
        let runners = admin.runners().await?;
        let activity = admin.activity(self.window).await?;
        if out.json {
            return out.document(&document(&counts, &runners, &activity));
        }
        print_counts(&counts, out)?;
        print_runners(&runners, out)?;
        print_activity(&activity, out)
    }
}

fn document(counts: &Counts, runners: &[RunnerInfo], activity: &Activity) -> Value {
    let count = |count: &Count| json!({ "number": count.number, "is_exact": count.is_exact });
    let by_status = counts.by_status.iter();
    let by_state = counts.by_state.iter();
    let channels = activity.channels.iter().map(|channel| {
        json!({
            "channel": channel.channel,
            "points": channel.points.iter().map(point).collect::<Vec<_>>(),
        })
    });
    json!({
        "by_status": by_status
            .map(|(status, number)| (status.as_str().to_owned(), count(number)))
            .collect::<serde_json::Map<_, _>>(),
        "by_state": by_state
            .map(|(state, number)| (state.as_str().to_owned(), count(number)))
            .collect::<serde_json::Map<_, _>>(),
        "runners": runners.iter().map(json::runner).collect::<Vec<_>>(),
        "activity": {
            "window": activity.window.as_str(),
            "points": activity.points.iter().map(point).collect::<Vec<_>>(),
            "channels": channels.collect::<Vec<_>>(),
        },
    })
}

fn point(point: &ActivityPoint) -> Value {
    json!({
        "at": json::time(point.at),
        "enqueued": point.enqueued,
        "attempts": point.attempts,
        "failed_attempts": point.failed_attempts,
        "completed": point.completed,
        "discarded": point.discarded,
        "cancelled": point.cancelled,
        "ambiguous": point.ambiguous,
        "latency_p50": point.latency_p50.map(json::duration),
        "latency_p95": point.latency_p95.map(json::duration),
    })
}

fn print_counts(counts: &Counts, out: &mut Out) -> Result<(), Failure> {
    let mut table = Table::new(["status", "requests"]);
    for (status, count) in &counts.by_status {
        if count.number > 0 {
            let name = Cell::styled(status.as_str(), status_style(*status));
            table.row([name, count.to_string().into()]);
        }
    }
    if table.is_empty() {
        return out.line("no requests");
    }
    out.table(&table)
}

fn print_runners(runners: &[RunnerInfo], out: &mut Out) -> Result<(), Failure> {
    out.heading("Runners")?;
    if runners.is_empty() {
        return out.line("none: no request is delivered; start one: requeuest work --all-channels");
    }
    let mut table = Table::new([
        "process",
        "channels",
        "in flight",
        "version",
        "started",
        "seen",
    ]);
    for runner in runners {
        let host = runner.host.as_deref().unwrap_or("?");
        let channels = runner.channels.as_ref();
        table.row([
            format!("{host}:{}", runner.pid).into(),
            channels
                .map_or("all".to_owned(), |channels| channels.join(" "))
                .into(),
            runner.in_flight.to_string().into(),
            runner.version.as_str().into(),
            when::relative(runner.started_at).into(),
            when::relative(runner.seen_at).into(),
        ]);
    }
    out.table(&table)
}

/// The last steps in which something happened.
fn print_activity(activity: &Activity, out: &mut Out) -> Result<(), Failure> {
    out.heading(&format!("The last {}", activity.window))?;
    let mut table = Table::new([
        "at",
        "enqueued",
        "attempts",
        "failed",
        "completed",
        "discarded",
        "p50",
        "p95",
    ]);
    let latency = |latency: Option<_>| latency.map_or(String::new(), when::rough);
    let is_quiet = |point: &&ActivityPoint| point.enqueued + point.attempts + point.cancelled == 0;
    let busy: Vec<_> = activity
        .points
        .iter()
        .filter(|point| !is_quiet(point))
        .collect();
    for point in busy.iter().skip(busy.len().saturating_sub(20)) {
        table.row([
            when::relative(point.at).into(),
            point.enqueued.to_string().into(),
            point.attempts.to_string().into(),
            point.failed_attempts.to_string().into(),
            point.completed.to_string().into(),
            point.discarded.to_string().into(),
            latency(point.latency_p50).into(),
            latency(point.latency_p95).into(),
        ]);
    }
    if table.is_empty() {
        return out.line("nothing happened");
    }
    out.table(&table)
}
