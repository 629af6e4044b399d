//! Which requests an operator means.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::cursor::Cursor;
use super::state::RequestState;
use crate::destination::validate_name;
use crate::error::Error;
use crate::id::RequestId;
use crate::options::{MAX_KEY_LEN, validate_channel};
use crate::status::Status;

/// How many requests a page has at most, unless its [`PageRequest`] says otherwise: 100.
pub const DEFAULT_PAGE_LIMIT: u32 = 100;
/// The most requests that a page can have: 1000.
pub const MAX_PAGE_LIMIT: u32 = 1000;
/// The longest text that errors are searched for, in bytes: 1000.
pub const MAX_SEARCH_LEN: usize = 1000;

/// Selects requests by what is stored of them. A new filter selects all requests, unfinished and
/// ended. Each setter narrows it.
///
/// Serde reads and writes a filter, for applications that store it. A field that this version
/// doesn't know is an error, because the filter would select too much without it.
///
/// # Examples
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use requeuest::Status;
/// use requeuest::admin::RequestFilter;
///
/// let stuck = RequestFilter::new()
///     .destination("https://pay.example.com")
///     .status(Status::Retryable)
///     .created_before(SystemTime::now() - Duration::from_secs(3600));
/// stuck.validate()?;
/// # Ok::<(), requeuest::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[must_use = "a filter does nothing by itself"]
pub struct RequestFilter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<RequestId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) channel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) destination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ordering_key: Option<String>,
    /// Any of them; all if there is none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) status: Vec<Status>,
    /// Any of them; all if there is none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) state: Vec<RequestState>,
    #[serde(with = "micros", skip_serializing_if = "Option::is_none")]
    pub(crate) created_after: Option<SystemTime>,
    #[serde(with = "micros", skip_serializing_if = "Option::is_none")]
    pub(crate) created_before: Option<SystemTime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error_contains: Option<String>,
}

impl RequestFilter {
    /// All requests.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only the request of this id.
    pub fn id(mut self, id: RequestId) -> Self {
        self.id = Some(id);
        self
    }

    /// Only the request of this [key](crate::Options::key). Needs a [`channel`](Self::channel), in
    /// which keys are unique.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Only requests of this channel.
    pub fn channel(mut self, channel: impl Into<String>) -> Self {
        self.channel = Some(channel.into());
        self
    }

    /// Only requests to this destination: scheme, host and port, or a limit key.
    /// `https://example.com` is the same as `https://example.com:443`. The destination of an
    /// ordered request that has been completed or cancelled isn't known any more.
    pub fn destination(mut self, destination: impl Into<String>) -> Self {
        self.destination = Some(destination.into());
        self
    }

    /// Only requests of this ordering key, of all channels.
    pub fn ordering_key(mut self, key: impl Into<String>) -> Self {
        self.ordering_key = Some(key.into());
        self
    }

    /// Only requests of this status. Called again, it adds another status.
    /// [`Status::Discarded`] and [`Status::Ambiguous`] mean dead letters: those that have been
    /// replayed since are left out.
    pub fn status(mut self, status: Status) -> Self {
        self.status.push(status);
        self
    }

    /// Only requests that the queue has in this state. Called again, it adds another state.
    pub fn state(mut self, state: RequestState) -> Self {
        self.state.push(state);
        self
    }

    /// Only requests that were enqueued at this time or later, by the database's clock. Requests of
    /// a process whose clock is off by more than an hour may be missing.
    pub fn created_after(mut self, time: SystemTime) -> Self {
        self.created_after = Some(time);
        self
    }

    /// Only requests that were enqueued before this time: see
    /// [`created_after`](Self::created_after).
    pub fn created_before(mut self, time: SystemTime) -> Self {
        self.created_before = Some(time);
        self
    }

    /// Only requests whose error contains this text, in upper or lower case: the error that ended
    /// the request or, of an unfinished one, that of its last failed attempt. Encrypted errors are
    /// searched with the keys of this process, and otherwise never match.
    pub fn error_contains(mut self, text: impl Into<String>) -> Self {
        self.error_contains = Some(text.into());
        self
    }

    /// Whether the filter selects all requests.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the filter, as every call with it does.
    ///
    /// # Errors
    ///
    /// If a part of the filter can't match, with its name as [`Error::field`].
    pub fn validate(&self) -> Result<(), Error> {
        if let Some(channel) = &self.channel {
            validate_channel(channel).map_err(|reason| Error::request("channel", reason))?;
        }
        for (field, key) in [("key", &self.key), ("ordering_key", &self.ordering_key)] {
            let Some(key) = key else { continue };
            if key.len() > MAX_KEY_LEN {
                return Err(Error::request(field, "must be at most 255 bytes long"));
            }
            if key.contains('\0') {
                let reason = "must not contain a NUL character";
                return Err(Error::request(field, reason));
            }
        }
        if self.key.is_some() && self.channel.is_none() {
            let reason = "must be given with a key, because keys are unique within a channel";
            return Err(Error::request("channel", reason));
        }
        if let Some(destination) = &self.destination {
            validate_name(destination)?;
        }
        if let (Some(after), Some(before)) = (self.created_after, self.created_before) {
            if before <= after {
                let reason = "must be later than `created_after`";
                return Err(Error::request("created_before", reason));
            }
        }
        if let Some(text) = &self.error_contains {
            if text.is_empty() || text.len() > MAX_SEARCH_LEN || text.contains('\0') {
                let reason = "must have 1 to 1000 bytes, and no NUL character";
                return Err(Error::request("error_contains", reason));
            }
        }
        Ok(())
    }

    /// The checked filter, with the destination as it is stored.
    pub(crate) fn checked(&self) -> Result<Self, Error> {
        self.validate()?;
        let mut checked = self.clone();
        if let Some(destination) = &self.destination {
            checked.destination = Some(validate_name(destination)?);
        }
        Ok(checked)
    }
}

/// Which page of a list. Defaults to the first one, of up to [`DEFAULT_PAGE_LIMIT`] requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "it does nothing by itself"]
pub struct PageRequest {
    after: Option<Cursor>,
    limit: Option<u32>,
}

impl PageRequest {
    /// The first page.
    pub fn new() -> Self {
        Self::default()
    }

    /// The page that continues where another one ended: its [`next`](super::RequestPage::next).
    pub fn after(mut self, cursor: impl Into<Option<Cursor>>) -> Self {
        self.after = cursor.into();
        self
    }

    /// At most this many requests, from 1 to [`MAX_PAGE_LIMIT`].
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = Some(limit);
        self
    }

    /// The id below which the page begins, and how many requests it has at most.
    pub(crate) fn checked(
        &self,
        filter: &RequestFilter,
    ) -> Result<(Option<RequestId>, usize), Error> {
        let limit = self.limit.unwrap_or(DEFAULT_PAGE_LIMIT);
        if !(1..=MAX_PAGE_LIMIT).contains(&limit) {
            return Err(Error::request("limit", "must be from 1 to 1000"));
        }
        let after = self.after.as_ref().map(|cursor| cursor.of(filter));
        Ok((after.transpose()?, limit as usize))
    }
}

/// Times in microseconds since 1970, as the database counts them.
mod micros {
    use serde::{Deserializer, Serializer};

    use super::{Deserialize, Duration, Serialize, SystemTime};

    #[expect(clippy::ref_option, reason = "serde calls it")]
    pub(super) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        time.map(super::micros_of).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        let micros = Option::<u64>::deserialize(deserializer)?;
        let time = |micros| SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(micros));
        micros
            .map(|micros| time(micros).ok_or_else(|| serde::de::Error::custom("out of range")))
            .transpose()
    }
}

/// In microseconds since 1970. Times outside of what a timestamp of Postgres holds are cut.
pub(crate) fn micros_of(time: SystemTime) -> u64 {
    /// The last microsecond of the year 9999.
    const LATEST: u64 = 253_402_300_799_999_999;
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let micros = since.unwrap_or_default().as_micros();
    u64::try_from(micros).unwrap_or(LATEST).min(LATEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_part_is_named() {
        let filter = RequestFilter::new;
        let (early, late) = (SystemTime::UNIX_EPOCH, SystemTime::now());
        for (filter, field) in [
            (filter().channel(""), "channel"),
            (filter().key("k"), "channel"),
            (filter().channel("c").key("k".repeat(256)), "key"),
            (filter().ordering_key("a\0b"), "ordering_key"),
            (
                filter().destination("https://a.example/path"),
                "destination",
            ),
            (filter().destination("https://u:p@a.example"), "destination"),
            (filter().error_contains(""), "error_contains"),
            (filter().error_contains("x".repeat(1001)), "error_contains"),
            (
                filter().created_after(late).created_before(early),
                "created_before",
            ),
        ] {
            let error = filter.validate().unwrap_err();
            assert_eq!(error.field(), Some(field), "{filter:?}");
            assert!(error.is_request());
            assert!(!error.to_string().contains("u:p"), "{error}");
        }
        for limit in [0, 1001] {
            let page = PageRequest::new().limit(limit);
            let error = page.checked(&filter()).unwrap_err();
            assert_eq!(error.field(), Some("limit"));
        }
    }

    #[test]
    fn a_filter_survives_json_and_unknown_fields_are_refused() {
        let filter = RequestFilter::new()
            .id("019ab7c2-3b6e-7cc0-98c4-dc0c0c07398f".parse().unwrap())
            .channel("c")
            .key("k")
            .destination("https://a.example")
            .ordering_key("o")
            .status(Status::Available)
            .state(RequestState::SendingOnce)
            .created_after(SystemTime::UNIX_EPOCH + Duration::from_micros(1))
            .created_before(SystemTime::UNIX_EPOCH + Duration::from_micros(u64::MAX / 4))
            .error_contains("refused");
        let json = serde_json::to_string(&filter).unwrap();
        assert_eq!(serde_json::from_str::<RequestFilter>(&json).unwrap(), {
            let mut cut = filter.clone();
            let latest = Duration::from_micros(micros_of(filter.created_before.unwrap()));
            cut.created_before = Some(SystemTime::UNIX_EPOCH + latest);
            cut
        });
        assert!(!filter.is_empty());
        let empty = serde_json::from_str::<RequestFilter>("{}").unwrap();
        assert!(empty.is_empty());
        assert_eq!(serde_json::to_string(&empty).unwrap(), "{}");
        for unknown in [r#"{"chanel":"c"}"#, r#"{"status":["done"]}"#] {
            serde_json::from_str::<RequestFilter>(unknown).unwrap_err();
        }
    }
}
