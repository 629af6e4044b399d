//! The queues under measurement, one per file. Each file names the documentation that its
//! configuration comes from.

pub(crate) mod apalis;
pub(crate) mod graphile;
pub(crate) mod pgmq;
pub(crate) mod requeuest;
pub(crate) mod sqlxmq;
