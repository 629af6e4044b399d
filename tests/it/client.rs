//! The API of the older crate.
