//! Figures, each printed beside its target.

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::load::percentile;
use crate::common::report::Report;

/// What a figure should be.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "at most {limit}"),
            Self::AtLeast(limit) => write!(f, "at least {limit}"),
        }
    }
}

/// The figures of one section of the output.
pub(crate) struct Figures<'a> {
    report: &'a mut Report,
    section: String,
}

impl<'a> Figures<'a> {
    pub(crate) fn section(report: &'a mut Report, section: impl Into<String>) -> Self {
        let section = section.into();
        println!("\n{section}");
        Self { report, section }
    }

    /// Prints a figure. A count has no unit.
    pub(crate) fn show(&mut self, name: &str, value: f64, unit: &str, target: Option<Target>) {
        let verdict = target.map_or_else(String::new, |target| {
            let verdict = if target.is_met(value) {
                "met"
            } else {
                "MISSED"
            };
            format!("target: {target}, {verdict}")
        });
        let decimals = if unit.is_empty() { 0 } else { 2 };
        let line = format!("  {name:<52} {value:>10.decimals$} {unit:<4} {verdict}");
        println!("{}", line.trim_end());
        let name = format!("{}: {name}", self.section);
        self.report.note(
            &name,
            json!({
                "value": value,
                "unit": unit,
                "target": target.map(|target| target.to_string()),
                "met": target.map(|target| target.is_met(value)),
            }),
        );
    }

    /// Prints the percentiles of sorted times, in milliseconds. A target belongs to a percentile.
    pub(crate) fn times(&mut self, name: &str, times: &[Duration], targets: &[(&str, f64)]) {
        for (label, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            let time = percentile(times, share).unwrap_or_default();
            let target = targets.iter().find(|(of, _)| *of == label);
            self.show(
                &format!("{name}: {label}"),
                millis(time),
                "ms",
                target.map(|(_, limit)| Target::AtMost(*limit)),
            );
        }
    }
}

/// When a request was due, and when it arrived.
#[derive(Clone, Copy)]
pub(crate) struct Delivery {
    pub(crate) due: Instant,
    pub(crate) arrived: Option<Instant>,
}

/// The sorted times to arrival. A request that hasn't arrived counts with the time until `end`.
pub(crate) fn times(deliveries: &[Delivery], end: Instant) -> Vec<Duration> {
    let took = |delivery: &Delivery| {
        let arrived = delivery.arrived.unwrap_or(end);
        arrived.saturating_duration_since(delivery.due)
    };
    let mut times: Vec<_> = deliveries.iter().map(took).collect();
    times.sort_unstable();
    times
}

pub(crate) fn arrived(deliveries: &[Delivery]) -> usize {
    let arrived = |delivery: &&Delivery| delivery.arrived.is_some();
    deliveries.iter().filter(arrived).count()
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
