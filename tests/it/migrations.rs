//! Installing the schema.
