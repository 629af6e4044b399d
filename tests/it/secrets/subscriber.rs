//! Prints all that a `tracing` subscriber gets to see at `trace`: spans, what is recorded in them
//! later, and events, of every crate.

use std::error::Error as StdError;
use std::fmt::{Debug, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

pub fn subscribe() {
    let subscriber = tracing_subscriber::registry().with(Printing);
    tracing::subscriber::set_global_default(subscriber).unwrap();
}

struct Printing;

struct Line(String);

impl Line {
    fn of(what: &str, metadata: &Metadata<'_>) -> Self {
        let (level, target, name) = (metadata.level(), metadata.target(), metadata.name());
        Self(format!("[{level} {target}] {what} {name}"))
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }

    fn record_error(&mut self, field: &Field, value: &(dyn StdError + 'static)) {
        let mut error = Some(value);
        while let Some(cause) = error {
            write!(self.0, " {field}={cause} {cause:?}").unwrap();
            error = cause.source();
        }
    }
}

impl<S: Subscriber> Layer<S> for Printing {
    fn on_new_span(&self, span: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        let mut line = Line::of("span", span.metadata());
        span.record(&mut line);
        eprintln!("{}", line.0);
    }

    fn on_record(&self, _: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut line = Line("recorded".to_owned());
        values.record(&mut line);
        eprintln!("{}", line.0);
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::of("event", event.metadata());
        event.record(&mut line);
        eprintln!("{}", line.0);
    }
}
