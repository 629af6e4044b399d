//! The integration tests, in one binary: a module for each theme.
//!
//! Each test has its own database in a real Postgres, and a real HTTP server on a loopback port.

#![allow(unreachable_pub)] // a test crate has no outside

mod admin;
mod behind;
mod bounds;
mod bulk;
mod channels;
mod citizen;
mod cli;
mod client;
mod damaged;
mod day;
mod dead_letters;
mod delivery;
mod destination;
mod doctor;
mod encryption;
mod ending;
mod faults;
mod guarantee;
mod guard;
mod hooks;
mod house;
mod idioms;
mod input;
mod keys;
mod layer;
mod locks;
mod logs;
mod metadata;
mod metrics;
mod middleware;
mod migrations;
mod operations;
mod outcomes;
mod plans;
mod poll;
mod priorities;
mod processes;
mod proxy;
mod redirects;
mod retention;
mod retry;
mod roles;
mod runtimes;
mod secrets;
mod sessions;
mod sockets;
mod sql;
mod stopping;
mod support;
mod testkit;
mod traces;
mod transparency;
mod versions;
mod waiters;
