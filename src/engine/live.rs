//! The clients of callers that wait in this process.
//!
//! While its caller waits, a request is sent the way the caller would have sent it, whether its claim came with the insert or from a
//! poll later. Without such a caller it goes through the handle's own transport.

use std::sync::{Arc, Mutex, PoisonError};

use http::Extensions;
use tokio::sync::mpsc;

use crate::engine::runner::claim::Claim;
use crate::engine::transport::Transport;

/// How a waiting caller's request is sent.
#[derive(Clone, Debug)]
pub(crate) enum Live {
    /// By the caller's own future, which has the client borrowed. There is room for one claim: a caller that did not come for the
    /// last one gets no other.
    #[cfg_attr(
        not(feature = "reqwest-middleware"),
        allow(dead_code, reason = "only the middleware's callers send by themselves")
    )]
    Caller(mpsc::Sender<Claim>),
    /// By the engine, through the service that the caller used, with what it attached to the request.
    Service(Service),
}

#[derive(Clone, Debug)]
pub(crate) struct Service {
    // `BoxCloneService` is not `Sync`.
    transport: Arc<Mutex<Transport>>,
    extensions: Extensions,
}

impl Live {
    pub(crate) fn service(transport: Transport, extensions: Extensions) -> Self {
        Self::Service(Service {
            transport: Arc::new(Mutex::new(transport)),
            extensions,
        })
    }
}

/// Gives a claim to whoever waits for it and sends by himself. Else returns it, with the client through which the engine is to make its
/// attempts. `live` is for requests that nobody waits for and that came through a client all the same.
pub(crate) fn hand_over(mut claim: Claim, live: Option<Live>) -> Option<(Claim, Transport)> {
    let live = live.or_else(|| claim.engine().shared().waiters.live(claim.job().id));
    let transport = match live {
        Some(Live::Caller(caller)) => match caller.try_send(claim.awaiting_caller()) {
            Ok(()) => return None,
            // Gone, or not polled any more.
            Err(unclaimed) => {
                claim = unclaimed.into_inner();
                claim.engine().transport()
            }
        },
        Some(Live::Service(service)) => {
            claim.attach(service.extensions);
            let transport = service.transport.lock();
            Some(transport.unwrap_or_else(PoisonError::into_inner).clone())
        }
        None => claim.engine().transport(),
    };
    // There always is one: nothing is claimed before a transport is known.
    transport.map(|transport| (claim, transport))
}
