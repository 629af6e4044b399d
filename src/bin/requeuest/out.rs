//! Where output goes: data to standard output, messages to standard error.

use std::io::{self, BufWriter, IsTerminal, Stdout, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::failure::Failure;
use crate::table::Table;
use crate::text;

/// When output has colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    fn is_on(self, is_terminal: bool) -> bool {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        match self {
            Self::Auto => {
                is_terminal
                    && !set("NO_COLOR")
                    && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
            }
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// How a word looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Faint,
    Bold,
    Good,
    Doubtful,
    Bad,
}

impl Style {
    pub(crate) fn paint(self, text: &str, has_color: bool) -> String {
        let code = match self {
            Self::Faint => "2",
            Self::Bold => "1",
            Self::Good => "32",
            Self::Doubtful => "33",
            Self::Bad => "31",
            Self::Plain => return text.to_owned(),
        };
        if has_color {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Both outputs, and how they are wanted.
#[expect(clippy::struct_excessive_bools, reason = "they are independent")]
pub(crate) struct Out {
    data: BufWriter<Stdout>,
    /// Only JSON on standard output.
    pub(crate) json: bool,
    pub(crate) color: bool,
    pub(crate) message_color: bool,
    /// A person reads standard output.
    pub(crate) is_terminal: bool,
}

impl Out {
    pub(crate) fn new(json: bool, color: Color) -> Self {
        let is_terminal = io::stdout().is_terminal();
        Self {
            data: BufWriter::new(io::stdout()),
            json,
            color: color.is_on(is_terminal),
            message_color: color.is_on(io::stderr().is_terminal()),
            is_terminal,
        }
    }

    /// A line of data. What others wrote must have gone through [`text`].
    pub(crate) fn line(&mut self, line: &str) -> Result<(), Failure> {
        writeln!(self.data, "{line}")?;
        Ok(())
    }

    /// Bytes as they are, for a file or a pipe.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.data.write_all(bytes)?;
        Ok(())
    }

    /// A name and its value.
    pub(crate) fn field(&mut self, name: &str, value: &str) -> Result<(), Failure> {
        let name = Style::Faint.paint(&format!("{name:<14}"), self.color);
        self.line(&format!("{name} {value}"))
    }

    pub(crate) fn heading(&mut self, heading: &str) -> Result<(), Failure> {
        let heading = Style::Bold.paint(heading, self.color);
        self.line(&format!("\n{heading}"))
    }

    pub(crate) fn table(&mut self, table: &Table) -> Result<(), Failure> {
        let shown = table.shown(self.color);
        self.data.write_all(shown.as_bytes())?;
        Ok(())
    }

    /// The one JSON document of a command.
    pub(crate) fn document(&mut self, document: &impl Serialize) -> Result<(), Failure> {
        let json = serde_json::to_string_pretty(document).map_err(io::Error::from)?;
        self.line(&text::json(&json))
    }

    /// One of many JSON documents, each a line. It is seen at once.
    pub(crate) fn json_line(&mut self, document: &impl Serialize) -> Result<(), Failure> {
        let json = serde_json::to_string(document).map_err(io::Error::from)?;
        self.line(&text::json(&json))?;
        self.flush()?;
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.data.flush()
    }

    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        style.paint(text, self.color)
    }

    /// A message. If standard error is gone, there is nothing left to tell it to.
    #[expect(clippy::unused_self, reason = "messages belong to the output")]
    pub(crate) fn note(&self, message: &str) {
        let _ = writeln!(io::stderr(), "{message}");
    }

    pub(crate) fn error_label(&self) -> String {
        Style::Bad.paint("error:", self.message_color)
    }

    pub(crate) fn warn(&self, message: &str) {
        let label = Style::Doubtful.paint("warning:", self.message_color);
        self.note(&format!("{label} {}", text::line(message)));
    }

    /// A message that stands out.
    pub(crate) fn loud(&self, text: &str) -> String {
        Style::Bad.paint(text, self.message_color)
    }
}
