//! `requeuest pause` and `requeuest resume`: a channel or a destination.

use std::time::SystemTime;

use clap::Args;
use serde_json::json;

use super::change::Author;
use crate::confirm::{self, Yes};
use crate::failure::Failure;
use crate::out::Out;
use crate::target::Target;
use crate::when;

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct What {
    /// This channel
    #[arg(long, value_name = "NAME")]
    channel: Option<String>,
    /// This destination, such as https://api.example.com, or a limit key
    #[arg(long, value_name = "NAME")]
    destination: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Pause {
    #[command(flatten)]
    what: What,
    /// Resumes a destination at this time: RFC 3339, or a time from now such as 2h
    #[arg(long, value_name = "TIME", value_parser = when::future, conflicts_with = "channel")]
    until: Option<SystemTime>,
    #[command(flatten)]
    author: Author,
    #[command(flatten)]
    yes: Yes,
}

#[derive(Args, Debug)]
pub(crate) struct Resume {
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    author: Author,
    #[command(flatten)]
    yes: Yes,
}

impl Pause {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        confirm::change(out, target, &self.yes)?;
        let admin = self.author.sign(target.admin().await?);
        let changed = match (&self.what.channel, &self.what.destination) {
            (Some(channel), _) => admin.pause_channel(channel).await?,
            (None, Some(destination)) => {
                admin.pause_destination(destination, self.until).await?;
                true
            }
            (None, None) => false,
        };
        report(&self.what, "paused", changed, out)
    }
}

impl Resume {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        confirm::change(out, target, &self.yes)?;
        let admin = self.author.sign(target.admin().await?);
        let changed = match (&self.what.channel, &self.what.destination) {
            (Some(channel), _) => admin.resume_channel(channel).await?,
            (None, Some(destination)) => {
                admin.resume_destination(destination).await?;
                true
            }
            (None, None) => false,
        };
        report(&self.what, "resumed", changed, out)
    }
}

fn report(what: &What, word: &str, changed: bool, out: &mut Out) -> Result<(), Failure> {
    if out.json {
        return out.document(&json!({
            "channel": what.channel,
            "destination": what.destination,
            "action": word,
            "changed": changed,
        }));
    }
    out.line(if changed { word } else { "it was so already" })
}
