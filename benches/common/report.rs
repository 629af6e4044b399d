//! A printed table, and the same figures as JSON.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::AnyError;
use super::load::Measured;

/// Collects the figures of a run.
#[derive(Default)]
pub(crate) struct Report {
    figures: Map<String, Value>,
}

impl Report {
    pub(crate) fn note(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// Prints a rate at once, with its ratio to the limit that bounds it.
    pub(crate) fn rate(&mut self, name: &str, measured: &Measured, limit: Option<(&str, f64)>) {
        let rate = measured.rate();
        let share = limit.map_or_else(String::new, |(what, limit)| {
            format!("{:>5.2} × {what}", rate / limit)
        });
        println!(
            "{name:<34} {rate:>9.0}/s  {:>19}  {share}",
            latencies(measured)
        );
        self.figures.insert(name.to_owned(), figures(measured));
    }

    pub(crate) fn write(self, path: &Path) -> Result<(), AnyError> {
        std::fs::write(path, serde_json::to_vec_pretty(&self.figures)?)?;
        Ok(())
    }
}

pub(crate) fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn latencies(measured: &Measured) -> String {
    match (measured.percentile(0.5), measured.percentile(0.99)) {
        (Some(p50), Some(p99)) => format!("{:.2} / {:.2} ms", micros(p50) / 1e3, micros(p99) / 1e3),
        _ => String::new(),
    }
}

fn figures(measured: &Measured) -> Value {
    let micros = |share| measured.percentile(share).map(micros);
    json!({
        "calls": measured.calls,
        "seconds": measured.took.as_secs_f64(),
        "rate": measured.rate(),
        "p50_us": micros(0.5),
        "p99_us": micros(0.99),
    })
}
