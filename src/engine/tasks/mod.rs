//! The engine's background tasks. Each runs until its owner aborts it, or until a shutdown.

pub(crate) mod activity;
pub(crate) mod channels;
pub(crate) mod destinations;
pub(crate) mod hand_over;
pub(crate) mod measure;
pub(crate) mod operations;
pub(crate) mod reconcile;
pub(crate) mod renew;
pub(crate) mod sweep;
pub(crate) mod watch;
