//! What the fleet has done lately: numbers by minute and channel, for an operator's graphs.
//!
//! Every process counts all the time, and adds its counts to a table of the schema every ten
//! seconds. The numbers are for graphs and not for bills: see [`Activity`].

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

/// How many limits the latency of a request is compared with: 1 ms, 2 ms, 4 ms, up to 18 hours.
const LIMITS: usize = 27;
/// How many numbers a latency histogram has: one for each limit, and one for all longer times.
pub(crate) const BUCKETS: usize = LIMITS + 1;

/// A latency histogram, with fixed limits that double.
pub(crate) type Buckets = [u64; BUCKETS];

/// The place of a latency in a histogram.
pub(crate) fn bucket_of(latency: Duration) -> usize {
    let millis = u64::try_from(latency.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
    // The first limit that is not below the time.
    let bits = u64::BITS - millis.saturating_sub(1).leading_zeros();
    (bits as usize).min(LIMITS)
}

/// As a number that may be rounded.
#[expect(clippy::cast_precision_loss, reason = "it is an estimate")]
fn rounded(number: u64) -> f64 {
    number as f64
}

/// The time below which this part of the requests stayed, from 0 to 1. `None` if there were none.
/// Within a bucket, the times are taken to be spread evenly on a logarithmic scale.
fn quantile(buckets: &Buckets, part: f64) -> Option<Duration> {
    let all: u64 = buckets
        .iter()
        .fold(0, |sum, &number| sum.saturating_add(number));
    if all == 0 {
        return None;
    }
    let wanted = (part * rounded(all)).max(f64::MIN_POSITIVE);
    let mut below = 0.0;
    for (bucket, &number) in buckets.iter().enumerate() {
        let within = rounded(number);
        if number > 0 && below + within >= wanted {
            // Of the last bucket, only the lower limit is known.
            let position = if bucket == LIMITS {
                0.0
            } else {
                (wanted - below) / within
            };
            let millis = f64::exp2(rounded(bucket as u64) - 1.0 + position);
            return Some(Duration::from_secs_f64(millis / 1000.0));
        }
        below += within;
    }
    None
}

/// How far back [`Admin::activity`](crate::admin::Admin::activity) looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Window {
    /// The last hour, a point for each minute.
    Hour,
    /// The last day, a point for each ten minutes.
    Day,
}

impl Window {
    /// The name of the window: `"hour"` or `"day"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// The time between two points.
    pub fn step(self) -> Duration {
        Duration::from_secs(60 * u64::from(self.minutes()))
    }

    /// How many minutes a point covers.
    pub(crate) fn minutes(self) -> u8 {
        match self {
            Self::Hour => 1,
            Self::Day => 10,
        }
    }

    /// How many points there are.
    pub(crate) fn points(self) -> usize {
        match self {
            Self::Hour => 60,
            Self::Day => 144,
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that is not the name of a [`Window`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseWindowError(String);

impl fmt::Display for ParseWindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the window is `hour` or `day`, and not {:?}", self.0)
    }
}

impl std::error::Error for ParseWindowError {}

impl FromStr for Window {
    type Err = ParseWindowError;

    fn from_str(text: &str) -> Result<Self, ParseWindowError> {
        match text {
            "hour" => Ok(Self::Hour),
            "day" => Ok(Self::Day),
            other => Err(ParseWindowError(other.chars().take(40).collect())),
        }
    }
}

/// What all processes have done in a [`Window`]. From
/// [`Admin::activity`](crate::admin::Admin::activity).
///
/// The numbers are approximate:
///
/// - A process adds its counts every ten seconds and when it shuts down, to the minute in which it
///   adds them. One that dies loses the last ten seconds of its counts, and never a request.
/// - A request that a caller persists in its own transaction counts when the call returns, also if
///   the transaction is rolled back later.
/// - What is enqueued or cancelled by SQL functions is not counted, nor are requests that the
///   database itself ends: those whose deadline passes while they wait, and those that a newer one
///   supersedes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Activity {
    /// The window that was asked for.
    pub window: Window,
    /// All channels together: a point for each step, the oldest first. The last one is of a step
    /// that is not over.
    pub points: Vec<ActivityPoint>,
    /// The channels with any activity, sorted by name.
    pub channels: Vec<ChannelActivity>,
}

/// The part of an [`Activity`] that belongs to a channel.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ChannelActivity {
    /// The channel. `None` for all channels together that had no room: 100 have it in each step,
    /// and in each process.
    pub channel: Option<String>,
    /// As many points as the [`Activity`] has, at the same times.
    pub points: Vec<ActivityPoint>,
}

/// What happened in one step.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ActivityPoint {
    /// The beginning of the step, by the database's clock.
    pub at: SystemTime,
    /// Requests that were enqueued.
    pub enqueued: u64,
    /// Attempts that ended, whatever their result.
    pub attempts: u64,
    /// Attempts among them without a final response.
    pub failed_attempts: u64,
    /// Requests that were completed.
    pub completed: u64,
    /// Requests that were given up: dead letters.
    pub discarded: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that may have arrived and are not sent again: dead letters.
    pub ambiguous: u64,
    /// The median time from a request's enqueue to its outcome, delays included. Estimated to
    /// within a factor of two, and mostly far better. `None` if no request had an outcome.
    pub latency_p50: Option<Duration>,
    /// The same time, which 95 % of the requests stayed below.
    pub latency_p95: Option<Duration>,
}

/// What was counted in one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) enqueued: u64,
    pub(crate) attempts: u64,
    pub(crate) failed_attempts: u64,
    pub(crate) completed: u64,
    pub(crate) discarded: u64,
    pub(crate) cancelled: u64,
    pub(crate) ambiguous: u64,
    pub(crate) latency: Buckets,
}

impl Counts {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds others. A number that is out of all bounds stays the largest one.
    pub(crate) fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.enqueued, other.enqueued),
            (&mut self.attempts, other.attempts),
            (&mut self.failed_attempts, other.failed_attempts),
            (&mut self.completed, other.completed),
            (&mut self.discarded, other.discarded),
            (&mut self.cancelled, other.cancelled),
            (&mut self.ambiguous, other.ambiguous),
        ];
        let latency = self.latency.iter_mut().zip(other.latency);
        for (sum, number) in pairs.into_iter().chain(latency) {
            *sum = sum.saturating_add(number);
        }
    }

    fn point(&self, at: SystemTime) -> ActivityPoint {
        ActivityPoint {
            at,
            enqueued: self.enqueued,
            attempts: self.attempts,
            failed_attempts: self.failed_attempts,
            completed: self.completed,
            discarded: self.discarded,
            cancelled: self.cancelled,
            ambiguous: self.ambiguous,
            latency_p50: quantile(&self.latency, 0.5),
            latency_p95: quantile(&self.latency, 0.95),
        }
    }
}

/// What is stored of one step of a channel.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// How many steps ago it was.
    pub(crate) ago: usize,
    /// `None` for further channels, together.
    pub(crate) channel: Option<String>,
    pub(crate) counts: Counts,
}

impl Activity {
    /// Puts steps together. `last` is the beginning of the step that is not over.
    pub(crate) fn of(window: Window, last: SystemTime, steps: Vec<Step>) -> Self {
        let number = window.points();
        let mut all = vec![Counts::default(); number];
        // The channels in the order of their names, and the others last.
        let mut channels = std::collections::BTreeMap::<_, Vec<Counts>>::new();
        for step in steps.into_iter().filter(|step| step.ago < number) {
            let place = number - 1 - step.ago;
            all[place].add(&step.counts);
            let key = (step.channel.is_none(), step.channel);
            let of_channel = channels.entry(key);
            let of_channel = of_channel.or_insert_with(|| vec![Counts::default(); number]);
            of_channel[place].add(&step.counts);
        }
        let points = |counts: Vec<Counts>| {
            let points = counts.into_iter().enumerate().map(|(place, counts)| {
                let ago = window.step() * (number - 1 - place) as u32;
                counts.point(last.checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH))
            });
            points.collect()
        };
        Self {
            window,
            points: points(all),
            channels: channels
                .into_iter()
                .map(|((_, channel), counts)| ChannelActivity {
                    channel,
                    points: points(counts),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_in_the_first_bucket_whose_limit_it_keeps() {
        for (micros, bucket) in [
            (0, 0),
            (1, 0),
            (1000, 0),
            (1001, 1),
            (2000, 1),
            (2001, 2),
            (4000, 2),
            (4001, 3),
            (1_000_000, 10),
            (67_108_864_000, 26),
            (67_108_864_001, 27),
            (u64::MAX, 27),
        ] {
            assert_eq!(bucket_of(Duration::from_micros(micros)), bucket, "{micros}");
        }
        assert_eq!(bucket_of(Duration::MAX), LIMITS);
    }

    #[test]
    fn quantiles_are_estimated_to_within_a_factor_of_two() {
        let mut buckets = [0; BUCKETS];
        assert_eq!(quantile(&buckets, 0.5), None);
        for millis in 1..=1000 {
            buckets[bucket_of(Duration::from_millis(millis))] += 1;
        }
        for (part, truth) in [(0.5, 500.0), (0.95, 950.0), (0.05, 50.0)] {
            let estimate = quantile(&buckets, part).unwrap().as_secs_f64() * 1000.0;
            let error = (estimate / truth).max(truth / estimate);
            assert!(error < 1.34, "{part}: {estimate} instead of {truth}");
        }
        let mut longest = [0; BUCKETS];
        longest[LIMITS] = 1;
        let least = Duration::from_millis(1 << (LIMITS - 1));
        assert_eq!(quantile(&longest, 0.95), Some(least));
    }

    #[test]
    fn steps_become_points_in_total_and_by_channel() {
        let last = SystemTime::UNIX_EPOCH + Duration::from_secs(36_000);
        let step = |ago, channel: Option<&str>, enqueued| Step {
            ago,
            channel: channel.map(str::to_owned),
            counts: Counts {
                enqueued,
                ..Counts::default()
            },
        };
        let steps = vec![
            step(0, None, 1),
            step(0, Some("b"), 2),
            step(59, Some("a"), u64::MAX),
            step(59, Some("b"), 4),
            step(60, Some("a"), 8),
        ];
        let activity = Activity::of(Window::Hour, last, steps);
        assert_eq!(activity.points.len(), 60);
        assert_eq!(activity.points[59].at, last);
        assert_eq!(activity.points[0].at, last - Duration::from_secs(59 * 60));
        assert_eq!(activity.points[59].enqueued, 3);
        assert_eq!(activity.points[0].enqueued, u64::MAX);
        let names: Vec<_> = activity
            .channels
            .iter()
            .map(|it| it.channel.as_deref())
            .collect();
        assert_eq!(names, [Some("a"), Some("b"), None]);
        assert_eq!(activity.channels[1].points[0].enqueued, 4);
        assert_eq!(activity.channels[1].points[59].enqueued, 2);
    }

    #[test]
    fn a_window_is_read_from_its_name() {
        for window in [Window::Hour, Window::Day] {
            assert_eq!(window.to_string().parse(), Ok(window));
        }
        let error = "week".parse::<Window>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the window is `hour` or `day`, and not \"week\""
        );
    }
}
