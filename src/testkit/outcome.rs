//! Waits for a request to finish, with an error that gives the request's status.

use std::time::Duration;

use tokio::time::timeout;

use super::Error;
use crate::{Durable, Outcome, RequestId};

/// Waits until a request has finished, and returns its outcome.
///
/// This is [`Durable::outcome`] with a time limit, and with an error that gives the request's
/// status.
///
/// # Errors
///
/// If the request hasn't finished within the given time, with its current status; if there is no
/// such request; if the database fails.
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
/// assert_eq!(outcome.status(), Status::Completed);
/// # Ok(())
/// # }
/// ```
pub async fn outcome(durable: &Durable, id: RequestId, within: Duration) -> Result<Outcome, Error> {
    match timeout(within, durable.outcome(id)).await {
        Ok(Ok(outcome)) => return Ok(outcome),
        Ok(Err(error)) if error.is_unknown_id() => {
            return Err(Error::new(format!(
                "request {id} does not exist, or its outcome has expired"
            )));
        }
        Ok(Err(error)) => {
            let message = format!("waiting for request {id} failed");
            return Err(Error::new(message).caused_by(error));
        }
        Err(_elapsed) => {}
    }
    let status = durable
        .status(id)
        .await
        .map_err(|error| Error::new("reading the request's status failed").caused_by(error))?;
    Err(Error::new(match status {
        Some(status) => format!("request {id} hasn't finished within {within:?}: it is {status}"),
        None => format!("request {id} does not exist, or its outcome has expired"),
    }))
}

/// How many results of this handle's attempts were discarded as stale: another process had taken
/// the request over, or the request had finished.
pub fn stale_results(durable: &Durable) -> u64 {
    durable.engine().driver().settler.stale_results()
}
