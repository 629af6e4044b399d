//! How the engine logs.
//!
//! Every event is a fixed sentence with fields. The levels are:
//!
//! - `error`: a fault of this crate, or stored data that can't be used.
//! - `warn`: an operator should look. A condition that lasts is logged once when it begins, not for
//!   each retry. A request that is given up is logged once.
//! - `info`: starts and stops, and the end of a condition.
//! - `debug`: failed attempts, failed operations of the store, retries.
//!
//! No event has a header value, or the credentials, path or query of a URL.

use std::sync::atomic::{AtomicBool, Ordering};

/// A condition that lasts, such as an unreachable database.
#[derive(Debug, Default)]
pub(crate) struct Condition {
    lasts: AtomicBool,
}

impl Condition {
    /// Notes that the condition holds. `true` if it has just begun.
    pub(crate) fn begins(&self) -> bool {
        !self.lasts.swap(true, Ordering::Relaxed)
    }

    /// Notes that the condition is over. `true` if it held until now.
    pub(crate) fn ends(&self) -> bool {
        // Most calls find no condition, and only read.
        self.lasts.load(Ordering::Relaxed) && self.lasts.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_begins_and_ends_once() {
        let condition = Condition::default();
        assert!(!condition.ends());
        assert!(condition.begins());
        assert!(!condition.begins());
        assert!(condition.ends());
        assert!(!condition.ends());
        assert!(condition.begins());
    }
}
