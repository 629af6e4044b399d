//! What goes in is what is sent, and what comes back is what is returned.
