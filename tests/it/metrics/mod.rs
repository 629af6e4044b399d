//! What is counted and measured: the activity of the fleet, and what a recorder is told.

mod activity;
