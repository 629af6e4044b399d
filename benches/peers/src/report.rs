//! The report of a run: a table to read, and the same figures as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::peer::Peer;
use crate::peers::requeuest::Requeuest;
use crate::receiver::Tally;

/// The lock file, for the versions that were built.
const LOCK: &str = include_str!("../Cargo.lock");

/// One kind of measurement of one peer, over all rounds.
pub(crate) struct Series {
    pub(crate) peer: &'static str,
    /// The crate whose version is shown.
    pub(crate) krate: &'static str,
    pub(crate) measure: Measure,
    /// Requests per second; a round that lost requests has no rate.
    pub(crate) rates: Vec<f64>,
    pub(crate) tally: Tally,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    Fire,
    Drain,
    Await,
}

#[derive(Default)]
pub(crate) struct Limits {
    pub(crate) exchange: Vec<f64>,
    pub(crate) commits: Vec<f64>,
}

pub(crate) struct Report {
    pub(crate) callers: usize,
    pub(crate) concurrency: usize,
    pub(crate) requests: u64,
    pub(crate) drain: u64,
    pub(crate) rounds: usize,
    pub(crate) limits: Limits,
    pub(crate) series: Vec<Series>,
}

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Self::Fire => "fire",
            Self::Drain => "drain",
            Self::Await => "await",
        }
    }
}

impl Report {
    pub(crate) fn lost(&self) -> u64 {
        self.series.iter().map(|series| series.tally.lost).sum()
    }

    pub(crate) fn table(&self) -> String {
        let mut out = format!(
            "{} callers, {} requests under way at a time, {} to fire, {} to drain; rounds: {}\n\n",
            self.callers, self.concurrency, self.requests, self.drain, self.rounds
        );
        for (name, rates) in [
            ("the exchange alone", &self.limits.exchange),
            ("bare one-row commits", &self.limits.commits),
        ] {
            let _ = writeln!(out, "{name:<32} {:>8}/s", shown(median(rates), 0));
        }
        let _ = writeln!(
            out,
            "\n{:<16} {:<16} {:<6} {:>9} {:>12} {:>6} {:>8}",
            "crate", "version", "", "rate", "of requeuest", "lost", "doubled"
        );
        for measure in [Measure::Fire, Measure::Drain, Measure::Await] {
            for series in self.series.iter().filter(|one| one.measure == measure) {
                let _ = writeln!(
                    out,
                    "{:<16} {:<16} {:<6} {:>7}/s {:>12} {:>6} {:>8}",
                    series.krate,
                    version(series.krate),
                    measure.name(),
                    shown(median(&series.rates), 0),
                    shown(self.ratio(series), 2),
                    series.tally.lost,
                    series.tally.doubled
                );
            }
        }
        out
    }

    pub(crate) fn json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            json!({
                "peer": series.peer,
                "crate": series.krate,
                "version": version(series.krate),
                "measure": series.measure.name(),
                "per_second": median(&series.rates),
                "per_second_by_round": series.rates,
                "ratio_to_requeuest": self.ratio(series),
                "lost": series.tally.lost,
                "doubled": series.tally.doubled,
            })
        });
        json!({
            "callers": self.callers,
            "concurrency": self.concurrency,
            "requests": self.requests,
            "drain": self.drain,
            "rounds": self.rounds,
            "exchange_per_second": median(&self.limits.exchange),
            "commits_per_second": median(&self.limits.commits),
            "measures": series.collect::<Vec<_>>(),
        })
    }

    fn ratio(&self, series: &Series) -> Option<f64> {
        let ours = self
            .series
            .iter()
            .find(|one| one.peer == Requeuest::NAME && one.measure == series.measure)?;
        Some(median(&series.rates)? / median(&ours.rates)?)
    }
}

fn median(rates: &[f64]) -> Option<f64> {
    let mut rates = rates.to_vec();
    rates.sort_by(f64::total_cmp);
    let upper = *rates.get(rates.len() / 2)?;
    if rates.len() % 2 == 1 {
        return Some(upper);
    }
    Some((rates[rates.len() / 2 - 1] + upper) / 2.0)
}

fn shown(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

fn version(krate: &str) -> &'static str {
    let entry = format!("name = \"{krate}\"\nversion = \"");
    LOCK.split_once(&entry)
        .and_then(|(_, rest)| rest.split('"').next())
        .unwrap_or("?")
}
