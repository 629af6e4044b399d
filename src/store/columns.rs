//! Expressions for what several statements show of a request.

/// The method in the head of `p`, an alias of `mq_payloads`.
pub(super) const METHOD: &str = r#"substring(left(p.head, 100) FROM '^\{"method":"([^"\\]*)"')"#;

/// The ordering key of a group. Written out, because a call of `is_ordered` for each of many rows
/// takes longer than reading them.
pub(super) fn ordering_key(group: &str) -> String {
    format!("CASE WHEN substr({group}, 5, 3) IN ('|o|', '|c|') THEN substr({group}, 8) END")
}

/// The destination that the group of an unordered request names, or the name of a group that the
/// older API was given.
pub(super) fn named_by_group(group: &str) -> String {
    format!("CASE WHEN substr({group}, 5, 3) = '|d|' THEN substr({group}, 8) END")
}

/// The status of an unfinished request in `m`, an alias of `mq_msgs`, as the view `requests` has
/// it.
///
/// A held row's due time includes a lease. Once the lease runs out, any runner may claim the row.
pub(super) const QUEUED_STATUS: &str = "CASE
    WHEN m.state = 'parked' THEN 'parked'
    WHEN m.state = 'deferred' AND m.attempt_at <= clock_timestamp() THEN 'deferred'
    WHEN m.state = 'held'
        AND m.attempt_at > clock_timestamp() + current_setting('requeuest.lease')::interval
        THEN 'retryable'
    WHEN m.state IN ('claimed', 'held', 'sending_once') AND m.attempt_at > clock_timestamp()
        THEN 'running'
    WHEN m.attempt_at <= clock_timestamp() THEN 'available'
    WHEN m.attempts = 0 THEN 'scheduled'
    ELSE 'retryable'
END";
