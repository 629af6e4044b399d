//! `requeuest show`.

use clap::Args;
use requeuest::RequestId;
use requeuest::admin::{RequestContent, RequestInfo};
use requeuest::http::HeaderMap;

use super::change::Author;
use super::status_style;
use crate::failure::{Code, Failure};
use crate::json;
use crate::out::{Out, Style};
use crate::table::{Cell, Table};
use crate::target::Target;
use crate::text;
use crate::when;

#[derive(Args, Debug)]
pub(crate) struct Show {
    /// The id of the request
    #[arg(value_parser = super::request_id)]
    id: RequestId,
    /// Shows headers and bodies too, without the values of secret headers
    #[arg(long)]
    bodies: bool,
    /// The same with the values of secret headers, which is recorded under your name
    #[arg(long)]
    secrets: bool,
    #[command(flatten)]
    author: Author,
}

impl Show {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        let admin = target.admin().await?;
        let Some(request) = admin.request(self.id).await? else {
            return Err(unknown(self.id));
        };
        let content = if self.secrets {
            self.author.sign(admin).reveal(self.id).await?
        } else if self.bodies {
            admin.content(self.id).await?
        } else {
            None
        };
        if out.json {
            let mut shown = json::request(&request);
            if let Some(content) = &content {
                shown["content"] = json::content(content);
            }
            return out.document(&shown);
        }
        fields(&request, out)?;
        attempts(&request, out)?;
        if let Some(content) = &content {
            sent(content, out)?;
            received(content, out)?;
        }
        Ok(())
    }
}

pub(crate) fn unknown(id: RequestId) -> Failure {
    Failure::new(
        Code::NotFound,
        format!("there is no request {id}, or its outcome has expired"),
    )
}

fn fields(request: &RequestInfo, out: &mut Out) -> Result<(), Failure> {
    let method = request.method.as_deref().unwrap_or("?");
    let destination = request.destination.as_deref().unwrap_or("?");
    let status = request.status.as_str();
    out.field("request", &request.id.to_string())?;
    let status = out.paint(status_style(request.status), status);
    out.field("status", &status)?;
    if let Some(hold) = &request.hold {
        let hold = out.paint(Style::Bold, &text::line(&hold.to_string()));
        out.field("why not sent", &hold)?;
    }
    if let (Some(owner), Some(until)) = (&request.owner, request.leased_until) {
        let has = format!("{owner} until {}", when::both(until));
        out.field("being sent by", &text::line(&has))?;
    }
    if let Some(error) = &request.error {
        let class = request.error_class.as_ref();
        let class = class.map_or(String::new(), |class| format!("{class}: "));
        out.field("error", &text::line(&format!("{class}{error}")))?;
    }
    if let Some(status) = request.http_status {
        out.field("HTTP status", &status.to_string())?;
    }
    out.field("sends", &text::line(&format!("{method} {destination}")))?;
    out.field("channel", &text::line(&request.channel))?;
    if let Some(key) = &request.ordering_key {
        out.field("ordering key", &text::line(key))?;
    }
    out.field("attempts", &request.attempts.to_string())?;
    for (name, time) in [
        ("enqueued", Some(request.created_at)),
        ("due", request.due_at),
        ("deadline", request.deadline),
        ("ended", request.finished_at),
    ] {
        if let Some(time) = time {
            out.field(name, &when::both(time))?;
        }
    }
    if let Some(id) = request.replayed_as {
        out.field("replayed as", &id.to_string())?;
    }
    Ok(())
}

fn attempts(request: &RequestInfo, out: &mut Out) -> Result<(), Failure> {
    if request.failed_attempts.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(["attempt", "ended", "took", "HTTP", "class", "error"]);
    for attempt in &request.failed_attempts {
        table.row([
            attempt.number.to_string().into(),
            when::both(attempt.ended_at).into(),
            when::rough(attempt.duration).into(),
            attempt
                .http_status
                .map_or(String::new(), |status| status.to_string())
                .into(),
            Cell::styled(&attempt.error_class, Style::Bad),
            attempt.error.as_str().into(),
        ]);
    }
    out.heading("Failed attempts")?;
    out.table(&table)
}

fn sent(content: &RequestContent, out: &mut Out) -> Result<(), Failure> {
    out.heading("Request")?;
    let Some(request) = &content.request else {
        return out.line("not kept, because the request has ended");
    };
    out.line(&text::line(&format!(
        "{} {}",
        request.method(),
        request.url()
    )))?;
    headers(request.headers(), out)?;
    body(request.body().map_or(&[], |body| body), out)
}

fn received(content: &RequestContent, out: &mut Out) -> Result<(), Failure> {
    out.heading("Response")?;
    let Some(response) = &content.response else {
        return out.line("there is none");
    };
    out.line(&response.status().to_string())?;
    headers(response.headers(), out)?;
    body(response.body(), out)
}

fn headers(headers: &HeaderMap, out: &mut Out) -> Result<(), Failure> {
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        out.line(&text::line(&format!("{name}: {value}")))?;
    }
    Ok(())
}

/// As text, or how long it is.
fn body(body: &[u8], out: &mut Out) -> Result<(), Failure> {
    if body.is_empty() {
        return Ok(());
    }
    out.line("")?;
    match std::str::from_utf8(body) {
        Ok(body) => out.line(&text::lines(body)),
        Err(_) => out.line(&format!("{} bytes that are not text", body.len())),
    }
}
