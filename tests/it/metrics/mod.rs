//! What is counted and measured: the activity of the fleet, and what a recorder is told.

use requeuest::RequestId;
use requeuest::testkit::TestDatabase;

use crate::support::execute;

mod activity;
mod prometheus;
mod recorder;

/// As if a process had claimed the waiting request and died, a minute ago.
async fn lapse(database: &TestDatabase, id: RequestId) {
    let lapse = "UPDATE requeuest.mq_msgs
        SET state = 'claimed', claim_no = 1, attempts = 1, attempt_at = now() - interval '1 minute'
        WHERE id = $1";
    execute(database, id, lapse).await;
}

/// As if another process had taken the request over.
async fn usurp(database: &TestDatabase, id: RequestId) {
    let usurp = "UPDATE requeuest.mq_msgs
        SET claim_no = claim_no + 1, attempt_at = now() + interval '1 hour'
        WHERE id = $1";
    execute(database, id, usurp).await;
}
