//! What an operator changes: on the record, and for many requests at once.

mod pause;
mod record;
