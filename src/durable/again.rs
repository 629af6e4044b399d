//! Calls that a retry layer above this crate makes again.

use std::time::Instant;

use super::Durable;
use super::submit::{Mode, Prepared};
use crate::error::Error;
use crate::fingerprint::fingerprint;
use crate::id::RequestId;
use crate::outcome::Outcome;
use crate::repetition::Marker;
use crate::request::Request;
use crate::response::Response;
use crate::status::Status;

impl Durable {
    /// As [`prepare`](Self::prepare), for a call with the `marker` of an earlier one. If that made
    /// the same request, the request keeps its id, and with it its idempotency key.
    pub(crate) fn prepare_call(
        &self,
        request: Request,
        mode: Mode,
        marker: Option<Marker>,
    ) -> Result<Prepared, Error> {
        let instance = self.engine().driver().instance;
        let earlier = marker.filter(|marker| marker.is_of(instance, &request, Instant::now()));
        let id = earlier
            .as_ref()
            .map_or_else(RequestId::generate, Marker::id);
        let mut prepared = self.prepare_as(id, request, mode)?;
        // With a caller's key, the database knows the earlier request.
        if earlier.is_none() && prepared.row.key.is_none() {
            self.warn_of_retry_layer(&prepared);
        }
        prepared.earlier = earlier;
        Ok(prepared)
    }

    /// The marker of the call that makes this request.
    pub(crate) fn marker(&self, prepared: &Prepared) -> Marker {
        let instance = self.engine().driver().instance;
        Marker::new(prepared.id(), instance, prepared.request())
    }

    /// What a call returns, and the marker that it leaves. It leaves none with a final response:
    /// a caller that makes the same call again means another one.
    pub(crate) fn end_call(
        &self,
        marker: Marker,
        outcome: Result<Outcome, Error>,
    ) -> (Result<Response, Error>, Option<Marker>) {
        let completed = match &outcome {
            Ok(outcome) => outcome.status() == Status::Completed,
            Err(_) => false,
        };
        let given_up = match &outcome {
            Ok(outcome) => matches!(outcome.status(), Status::Discarded | Status::Ambiguous),
            Err(error) => error.is_indeterminate(),
        };
        if given_up {
            self.remember_failed(marker.request());
        }
        let result = outcome.and_then(Outcome::into_result);
        let leaves = !(completed && result.is_ok());
        (result, leaves.then(|| marker.ended(Instant::now())))
    }

    fn remember_failed(&self, request: &Request) {
        if let Ok(uri) = request.uri() {
            let fingerprint = fingerprint(request, &uri);
            self.inner.failed.remember(fingerprint, Instant::now());
        }
    }

    /// Warns of a retry layer that doesn't pass the extensions on, so that each of its tries is a
    /// new request.
    fn warn_of_retry_layer(&self, prepared: &Prepared) {
        let failed = &self.inner.failed;
        if failed.is_first_repetition(|| prepared.fingerprint(), Instant::now) {
            tracing::warn!(
                id = %prepared.id(),
                "a request was made again right after it was given up, with a new idempotency \
                 key; remove the retry layer above requeuest, and put requeuest first in the stack"
            );
        }
    }
}
