//! Programs as users of tower, hyper, reqwest and axum write them: each must compile without
//! annotations for this crate, and do what it says.

mod errors;
mod handlers;
mod requests;
mod services;
mod stacks;
