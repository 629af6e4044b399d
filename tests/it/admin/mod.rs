//! What an operator sees of requests.

mod connect;
mod contents;
mod large;
mod lists;
mod owners;
mod reasons;
