//! A token of OAuth 2 client credentials (RFC 6749 section 4.4) on each attempt.

mod cache;
mod endpoint;

use std::fmt;

use http::header::AUTHORIZATION;
use http::{HeaderMap, StatusCode};

use self::cache::{Cache, Token};
use self::endpoint::Endpoint;
use super::{AttemptHook, Before, OutgoingAttempt};
use crate::classify::{FailureClass, Verdict};
use crate::engine::attempt::transport::HttpClient;
use crate::error::BoxError;

/// Sets `Authorization: Bearer …` on each attempt, to a token of OAuth 2 client credentials.
///
/// The token is fetched before the first attempt and kept in memory. It is fetched anew when nine
/// tenths of its time are over, or a minute before its end if that is later. However many attempts
/// need one, one request is made for it. After a 401 to a token that was fetched for an earlier
/// attempt, that token is forgotten, and the attempt is repeated with a new one.
///
/// The request for the token goes through the handle's own
/// [transport](crate::DurableBuilder::transport), which follows no redirect of it, or the client
/// that [`transport`](Self::transport) sets. A guard of the handle checks its URL too, and a
/// request whose token it denies is given up. It may take 10 seconds, and its answer 64 KiB. A
/// token server that asks for a delay with `Retry-After` delays the attempt that long, at most an
/// hour.
///
/// **Every destination of the handle gets the token.** Use [`only_to`](super::only_to) unless all
/// of them may have it. `Debug` and errors show neither the secret nor a token. With the feature
/// `encryption` or `webhooks`, the memory of the secret is overwritten when the hook is dropped.
///
/// # Examples
///
/// ```
/// use requeuest::Durable;
/// use requeuest::hooks::{OAuth2, only_to};
///
/// # fn example(pool: sqlx::PgPool, secret: String) -> Result<(), requeuest::Error> {
/// let oauth = OAuth2::client_credentials("https://login.example.com/token", "billing", secret)
///     .scope("charges refunds")
///     .audience("https://api.example.com");
/// let durable = Durable::builder(pool)
///     .on_attempt(only_to("https://api.example.com", oauth))
///     .build()?;
/// # Ok(()) }
/// ```
pub struct OAuth2 {
    endpoint: Endpoint,
    cache: Cache,
}

/// What an attempt was sent with.
#[derive(Clone)]
struct Used {
    token: Token,
    /// It was fetched for this attempt, so a new one would be no better.
    fresh: bool,
}

impl OAuth2 {
    /// Gets tokens from this URL, with the client's id and secret in an `Authorization: Basic`
    /// header. The URL must be absolute, which is checked when the handle is built.
    pub fn client_credentials(
        token_url: impl AsRef<str>,
        id: impl Into<String>,
        secret: impl Into<String>,
    ) -> Self {
        Self {
            endpoint: Endpoint::new(token_url.as_ref(), id.into(), secret.into()),
            cache: Cache::default(),
        }
    }

    /// The `scope` of the token: one, or several with spaces between. Defaults to none.
    #[must_use]
    pub fn scope(mut self, scope: impl Into<String>) -> Self {
        self.endpoint.scope = Some(scope.into());
        self
    }

    /// The `audience` of the token, which some servers ask for. Defaults to none.
    #[must_use]
    pub fn audience(mut self, audience: impl Into<String>) -> Self {
        self.endpoint.audience = Some(audience.into());
        self
    }

    /// Sends the client's id and secret as `client_id` and `client_secret` in the body, for servers
    /// that know no `Authorization: Basic`.
    #[must_use]
    pub fn credentials_in_body(mut self) -> Self {
        self.endpoint.in_body = true;
        self
    }

    /// The client of the requests for tokens. Defaults to the handle's own
    /// [transport](crate::DurableBuilder::transport). Set one if that adds headers or credentials
    /// to everything that it sends.
    #[must_use]
    pub fn transport<S: HttpClient>(mut self, client: S) -> Self {
        self.endpoint.send_with(client);
        self
    }
}

impl AttemptHook for OAuth2 {
    fn before<'a>(&'a self, attempt: &'a mut OutgoingAttempt) -> Before<'a> {
        Box::pin(async move {
            let fetch = || self.endpoint.fetch(attempt);
            let (token, fresh) = self.cache.token(fetch).await?;
            let header = token.header();
            attempt.headers_mut().insert(AUTHORIZATION, header);
            attempt.notes_mut().insert(Used { token, fresh });
            Ok(())
        })
    }

    fn after(
        &self,
        attempt: &OutgoingAttempt,
        result: Result<(StatusCode, &HeaderMap), FailureClass>,
    ) -> Option<Verdict> {
        let used = attempt.notes().get::<Used>()?;
        if !matches!(result, Ok((StatusCode::UNAUTHORIZED, _))) {
            return None;
        }
        self.cache.forget(&used.token);
        (!used.fresh).then_some(Verdict::Retry)
    }

    fn check(&self) -> Result<(), BoxError> {
        self.endpoint.check()
    }
}

impl fmt::Debug for OAuth2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OAuth2")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}
