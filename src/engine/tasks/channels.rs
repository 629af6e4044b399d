//! Warning of requests in channels that no runner delivers.
//!
//! A channel's name that is misspelt, or a delivering process that was never started, shows only in
//! requests that don't finish. The calls note the channels of requests that they leave to runners,
//! and this task asks the database about those channels: not at all while there are none.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::store::Store;

/// A runner that starts at the same time has this long to register.
const GRACE: Duration = Duration::from_secs(3);
/// The time between two questions to the database.
const INTERVAL: Duration = Duration::from_secs(15);
/// How many channels are asked about at once. Others wait until they are used again.
const MAX_CHANNELS: usize = 1000;
/// How many channels a line names.
const MAX_NAMED: usize = 10;

/// The channels of requests that this handle has left to runners, since the task last asked.
#[derive(Debug, Default)]
pub(crate) struct UsedChannels {
    used: Mutex<HashSet<Arc<str>>>,
    noted: Notify,
}

impl UsedChannels {
    /// Notes the channels of persisted requests. Further ones of the same channel cost next to
    /// nothing.
    pub(crate) fn note<'a>(&self, channels: impl IntoIterator<Item = &'a Arc<str>>) {
        let mut last: Option<&Arc<str>> = None;
        for channel in channels {
            if last.is_some_and(|last| Arc::ptr_eq(last, channel)) {
                continue;
            }
            last = Some(channel);
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            if used.len() < MAX_CHANNELS && !used.contains(channel) {
                used.insert(Arc::clone(channel));
                self.noted.notify_one();
            }
        }
    }

    fn take(&self) -> HashSet<Arc<str>> {
        std::mem::take(&mut self.used.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Watches until the task is aborted.
pub(crate) async fn run(store: Store, used: Arc<UsedChannels>) {
    // Those that were warned of.
    let mut undelivered: HashSet<Arc<str>> = HashSet::new();
    let mut last: Option<Instant> = None;
    loop {
        if undelivered.is_empty() {
            used.noted.notified().await;
        }
        let soon = Instant::now() + GRACE;
        tokio::time::sleep_until(last.map_or(soon, |last| soon.max(last + INTERVAL))).await;
        last = Some(Instant::now());
        let mut channels = used.take();
        channels.extend(undelivered.iter().cloned());
        let channels: Vec<_> = channels.into_iter().take(MAX_CHANNELS).collect();
        match store.without_runner(&channels).await {
            Ok(missing) => log(&compare(&mut undelivered, &channels, &missing)),
            // The store logs it.
            Err(_) => used.note(&channels),
        }
    }
}

/// What has changed since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Channels that have no runner any more.
    begun: Vec<Arc<str>>,
    /// Channels that have one again.
    over: Vec<Arc<str>>,
}

fn compare(
    undelivered: &mut HashSet<Arc<str>>,
    channels: &[Arc<str>],
    missing: &[String],
) -> Changes {
    let missing: HashSet<&str> = missing.iter().map(|channel| &**channel).collect();
    let mut changes = Changes::default();
    for channel in channels {
        if !missing.contains(&**channel) {
            if undelivered.remove(channel) {
                changes.over.push(Arc::clone(channel));
            }
        } else if undelivered.insert(Arc::clone(channel)) {
            changes.begun.push(Arc::clone(channel));
        }
    }
    changes.begun.sort_unstable();
    changes.over.sort_unstable();
    changes
}

fn log(Changes { begun, over }: &Changes) {
    if !begun.is_empty() {
        tracing::warn!(
            channels = ?&begun[..begun.len().min(MAX_NAMED)],
            count = begun.len(),
            "requests were persisted in channels that no runner delivers; start a process that \
             does, or they are given up once their time is over"
        );
    }
    if !over.is_empty() {
        tracing::info!(
            channels = ?&over[..over.len().min(MAX_NAMED)],
            count = over.len(),
            "channels that had no runner are delivered now"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_news_when_its_last_runner_has_gone_and_when_one_is_back() {
        let channels: Vec<Arc<str>> = ["b", "a", "c"].map(Arc::from).to_vec();
        let mut undelivered = HashSet::new();
        let mut changes = |missing: &[&str]| {
            let missing: Vec<String> = missing.iter().map(|&name| name.to_owned()).collect();
            let Changes { begun, over } = compare(&mut undelivered, &channels, &missing);
            (begun.join(","), over.join(","))
        };
        let news = |begun: &str, over: &str| (begun.to_owned(), over.to_owned());
        assert_eq!(changes(&[]), news("", ""));
        assert_eq!(changes(&["a", "b"]), news("a,b", ""));
        assert_eq!(changes(&["a", "b"]), news("", ""));
        assert_eq!(changes(&["a", "c"]), news("c", "b"));
        assert_eq!(changes(&["b"]), news("b", "a,c"));
    }

    #[test]
    fn a_channel_is_noted_once_and_only_so_many_are() {
        let used = UsedChannels::default();
        let channel: Arc<str> = "a".into();
        used.note([&channel, &channel, &"a".into(), &"b".into()]);
        assert_eq!(used.take().len(), 2);
        assert_eq!(used.take().len(), 0);
        let many: Vec<Arc<str>> = (0..2 * MAX_CHANNELS)
            .map(|number| number.to_string().into())
            .collect();
        used.note(&many);
        assert_eq!(used.take().len(), MAX_CHANNELS);
    }
}
