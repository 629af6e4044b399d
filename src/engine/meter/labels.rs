//! The names that a recorder is told: a bounded number of them.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};

use crate::recorder::{MAX_LABELS, OTHER};

/// The first names of a kind that were met, and one for all others.
#[derive(Debug)]
pub(super) struct Labels {
    names: RwLock<HashSet<Arc<str>>>,
    other: Arc<str>,
}

impl Default for Labels {
    fn default() -> Self {
        Self {
            names: RwLock::default(),
            other: OTHER.into(),
        }
    }
}

impl Labels {
    /// The name, or the one of all others if there are too many.
    pub(super) fn of(&self, name: &str) -> Arc<str> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(name) {
            return Arc::clone(known);
        }
        if names.len() >= MAX_LABELS {
            return Arc::clone(&self.other);
        }
        drop(names);
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= MAX_LABELS && !names.contains(name) {
            return Arc::clone(&self.other);
        }
        let new: Arc<str> = name.into();
        names.insert(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_names_are_told() {
        let labels = Labels::default();
        let told: HashSet<_> = (0..10 * MAX_LABELS)
            .map(|number| labels.of(&number.to_string()))
            .collect();
        assert_eq!(told.len(), MAX_LABELS + 1);
        assert_eq!(&*labels.of("0"), "0");
        assert_eq!(&*labels.of("999"), OTHER);
    }
}
