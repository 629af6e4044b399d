//! Crashes, broken connections and other processes.
