//! `requeuest send`: flags as curl has them.

use std::io::Read;
use std::time::Duration;

use clap::Args;
use requeuest::http::{self, HeaderName, HeaderValue, Method};
use requeuest::{Durable, Options, Outcome, RequestId, Status};
use serde_json::{Value, json};

use crate::confirm::{self, Yes};
use crate::failure::{Code, Failure};
use crate::out::Out;
use crate::target::Target;
use crate::text;
use crate::when;

/// How long the end of the program waits for its counts to be stored.
const FLUSHED_WITHIN: Duration = Duration::from_secs(2);

#[derive(Args, Debug)]
pub(crate) struct Send {
    /// Where to send the request
    #[arg(value_name = "REQUEST_URL")]
    to: String,
    /// The method. Defaults to GET, and with --data to POST
    #[arg(long = "request", short = 'X', value_name = "METHOD")]
    method: Option<Method>,
    /// A header. May be repeated
    #[arg(long, short = 'H', value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// The body: text, @FILE, or - for standard input. Adds no Content-Type
    #[arg(long, short = 'd', value_name = "DATA")]
    data: Option<String>,
    /// The channel
    #[arg(long, value_name = "NAME")]
    channel: Option<String>,
    /// The key that makes repeated calls one request
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The ordering key: such requests are sent one after the other
    #[arg(long, value_name = "KEY")]
    ordered: Option<String>,
    /// Sends it this much later, such as 30s or 2h
    #[arg(long, value_name = "TIME", value_parser = when::duration)]
    delay: Option<Duration>,
    /// Waits for the outcome, for this long or without end, and prints the response's body
    #[arg(
        long,
        value_name = "TIME",
        value_parser = when::duration,
        num_args = 0..=1,
        require_equals = true
    )]
    #[expect(
        clippy::option_option,
        reason = "no flag, the flag, and the flag with a value"
    )]
    wait: Option<Option<Duration>>,
    #[command(flatten)]
    yes: Yes,
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("must be `Name: value`")?;
    let name = name
        .trim()
        .parse()
        .map_err(|_| "the name is not valid".to_owned())?;
    let value = HeaderValue::from_str(value.trim())
        .map_err(|_| "the value has characters that no header may have".to_owned())?;
    Ok((name, value))
}

impl Send {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        // All of the input is checked before anything is sent or asked.
        let request = self.request()?;
        confirm::change(out, target, &self.yes)?;
        let durable = target.durable().await?;
        let sent = self.send(request, &durable, out).await;
        // Adds it to what the fleet has done lately. The request is persisted without it.
        let _ = durable.shutdown(FLUSHED_WITHIN).await;
        sent
    }

    async fn send(
        &self,
        request: requeuest::Request,
        durable: &Durable,
        out: &mut Out,
    ) -> Result<(), Failure> {
        let id = durable.fire(request).await?;
        let Some(patience) = self.wait else {
            if out.json {
                return out.document(&json!({ "id": id.to_string() }));
            }
            return out.line(&id.to_string());
        };
        out.note(&format!("request {id}"));
        self.warn_without_runner(durable, out).await?;
        let outcome = match patience {
            None => durable.outcome(id).await?,
            Some(patience) => tokio::time::timeout(patience, durable.outcome(id))
                .await
                .map_err(|_| {
                    let text = format!("request {id} has not ended in {}", when::rough(patience));
                    Failure::new(Code::Failed, text)
                })??,
        };
        print(id, &outcome, out)
    }

    fn request(&self) -> Result<requeuest::Request, Failure> {
        let body = match self.data.as_deref() {
            None => Vec::new(),
            Some("-") => {
                let mut body = Vec::new();
                std::io::stdin().lock().read_to_end(&mut body)?;
                body
            }
            Some(data) => match data.strip_prefix('@') {
                Some(path) => std::fs::read(path)
                    .map_err(|error| Failure::usage(format!("--data @{path}: {error}")))?,
                None => data.as_bytes().to_vec(),
            },
        };
        let usual = if self.data.is_some() {
            Method::POST
        } else {
            Method::GET
        };
        let mut request = http::Request::builder()
            .method(self.method.clone().unwrap_or(usual))
            .uri(&self.to);
        for (name, value) in &self.header {
            request = request.header(name, value);
        }
        let request = request
            .body(body)
            .map_err(|_| Failure::usage("the URL is not valid; it must be as https://host/path"))?;
        let request: requeuest::Request = request.try_into()?;
        Ok(request.with(self.options()))
    }

    fn options(&self) -> Options {
        let mut options = Options::default();
        if let Some(channel) = &self.channel {
            options = options.channel(&**channel);
        }
        if let Some(key) = &self.key {
            options = options.key(&**key);
        }
        if let Some(key) = &self.ordered {
            options = options.ordered(&**key);
        }
        if let Some(delay) = self.delay {
            options = options.delay(delay);
        }
        options
    }

    async fn warn_without_runner(&self, durable: &Durable, out: &Out) -> Result<(), Failure> {
        let channel = self
            .channel
            .as_deref()
            .unwrap_or(requeuest::DEFAULT_CHANNEL);
        let runners = durable.runners().await?;
        if !runners.iter().any(|runner| runner.delivers(channel)) {
            out.warn(&format!(
                "no runner delivers the channel {channel}; start one: requeuest work --channel \
                 {channel}"
            ));
        }
        Ok(())
    }
}

fn print(id: RequestId, outcome: &Outcome, out: &mut Out) -> Result<(), Failure> {
    let response = outcome.response();
    let status = outcome.status();
    if out.json {
        let response = response.map(|response| {
            let body = response.body();
            let text = std::str::from_utf8(body).ok();
            json!({
                "http_status": response.status().as_u16(),
                "body": text,
                "body_bytes": body.len(),
            })
        });
        out.document(&json!({
            "id": id.to_string(),
            "status": status.as_str(),
            "attempts": outcome.attempts(),
            "error": outcome.error(),
            "response": response.unwrap_or(Value::Null),
        }))?;
    } else if let Some(response) = response {
        out.note(&format!(
            "{status} after {} attempts: {}",
            outcome.attempts(),
            response.status()
        ));
        body(response.body(), out)?;
    }
    if status == Status::Completed {
        return Ok(());
    }
    let error = outcome.error().unwrap_or("see `requeuest show`");
    Err(Failure::new(
        Code::Failed,
        format!("request {id} ended as {status}: {error}"),
    ))
}

/// A body as it is for a pipe, and harmless on a terminal.
pub(crate) fn body(body: &[u8], out: &mut Out) -> Result<(), Failure> {
    if !out.is_terminal {
        return out.bytes(body);
    }
    match std::str::from_utf8(body) {
        Ok("") => Ok(()),
        Ok(body) => out.line(&text::lines(body)),
        Err(_) => out.line(&format!("({} bytes that are not text)", body.len())),
    }
}
