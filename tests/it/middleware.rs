//! The reqwest middleware.
