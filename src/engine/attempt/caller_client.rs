//! The clients of callers that wait in this process.
//!
//! While its caller waits, a request is sent through the caller's client, whether its claim came
//! with the insert or from a later poll. Other requests go through the default transport.

#[cfg(feature = "reqwest-middleware")]
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use http::Extensions;
use tokio::sync::mpsc;
use tracing::Span;

use super::claim::Claim;
use super::transport::Transport;
#[cfg(feature = "reqwest-middleware")]
use super::{drive::drive, send::Sender};

/// How a waiting caller's request is sent.
#[derive(Clone, Debug)]
pub(crate) enum CallerClient {
    /// By the caller's own future, which borrows the client. There is room for one claim: a caller
    /// that didn't come for the last one gets no other.
    #[cfg_attr(
        not(feature = "reqwest-middleware"),
        expect(dead_code, reason = "only the middleware's callers send by themselves")
    )]
    Future(mpsc::Sender<Claim>),
    /// By the engine, through the service that the caller used.
    Service(CallerService),
}

/// A caller's service, what the caller attached to the request, and the span of the call.
#[derive(Clone, Debug)]
pub(crate) struct CallerService {
    // `BoxCloneService` isn't `Sync`.
    transport: Arc<Mutex<Transport>>,
    extensions: Extensions,
    span: Span,
}

impl CallerClient {
    pub(crate) fn service(transport: Transport, extensions: Extensions, span: Span) -> Self {
        Self::Service(CallerService {
            transport: Arc::new(Mutex::new(transport)),
            extensions,
            span,
        })
    }
}

/// The claims whose attempts a caller's own future makes.
#[cfg(feature = "reqwest-middleware")]
#[derive(Debug)]
pub(crate) struct CallerClaims(mpsc::Receiver<Claim>);

#[cfg(feature = "reqwest-middleware")]
impl CallerClient {
    /// A client for a caller that sends by itself, and the claims that come to it.
    pub(crate) fn future() -> (Self, CallerClaims) {
        let (sender, claims) = mpsc::channel(1);
        (Self::Future(sender), CallerClaims(claims))
    }
}

#[cfg(feature = "reqwest-middleware")]
impl CallerClaims {
    /// Makes the attempts of the claims that come, and never returns.
    pub(crate) async fn drive(&mut self, sender: &mut dyn Sender) -> Infallible {
        while let Some(claim) = self.0.recv().await {
            drive(claim, sender).await;
        }
        std::future::pending().await
    }
}

/// Hands a claim to the caller that waits for it and sends by itself. Otherwise returns the claim,
/// with the client through which the engine makes its attempts. `client` is given for a fired
/// request that came through a caller's service.
pub(crate) fn assign(mut claim: Claim, client: Option<CallerClient>) -> Option<(Claim, Transport)> {
    let client = client.or_else(|| claim.driver().waiters.client(claim.job().id));
    let transport = match client {
        Some(CallerClient::Future(caller)) => match caller.try_send(claim.awaiting_caller()) {
            Ok(()) => return None,
            // The caller is gone, or isn't polled any more.
            Err(unclaimed) => {
                claim = unclaimed.into_inner();
                claim.use_default_client()
            }
        },
        Some(CallerClient::Service(service)) => {
            claim.attach(service.extensions, service.span);
            let transport = service.transport.lock();
            Some(transport.unwrap_or_else(PoisonError::into_inner).clone())
        }
        None => claim.use_default_client(),
    };
    // There always is one: no request is claimed before a transport is known.
    transport.map(|transport| (claim, transport))
}
