//! Waiting for a request to end, with a message that says where it stands if it doesn't.

use std::time::Duration;

use tokio::time::timeout;

use super::Error;
use crate::{Durable, RequestId, Response, Status};

/// How a request ended; see [`outcome`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// The terminal status.
    pub status: Status,
    /// What a waiter gets.
    pub response: Result<Response, crate::Error>,
}

/// Waits until a request has ended, and tells how.
///
/// # Errors
///
/// When the request has not ended within the given time, with the state that it is in; when there is
/// no such request; when the database fails.
///
/// # Cancel safety
///
/// Cancel safe: it only reads.
///
/// # Examples
///
/// ```no_run
/// use std::time::Duration;
/// use requeuest::{Durable, Status, testkit};
///
/// # async fn example(durable: Durable) -> Result<(), Box<dyn std::error::Error>> {
/// let id = durable.fire(http::Request::post("http://127.0.0.1:8080/").body("")?).await?;
/// let outcome = testkit::outcome(&durable, id, Duration::from_secs(5)).await?;
/// assert_eq!(outcome.status, Status::Completed);
/// # Ok(())
/// # }
/// ```
pub async fn outcome(durable: &Durable, id: RequestId, within: Duration) -> Result<Outcome, Error> {
    let waited = timeout(within, durable.response(id)).await;
    let status = durable
        .status(id)
        .await
        .map_err(|error| Error::new("the request's status can't be read").caused_by(error))?;
    match (waited, status) {
        (Ok(response), Some(status)) if status.is_terminal() => Ok(Outcome { status, response }),
        (Ok(Err(error)), _) => {
            Err(Error::new(format!("request {id} can't be waited for")).caused_by(error))
        }
        (_, None) => Err(Error::new(format!("there is no request {id}"))),
        (_, Some(status)) => Err(Error::new(format!(
            "request {id} has not ended within {within:?}: it is {status}"
        ))),
    }
}
