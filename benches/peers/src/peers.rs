//! The queues under measurement, one a file. Each file says which documentation its configuration is from.

pub(crate) mod apalis;
pub(crate) mod graphile;
pub(crate) mod pgmq;
pub(crate) mod requeuest;
pub(crate) mod sqlxmq;
