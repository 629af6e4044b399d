//! What operators change, and who did it: the record of changes.

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime};

use crate::error::Error;
use crate::operation::OperationId;

/// How long changes and finished operations are kept: 90 days. No right of a database role that
/// delivers or administers can delete them earlier.
pub const CHANGES_RETENTION: Duration = Duration::from_secs(90 * 24 * 3600);
/// The longest name of an actor, in bytes: 200.
pub const MAX_ACTOR_LEN: usize = 200;
/// The longest reason of a change, in bytes: 2000.
pub const MAX_REASON_LEN: usize = 2000;
/// The most changes and operations that one page shows: 1000.
pub const MAX_CHANGES: u32 = 1000;
/// How many a page shows, unless its filter says otherwise: 50.
pub const DEFAULT_CHANGES: u32 = 50;

/// One change that an operator made. [`Admin::changes`](crate::admin::Admin::changes) lists them.
///
/// It names its target by its id or name, and shows nothing of a request's content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Change {
    /// A later change has a greater number.
    pub number: u64,
    /// When it was made, by the database's clock.
    pub at: SystemTime,
    /// Who made it.
    pub actor: String,
    /// Why, if the operator said so.
    pub reason: Option<String>,
    /// What was done: the name of the method of [`Admin`](crate::admin::Admin), `start_operation`
    /// for [`start`](crate::admin::Admin::start), or the name of an
    /// [`Action`](crate::admin::Action) for a part of an operation. Later versions may add others.
    pub action: String,
    /// To what: the id of a request or of an operation, or the name of a channel or a destination.
    pub target: String,
    /// More of it, as JSON: the new id of a replayed request, the policy of a destination, the
    /// requests of an operation.
    pub detail: Option<String>,
    /// The operation on many requests that made it.
    pub operation: Option<OperationId>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} by {}", self.action, self.target, self.actor)?;
        match &self.reason {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

/// Which changes a page shows. All of them by default, the newest first.
///
/// # Examples
///
/// ```
/// use requeuest::admin::ChangeFilter;
///
/// let filter = ChangeFilter::new().target("emails").limit(10);
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct ChangeFilter {
    pub(crate) target: Option<String>,
    pub(crate) before: Option<u64>,
    pub(crate) limit: Option<u32>,
}

impl ChangeFilter {
    /// All changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only changes of this target: see [`Change::target`].
    pub fn target(mut self, target: impl Into<String>) -> Self {
        self.target = Some(target.into());
        self
    }

    /// Only changes with a smaller [`number`](Change::number). With that of the last change of a
    /// page, this is the next page.
    pub fn before(mut self, number: u64) -> Self {
        self.before = Some(number);
        self
    }

    /// How many changes a page shows at most. Defaults to [`DEFAULT_CHANGES`], and is at most
    /// [`MAX_CHANGES`].
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = Some(limit);
        self
    }

    pub(crate) fn checked(&self) -> Result<u32, Error> {
        if let Some(target) = &self.target {
            checked("target", target, MAX_REASON_LEN)?;
        }
        checked_limit(self.limit)
    }
}

/// A limit of a page.
pub(crate) fn checked_limit(limit: Option<u32>) -> Result<u32, Error> {
    match limit.unwrap_or(DEFAULT_CHANGES) {
        limit @ 1..=MAX_CHANGES => Ok(limit),
        _ => Err(Error::request(
            "limit",
            format!("must be from 1 to {MAX_CHANGES}"),
        )),
    }
}

/// Who changes something, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Author {
    /// `None`: the user and the host of this process.
    pub(crate) actor: Option<String>,
    pub(crate) reason: Option<String>,
}

/// An author whose texts can be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Signed {
    pub(crate) actor: String,
    pub(crate) reason: Option<String>,
}

impl Author {
    /// `default` is who acts if the operator named no one.
    pub(crate) fn checked(&self, default: impl FnOnce() -> String) -> Result<Signed, Error> {
        if let Some(actor) = &self.actor {
            checked("actor", actor, MAX_ACTOR_LEN)?;
        }
        if let Some(reason) = &self.reason {
            checked("reason", reason, MAX_REASON_LEN)?;
        }
        Ok(Signed {
            actor: self.actor.clone().unwrap_or_else(default),
            reason: self.reason.clone(),
        })
    }
}

/// A line of text that a terminal shows as it is.
pub(crate) fn checked(field: &'static str, text: &str, longest: usize) -> Result<(), Error> {
    let reason: Cow<'static, str> = if text.trim().is_empty() {
        "must not be empty".into()
    } else if text.len() > longest {
        format!("must not be longer than {longest} bytes").into()
    } else if text.chars().any(char::is_control) {
        "must be one line, without control characters".into()
    } else {
        return Ok(());
    };
    Err(Error::request(field, reason))
}

/// What is recorded of a change, beside its author.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) action: &'static str,
    pub(crate) target: String,
    pub(crate) detail: Option<String>,
}

impl Entry {
    pub(crate) fn new(action: &'static str, target: impl Into<String>) -> Self {
        Self {
            action,
            target: target.into(),
            detail: None,
        }
    }

    /// With a JSON object. Nothing secret may be in it.
    pub(crate) fn detail(mut self, detail: &serde_json::Value) -> Self {
        self.detail = Some(detail.to_string());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_author_says_who_and_why_in_a_line_each() {
        let author = |actor: Option<&str>, reason: Option<&str>| Author {
            actor: actor.map(str::to_owned),
            reason: reason.map(str::to_owned),
        };
        let signed = |author: Author| author.checked(|| "me@here".to_owned());
        let both = signed(author(Some("ann"), Some("as agreed"))).unwrap();
        assert_eq!(
            (&*both.actor, both.reason.as_deref()),
            ("ann", Some("as agreed"))
        );
        assert_eq!(signed(author(None, None)).unwrap().actor, "me@here");
        for (bad, field) in [
            (author(Some(" "), None), "actor"),
            (author(Some(&"x".repeat(201)), None), "actor"),
            (author(None, Some("two\nlines")), "reason"),
            (author(None, Some(&"x".repeat(2001))), "reason"),
        ] {
            let error = signed(bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
        assert!(ChangeFilter::new().limit(0).checked().is_err());
        assert!(ChangeFilter::new().limit(1001).checked().is_err());
        assert!(ChangeFilter::new().target("a\0").checked().is_err());
    }
}
