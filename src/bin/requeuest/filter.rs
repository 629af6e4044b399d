//! Which requests a command means: the flags of `list`, `tail` and of changes of many requests.

use std::time::SystemTime;

use clap::Args;
use requeuest::Status;
use requeuest::admin::{RequestFilter, RequestState};

use crate::failure::Failure;
use crate::when;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Which requests")]
pub(crate) struct FilterArgs {
    /// Of this status: scheduled, available, deferred, running, retryable, parked, completed,
    /// discarded, cancelled or ambiguous. May be repeated
    #[arg(long, short = 's', value_name = "STATUS", value_parser = status)]
    status: Vec<Status>,
    /// In this state of the queue: waiting, claimed, held, sending_once, behind, deferred, parked
    /// or halted. May be repeated
    #[arg(long, value_name = "STATE", value_parser = state)]
    state: Vec<RequestState>,
    /// Of this channel
    #[arg(long, value_name = "NAME")]
    channel: Option<String>,
    /// To this destination, such as https://api.example.com, or a limit key
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
    /// Of this ordering key
    #[arg(long, value_name = "KEY")]
    ordering_key: Option<String>,
    /// Of this idempotency key of the caller. Needs --channel
    #[arg(long, value_name = "KEY", requires = "channel")]
    key: Option<String>,
    /// Enqueued since this time: RFC 3339, or a time ago such as 2h
    #[arg(long, value_name = "TIME", value_parser = when::past)]
    since: Option<SystemTime>,
    /// Enqueued before this time: RFC 3339, or a time ago such as 2h
    #[arg(long, value_name = "TIME", value_parser = when::past)]
    before: Option<SystemTime>,
    /// Whose error has this text in it
    #[arg(long, value_name = "TEXT")]
    error: Option<String>,
}

fn status(text: &str) -> Result<Status, String> {
    text.parse().map_err(|_| {
        "must be scheduled, available, deferred, running, retryable, parked, completed, discarded, \
         cancelled or ambiguous"
            .to_owned()
    })
}

fn state(text: &str) -> Result<RequestState, String> {
    text.parse().map_err(|_| {
        "must be waiting, claimed, held, sending_once, behind, deferred, parked or halted"
            .to_owned()
    })
}

impl FilterArgs {
    pub(crate) fn filter(&self) -> Result<RequestFilter, Failure> {
        let mut filter = RequestFilter::new();
        for status in &self.status {
            filter = filter.status(*status);
        }
        for state in &self.state {
            filter = filter.state(*state);
        }
        if let Some(channel) = &self.channel {
            filter = filter.channel(channel);
        }
        if let Some(destination) = &self.destination {
            filter = filter.destination(destination);
        }
        if let Some(key) = &self.ordering_key {
            filter = filter.ordering_key(key);
        }
        if let Some(key) = &self.key {
            filter = filter.key(key);
        }
        if let Some(time) = self.since {
            filter = filter.created_after(time);
        }
        if let Some(time) = self.before {
            filter = filter.created_before(time);
        }
        if let Some(text) = &self.error {
            filter = filter.error_contains(text);
        }
        filter.validate()?;
        Ok(filter)
    }
}
