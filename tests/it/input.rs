//! Bad input: each kind has its own typed error, and nothing is half-done.
