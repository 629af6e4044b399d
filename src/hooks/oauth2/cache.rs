//! The current token, and one request at a time for the next one.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;

use super::super::{Refusal, Then};

/// A token is renewed this long before its end, or in the last tenth of its time.
const MARGIN: Duration = Duration::from_secs(60);
/// How long attempts whose token still holds wait for the next one.
const PATIENCE: Duration = Duration::from_secs(3);
/// After a failure, a token that still holds is used for this long before the next try.
const PAUSE: Duration = Duration::from_secs(5);

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Token(Arc<Inner>);

struct Inner {
    header: HeaderValue,
    fetched: Instant,
    renew: Instant,
    expires: Instant,
}

impl Token {
    /// A token that was fetched now and holds for this long.
    pub(super) fn new(mut header: HeaderValue, lifetime: Duration) -> Self {
        header.set_sensitive(true);
        let fetched = Instant::now();
        Self(Arc::new(Inner {
            header,
            fetched,
            renew: fetched + (lifetime - MARGIN.min(lifetime / 10)),
            expires: fetched + lifetime,
        }))
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.header.clone()
    }
}

#[derive(Default)]
pub(super) struct Cache {
    current: Mutex<Option<Token>>,
    /// Held during a request for a token. What the last one failed with.
    fetching: tokio::sync::Mutex<Option<Failure>>,
}

/// Shared by all attempts that waited for the same request.
struct Failure {
    at: Instant,
    then: Then,
    reason: String,
}

impl Cache {
    /// A token for an attempt, and whether it was fetched since the attempt asked for it.
    pub(super) async fn token<F>(&self, fetch: impl FnOnce() -> F) -> Result<(Token, bool), Refusal>
    where
        F: Future<Output = Result<Token, Refusal>>,
    {
        let asked = Instant::now();
        if let Some(token) = self.current().filter(|token| asked < token.0.expires) {
            if asked >= token.0.renew {
                // Errors are no reason to hold up attempts: the token is still good.
                let renewed = tokio::time::timeout(PATIENCE, self.renew(asked, fetch)).await;
                if let Ok(Some(renewed)) = renewed {
                    return Ok((renewed, true));
                }
            }
            return Ok((token, false));
        }
        let mut failure = self.fetching.lock().await;
        // Another attempt may have fetched one meanwhile, or failed to.
        if let Some(token) = self.current().filter(|token| asked <= token.0.fetched) {
            return Ok((token, true));
        }
        if let Some(failure) = failure.as_ref().filter(|failure| asked <= failure.at) {
            return Err(failure.as_refusal());
        }
        self.fetch(&mut failure, fetch).await.map(|it| (it, true))
    }

    /// `None` if another attempt renews the token, or it can't be renewed now.
    async fn renew<F>(&self, now: Instant, fetch: impl FnOnce() -> F) -> Option<Token>
    where
        F: Future<Output = Result<Token, Refusal>>,
    {
        let mut failure = self.fetching.try_lock().ok()?;
        if let Some(token) = self.current().filter(|token| now < token.0.renew) {
            return Some(token);
        }
        let pauses = failure
            .as_ref()
            .is_some_and(|failure| now.saturating_duration_since(failure.at) < PAUSE);
        if pauses {
            return None;
        }
        self.fetch(&mut failure, fetch).await.ok()
    }

    async fn fetch<F>(
        &self,
        failure: &mut Option<Failure>,
        fetch: impl FnOnce() -> F,
    ) -> Result<Token, Refusal>
    where
        F: Future<Output = Result<Token, Refusal>>,
    {
        match fetch().await {
            Ok(token) => {
                *self.lock() = Some(token.clone());
                *failure = None;
                Ok(token)
            }
            Err(Refusal { then, reason }) => {
                let failed = failure.insert(Failure {
                    at: Instant::now(),
                    then,
                    reason,
                });
                Err(failed.as_refusal())
            }
        }
    }

    /// Forgets this token, unless another one has taken its place.
    pub(super) fn forget(&self, token: &Token) {
        let mut current = self.lock();
        if current
            .as_ref()
            .is_some_and(|it| Arc::ptr_eq(&it.0, &token.0))
        {
            *current = None;
        }
    }

    fn current(&self) -> Option<Token> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Token>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Failure {
    fn as_refusal(&self) -> Refusal {
        Refusal {
            then: self.then,
            reason: self.reason.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn token(lifetime: Duration) -> Token {
        Token::new(HeaderValue::from_static("Bearer a"), lifetime)
    }

    async fn unasked() -> Result<Token, Refusal> {
        unreachable!("there is a token")
    }

    #[tokio::test]
    async fn a_token_is_renewed_a_minute_before_its_end() {
        let of_an_hour = token(HOUR).0;
        assert_eq!(of_an_hour.expires - of_an_hour.renew, MARGIN);
        let of_ten_seconds = token(Duration::from_secs(10)).0;
        let margin = of_ten_seconds.expires - of_ten_seconds.renew;
        assert_eq!(margin, Duration::from_secs(1));
    }

    #[tokio::test]
    async fn attempts_at_the_same_time_share_one_request_and_its_failure() {
        let cache = Cache::default();
        let fetched = AtomicUsize::new(0);
        let (cache, fetched) = (&cache, &fetched);
        let ask = |fails| async move {
            cache
                .token(|| async {
                    fetched.fetch_add(1, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    if fails {
                        Err(Refusal::retry("down"))
                    } else {
                        Ok(token(HOUR))
                    }
                })
                .await
        };
        let asked = futures_util::future::join_all((0..20).map(|_| ask(true))).await;
        assert!(asked.iter().all(Result::is_err));
        assert_eq!(fetched.load(Ordering::SeqCst), 1);
        let asked = futures_util::future::join_all((0..20).map(|_| ask(false))).await;
        assert!(asked.iter().all(|it| matches!(it, Ok((_, true)))));
        assert_eq!(fetched.load(Ordering::SeqCst), 2);
        assert!(!cache.token(unasked).await.unwrap().1);
    }

    #[tokio::test]
    async fn a_token_that_still_holds_is_used_while_no_other_can_be_had() {
        let cache = Cache::default();
        let old = Token(Arc::new(Inner {
            header: HeaderValue::from_static("Bearer old"),
            fetched: Instant::now(),
            renew: Instant::now(),
            expires: Instant::now() + HOUR,
        }));
        *cache.lock() = Some(old);
        let (used, _) = cache
            .token(|| async { Err(Refusal::retry("down")) })
            .await
            .unwrap();
        assert_eq!(used.header(), "Bearer old");
        // Not asked again at once.
        assert_eq!(cache.token(unasked).await.unwrap().0.header(), "Bearer old");
        *cache.fetching.lock().await = None;
        let new = || async { Ok(token(HOUR)) };
        assert_eq!(cache.token(new).await.unwrap().0.header(), "Bearer a");
    }

    #[tokio::test]
    async fn only_the_current_token_is_forgotten() {
        let cache = Cache::default();
        let first = cache.token(|| async { Ok(token(HOUR)) }).await.unwrap().0;
        cache.forget(&token(HOUR));
        assert!(cache.current().is_some());
        cache.forget(&first);
        assert!(cache.current().is_none());
    }

    #[tokio::test]
    async fn an_attempt_that_gives_up_its_request_leaves_it_to_the_next() {
        let cache = Cache::default();
        let stuck = cache.token(std::future::pending::<Result<Token, Refusal>>);
        let stuck = tokio::time::timeout(Duration::from_millis(1), stuck).await;
        assert!(stuck.is_err());
        assert!(cache.token(|| async { Ok(token(HOUR)) }).await.is_ok());
    }
}
