//! What an operator sees of requests.

mod connect;
mod lists;
mod reasons;
