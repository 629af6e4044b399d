//! The hooks of an attempt: what runs right before it is sent, and right after.
//!
//! Nothing of the attempt is sent before its hooks have let it pass, so a request whose hooks fail
//! or never return certainly hasn't been sent.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::claim::Claim;
use super::send::{ByEngine, Exchange, Failed, Sender, exchange};
use crate::classify::{FailureClass, Verdict};
use crate::hooks::{AttemptHook, OutgoingAttempt, Refusal, Then};
use crate::redact::{panic_text, redact_urls};
use crate::retry::MAX_DURATION;
use crate::runtime::caught;
use crate::trace_context::AttemptSpan;

/// The hooks of a handle, in the order in which they run.
#[derive(Clone)]
pub(crate) struct Hooks {
    pub(crate) hooks: Vec<Arc<dyn AttemptHook>>,
    /// How long all of them may take for one attempt.
    pub(crate) timeout: Duration,
}

impl Hooks {
    pub(super) fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }

    /// How much longer an attempt may take because of them.
    pub(super) fn time(&self) -> Duration {
        if self.is_empty() {
            Duration::ZERO
        } else {
            self.timeout
        }
    }

    /// The hook's name in texts. One that is alone needs no number.
    fn name(&self, position: usize) -> String {
        match self.hooks.len() {
            1 => "the hook".to_owned(),
            all => format!("hook {} of {all}", position + 1),
        }
    }

    /// Runs the hooks until one refuses the attempt.
    async fn before(&self, attempt: &mut OutgoingAttempt) -> Result<(), Failed> {
        let mut position = 0;
        let result = {
            let running = pin!(async {
                for hook in &self.hooks {
                    hook.before(attempt).await?;
                    attempt.check()?;
                    position += 1;
                }
                Ok(())
            });
            tokio::time::timeout(self.timeout, caught(running)).await
        };
        let (then, reason) = match result {
            Ok(Ok(Ok(()))) => return Ok(()),
            Ok(Ok(Err(Refusal { then, reason }))) => {
                let verb = match then {
                    Then::Judge => "failed",
                    Then::Retry(_) | Then::Discard => "refused the attempt",
                };
                (then, format!("{verb}: {}", redact_urls(&reason)))
            }
            Ok(Err(panic)) => (Then::Judge, format!("panicked: {panic}")),
            Err(_elapsed) => {
                let reason = format!("did not return within {:?}", self.timeout);
                (Then::Judge, reason)
            }
        };
        let text = format!("{} {reason}; nothing was sent", self.name(position));
        Err(Failed::by_hook(&text, then))
    }

    /// Shows the result to all hooks. The first verdict counts.
    fn after(&self, attempt: &OutgoingAttempt, exchange: &Exchange) -> Option<Verdict> {
        let mut decided = None;
        for (position, hook) in self.hooks.iter().enumerate() {
            let seen = exchange.seen();
            match catch_unwind(AssertUnwindSafe(|| hook.after(attempt, seen))) {
                Ok(verdict) => decided = decided.or(verdict),
                Err(panic) => {
                    let hook = self.name(position);
                    let error = panic_text(&*panic);
                    tracing::error!(id = %attempt.id(), hook, error, "a hook panicked");
                }
            }
        }
        decided
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("hooks", &self.hooks.len())
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// Makes the claim's attempt with the handle's hooks around it.
pub(super) async fn exchange_with_hooks(
    claim: &mut Claim,
    span: Option<&dyn AttemptSpan>,
    sender: &mut dyn Sender,
) -> Exchange {
    let driver = Arc::clone(claim.driver());
    let hooks = &driver.config.hooks;
    let number = claim.attempts();
    let mut attempt = OutgoingAttempt::new(claim.job(), number, Some(Arc::clone(&driver)));
    let began = Instant::now();
    if let Err(failed) = hooks.before(&mut attempt).await {
        return Exchange::failed(began.elapsed(), failed);
    }
    claim.begin_sending();
    let mut chosen = attempt
        .take_transport()
        .map(|transport| ByEngine::new(transport, false));
    let sender = match &mut chosen {
        Some(chosen) => chosen,
        None => sender,
    };
    let headers = Some(attempt.headers());
    let job = claim.job();
    let mut exchange = exchange(job, number, headers, span, sender, &driver).await;
    exchange.decided = hooks.after(&attempt, &exchange);
    exchange
}

impl Failed {
    fn by_hook(text: &str, then: Then) -> Self {
        let mut failed = Self::new(FailureClass::Hook, text);
        failed.then = match then {
            Then::Retry(delay) => Then::Retry(delay.min(MAX_DURATION)),
            then => then,
        };
        failed
    }
}
