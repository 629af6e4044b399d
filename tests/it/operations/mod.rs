//! What an operator changes: on the record, and for many requests at once.

mod bulk;
mod crash;
mod pause;
mod record;
