//! `requeuest work`: a runner of its own. Any application enqueues, and this process delivers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use requeuest::metrics::MetricsRecorder;
use requeuest::{DEFAULT_CONCURRENCY, DurableBuilder};
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use crate::confirm::{self, Yes};
use crate::failure::{Code, Failure};
use crate::health::{Health, exporter, serve};
use crate::out::Out;
use crate::target::Target;
use crate::when;

#[derive(Args, Debug)]
pub(crate) struct Work {
    /// Delivers this channel. May be repeated
    #[arg(long, value_name = "NAME", required_unless_present = "all_channels")]
    channel: Vec<String>,
    /// Delivers every channel, also those that appear later
    #[arg(long, conflicts_with = "channel")]
    all_channels: bool,
    /// How many attempts are under way at once
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_CONCURRENCY)]
    concurrency: usize,
    /// Serves /healthz, /readyz and /metrics here, such as 127.0.0.1:9090
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// How long attempts may take to end after SIGTERM or SIGINT. A second signal ends them at once
    #[arg(long, value_name = "TIME", value_parser = when::duration, default_value = "30s")]
    grace: Duration,
    #[command(flatten)]
    yes: Yes,
}

impl Work {
    pub(crate) async fn run(&self, target: &Target, out: &mut Out) -> Result<(), Failure> {
        confirm::change(out, target, &self.yes)?;
        // A line for each event, with fields: RUST_LOG says which.
        let wanted = EnvFilter::try_from_default_env();
        let _ = tracing_subscriber::fmt()
            .with_env_filter(wanted.unwrap_or_else(|_| EnvFilter::new("warn,requeuest=info")))
            .with_writer(std::io::stderr)
            .with_ansi(out.message_color)
            .try_init();
        let listener = match self.listen {
            Some(address) => Some(TcpListener::bind(address).await.map_err(|error| {
                Failure::new(Code::Failed, format!("--listen {address}: {error}"))
            })?),
            None => None,
        };
        // Before a runner starts, so that a database that can't be used ends the process.
        drop(target.admin().await?);
        let mut builder = self.builder(target);
        let exporter = match &listener {
            Some(_) => Some(exporter().map_err(|error| {
                Failure::new(Code::Failed, format!("metrics can't be collected: {error}"))
            })?),
            None => None,
        };
        if exporter.is_some() {
            builder = builder.recorder(Arc::new(MetricsRecorder::new()));
        }
        let durable = builder.build()?;
        let health = exporter.map(|metrics| Health::new(durable.clone(), metrics));
        if let (Some(listener), Some(health)) = (listener, &health) {
            out.note(&format!("listening on http://{}", listener.local_addr()?));
            tokio::spawn(serve(listener, health.clone()));
        }
        out.note(&format!("delivering {}", self.shown_channels()));
        stop_signal().await?;
        if let Some(health) = health {
            health.stop();
        }
        out.note(&format!(
            "stopping: waiting up to {} for attempts under way; a second signal ends them",
            when::rough(self.grace)
        ));
        let stopped = tokio::select! {
            stopped = durable.shutdown(self.grace) => stopped,
            _ = stop_signal() => return Err(Failure::new(Code::Failed, "ended by a second signal")),
        };
        stopped?;
        out.note("stopped");
        Ok(())
    }

    fn builder(&self, target: &Target) -> DurableBuilder {
        let builder = target.builder().concurrency(self.concurrency);
        if self.all_channels {
            builder.deliver_all()
        } else {
            builder.deliver(&self.channel)
        }
    }

    fn shown_channels(&self) -> String {
        if self.all_channels {
            return "every channel".to_owned();
        }
        crate::text::line(&self.channel.join(", "))
    }
}

/// Until the process is asked to stop.
async fn stop_signal() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
