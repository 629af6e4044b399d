//! Secrets of hooks, guards and keys, which a program must not print, log or store either.

use std::convert::Infallible;
use std::pin::Pin;

use requeuest::encryption::{Key, Keyring};
use requeuest::guard::Guard;
use requeuest::hooks::{OAuth2, OutgoingAttempt, Refusal, header_fn, hook_fn, only_to};
use requeuest::webhooks::{Endpoint, Signer, SigningKey, Verifier};
use requeuest::{AttemptHook, DeadLetterFilter, Durable, DurableBuilder, FailureClass, Verdict};
use sqlx::PgPool;

use super::{named, named_builder, request, show, show_error, url};
use crate::support::{LONG, in_time, outcome_of};

/// What hooks add to an attempt, which is in no table at all.
pub const OF_HOOKS: [&str; 4] = ["knry-token", "knry-hook", "knry-client", "a25yes1zawdu"];

/// `knry-signing-secret-of-hooks`
const SIGNING: &str = "whsec_a25yeS1zaWduaW5nLXNlY3JldC1vZi1ob29rcw==";

/// Makes attempts that hooks change, refuse and fail.
pub async fn attempts(pool: &PgPool, authority: &str) {
    keys();
    let key: SigningKey = SIGNING.parse().unwrap();
    let oauth = oauth(authority, "/token");
    let failing_oauth = only_to("http://localhost", self::oauth(authority, "/busy"));
    let lookup = Signer::lookup(async |_: Endpoint| Ok(vec![SIGNING.parse::<SigningKey>()?]));
    show("key", &key);
    show("oauth", &oauth);
    show("signer", &Signer::new([key]));
    show("lookup", &lookup);
    let built = named_builder(pool)
        .channel("attempts")
        .strip_headers(["x-api-key"])
        .on_attempt(oauth)
        .on_attempt(failing_oauth)
        .on_attempt(lookup)
        .on_attempt(header_fn("x-hook", || async {
            Ok::<_, Infallible>("knry-hook-open")
        }))
        .on_attempt(hook_fn(by_path))
        .on_attempt(AfterAll);
    show("builder", &built);
    let durable = built.build().unwrap();
    for path in [
        "", "/refuse", "/discard", "/fail", "/panic", "/value", "/name", "/after",
    ] {
        give(&durable, authority, path).await;
    }
    // Its token server answers with 503.
    let local = authority.replace("127.0.0.1", "localhost");
    give(&durable, &local, "/refuse").await;
    in_time(durable.shutdown(LONG)).await.unwrap();
    guarded(named_builder(pool).channel("guarded"), authority).await;
}

async fn give(durable: &Durable, authority: &str, path: &str) {
    let id = durable.fire(named(authority, path)).await.unwrap();
    show(path, &outcome_of(durable, id).await);
    if let Err(error) = in_time(durable.await_response(request(authority, path))).await {
        show_error(path, error);
    }
    for letter in durable
        .dead_letters(&DeadLetterFilter::default())
        .await
        .unwrap()
    {
        show(path, &letter);
    }
}

fn oauth(authority: &str, path: &str) -> OAuth2 {
    let login = format!("http://{authority}{path}/knry-path?knry-query");
    OAuth2::client_credentials(login, "billing", "knry-client-secret")
}

/// Behaves as the path asks for.
async fn by_path(attempt: &mut OutgoingAttempt) -> Result<(), Refusal> {
    show("attempt", attempt);
    attempt.set_secret_header("x-signed", "knry-hook-secret")?;
    show("attempt", attempt);
    let url = url("host", "");
    match attempt.uri().path().split('/').nth(1) {
        Some("refuse") => Err(Refusal::retry(format!("no way to {url}"))),
        Some("discard") => Err(Refusal::discard(format!("no way to {url}"))),
        Some("fail") => Err(std::io::Error::other(format!("no way to {url}")).into()),
        Some("panic") => panic!("no way to {url}"),
        Some("value") => attempt.set_header("x-value", "knry-hook\n"),
        Some("name") => attempt.set_header("x name", "knry-hook"),
        _ => Ok(()),
    }
}

/// Panics with a URL after the attempt.
struct AfterAll;

impl AttemptHook for AfterAll {
    fn before<'a>(
        &'a self,
        _: &'a mut OutgoingAttempt,
    ) -> Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>> {
        Box::pin(async { Ok(()) })
    }

    fn after(
        &self,
        attempt: &OutgoingAttempt,
        result: Result<(http::StatusCode, &http::HeaderMap), FailureClass>,
    ) -> Option<Verdict> {
        show("after", attempt);
        assert!(
            result.is_ok() && !attempt.uri().path().starts_with("/after"),
            "no way to {}",
            attempt.uri()
        );
        None
    }
}

/// What a guard refuses, and a token server that it denies.
async fn guarded(builder: DurableBuilder, authority: &str) {
    let port = authority.rsplit(':').next().unwrap().parse().unwrap();
    let guard = Guard::new().allow("127.0.0.1").deny_ports([port]);
    show("guard", &guard);
    let login = oauth(authority, "/token");
    let durable = builder.guard(guard).on_attempt(login).build().unwrap();
    for path in ["", "/busy"] {
        show_error(
            "denied",
            durable.fire(named(authority, path)).await.unwrap_err(),
        );
    }
    let elsewhere = named("127.0.0.1:9", "");
    let id = durable.fire(elsewhere).await.unwrap();
    show("denied token", &outcome_of(&durable, id).await);
    in_time(durable.shutdown(LONG)).await.unwrap();
}

/// Keys, and texts that are none.
fn keys() {
    let bytes = b"knry-encryption-key-of-32-bytes.";
    let ring = Keyring::new(Key::new("id", bytes).unwrap());
    show("ring", &ring);
    for bytes in [&bytes[..31], b"knry-short"] {
        show_error("key", Key::new("id", bytes).unwrap_err());
    }
    show_error("key", Key::from_base64("id", "knry-key").unwrap_err());
    show("verifier", &Verifier::new([SIGNING]).unwrap());
    for text in ["whsec_knry-secret", "whsk_knry-secret", "knry-secret"] {
        let error = text.parse::<SigningKey>().unwrap_err();
        println!("key: {error} {error:?}");
        let error = Verifier::new([text]).unwrap_err();
        println!("key: {error} {error:?}");
    }
}
