//! A hook for some destinations only.

use std::fmt;

use http::{HeaderMap, StatusCode};

use super::{AttemptHook, Before, OutgoingAttempt};
use crate::classify::{FailureClass, Verdict};
use crate::destination::DestinationPattern;
use crate::error::{BoxError, Error};

/// Limits a hook to the attempts that go to these destinations, so that others don't get its
/// header. The pattern is one of [`DestinationPattern`], and is compared with the scheme, host and
/// port of the URL, whatever the request's limit key is.
///
/// # Examples
///
/// ```
/// use requeuest::hooks::{OAuth2, only_to};
///
/// let token_url = "https://login.example.com/oauth/token";
/// let oauth = only_to("https://api.example.com", OAuth2::client_credentials(token_url, "a", "b"));
/// ```
pub fn only_to<H: AttemptHook>(pattern: impl AsRef<str>, hook: H) -> OnlyTo<H> {
    OnlyTo {
        pattern: pattern.as_ref().parse(),
        hook,
    }
}

/// The hook that [`only_to`] returns.
pub struct OnlyTo<H> {
    /// Checked when the handle is built.
    pattern: Result<DestinationPattern, Error>,
    hook: H,
}

impl<H> OnlyTo<H> {
    fn is_for(&self, attempt: &OutgoingAttempt) -> bool {
        match &self.pattern {
            Ok(pattern) => pattern.is_for(&attempt.destination()),
            Err(_) => false,
        }
    }
}

impl<H: AttemptHook> AttemptHook for OnlyTo<H> {
    fn before<'a>(&'a self, attempt: &'a mut OutgoingAttempt) -> Before<'a> {
        if self.is_for(attempt) {
            self.hook.before(attempt)
        } else {
            Box::pin(async { Ok(()) })
        }
    }

    fn after(
        &self,
        attempt: &OutgoingAttempt,
        result: Result<(StatusCode, &HeaderMap), FailureClass>,
    ) -> Option<Verdict> {
        let is_for = self.is_for(attempt);
        is_for.then(|| self.hook.after(attempt, result)).flatten()
    }

    fn check(&self) -> Result<(), BoxError> {
        match &self.pattern {
            Ok(pattern) if pattern.is_of_limit_key() => {
                Err("a limit key doesn't say where an attempt goes; name a host".into())
            }
            Ok(_) => self.hook.check(),
            Err(error) => Err(error.to_string().into()),
        }
    }
}

impl<H: fmt::Debug> fmt::Debug for OnlyTo<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnlyTo")
            .field("pattern", &self.pattern.as_ref().ok())
            .field("hook", &self.hook)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::attempt::tests::first_of;
    use super::super::{Refusal, hook_fn};
    use super::*;

    async fn mark(attempt: &mut OutgoingAttempt) -> Result<(), Refusal> {
        attempt.set_header("x-mark", "1")
    }

    #[tokio::test]
    async fn a_hook_is_for_its_destination_only() {
        for (url, marked) in [
            ("https://api.example/a", true),
            ("https://API.example:443/a", true),
            ("https://api.example:444/a", false),
            ("http://api.example/a", false),
            ("https://api.example.evil/a", false),
            ("https://api.example@evil.example/a", false),
        ] {
            let mut attempt = first_of(http::Request::get(url).body("").unwrap());
            let hook = only_to("https://api.example", hook_fn(mark));
            hook.before(&mut attempt).await.unwrap();
            assert_eq!(attempt.headers().contains_key("x-mark"), marked, "{url}");
        }
    }

    #[test]
    fn a_pattern_that_is_none_of_a_host_is_refused() {
        for pattern in ["https://a.example/path", "key:a", "key:*", ""] {
            assert!(
                only_to(pattern, hook_fn(mark)).check().is_err(),
                "{pattern}"
            );
        }
        assert!(only_to("*.example", hook_fn(mark)).check().is_ok());
    }
}
