//! What the sessions of the processes wait for while they work, sampled from outside.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::time::Duration;

use requeuest::sqlx::{self, PgConnection};
use tokio::time::MissedTickBehavior;

use crate::common::AnyError;

/// Time between two samples.
const INTERVAL: Duration = Duration::from_millis(20);

const ACTIVE: &str = "
    SELECT coalesce(wait_event_type, ''), coalesce(wait_event, ''), count(*)
    FROM pg_stat_activity
    WHERE datname = $1 AND state = 'active' AND backend_type = 'client backend'
    GROUP BY 1, 2";

/// How often active sessions were seen to wait for each event.
#[derive(Default)]
pub(crate) struct Waits {
    /// By type and event; both are empty for sessions that worked.
    seen: BTreeMap<(String, String), i64>,
}

impl Waits {
    /// Samples the sessions of a database until it is dropped or fails. The connection must be to
    /// another database.
    pub(crate) async fn watch(
        &mut self,
        connection: &mut PgConnection,
        database: &str,
    ) -> Result<Infallible, AnyError> {
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let sessions: Vec<(String, String, i64)> = sqlx::query_as(ACTIVE)
                .bind(database)
                .fetch_all(&mut *connection)
                .await?;
            for (kind, event, count) in sessions {
                *self.seen.entry((kind, event)).or_default() += count;
            }
        }
    }

    pub(crate) fn samples(&self) -> i64 {
        self.seen.values().sum()
    }

    /// The share of the samples that waited for something of this type, in percent.
    pub(crate) fn percent(&self, kind: &str) -> f64 {
        let of_kind: i64 = self.of(kind).map(|(_, count)| count).sum();
        of_kind as f64 * 100.0 / self.samples().max(1) as f64
    }

    fn of(&self, kind: &str) -> impl Iterator<Item = (&str, i64)> {
        let of_kind = self.seen.iter().filter(move |((seen, _), _)| seen == kind);
        of_kind.map(|((_, event), &count)| (&**event, count))
    }

    pub(crate) fn add(&mut self, other: Self) {
        for (wait, count) in other.seen {
            *self.seen.entry(wait).or_default() += count;
        }
    }
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of {} samples", self.samples())?;
        for (kind, name) in [
            ("Lock", "locks"),
            ("LWLock", "lightweight locks"),
            ("IO", "the disk"),
            ("Client", "the client"),
        ] {
            write!(f, ", {:.1} % waited for {name}", self.percent(kind))?;
            // The most frequent event of this type.
            if let Some((event, _)) = self.of(kind).max_by_key(|(_, count)| *count) {
                write!(f, " ({event})")?;
            }
        }
        write!(f, ", {:.1} % worked", self.percent(""))
    }
}
