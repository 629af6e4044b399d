//! Random interleavings of all operations on requests, checked against the invariants of a request.
//!
//! The receiver holds each attempt until a step answers it. A foreign runner claims through
//! `mq_poll` and never settles, so the requests it holds must not change. After each step one
//! statement reads the whole state, and all invariants are checked on it. A new operation needs a
//! variant of [`Step`], its weight in [`steps`], and its arm in [`Case::take`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Channels, Client, Durable, DurableBuilder, Options, Request, RequestId};
use sqlx::Row as _;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::is_long;
use crate::support::{LONG, Seen, Server, builder, in_time, migrated, post, quick, reply};

#[derive(Clone, Debug)]
enum Step {
    /// Through the live handle if there is one, which may claim the request at once. Else through a
    /// handle that only enqueues.
    Enqueue(Kind),
    /// Builds the live handle, with a runner, on its own runtime.
    Start,
    /// Drops the live handle's runtime without a shutdown.
    Crash,
    Shutdown,
    /// The foreign runner claims up to this many requests, for an hour.
    Claim(i32),
    /// The leases of the live handle's attempts end, and the foreign runner claims up to this many
    /// requests before the live handle's next poll.
    TakeOver(i32),
    /// All leases end, including the foreign runner's, and all waiting requests fall due.
    EndLeases,
    /// The receiver answers this many of the oldest attempts that it holds. The results of requests
    /// that were taken over in the meantime are stale.
    Answer(usize, u16),
    Clear,
    /// Any request, in any state.
    Cancel(prop::sample::Index),
    /// Any request, whether it was discarded or not.
    Replay(prop::sample::Index),
    /// Makes the head of any request that waits unreadable.
    Damage(prop::sample::Index),
    /// Gives any request that waits a format of a newer version.
    Renew(prop::sample::Index),
    /// Makes all damaged and all newer requests readable.
    Mend,
    /// Waits a moment.
    Pause,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Plain,
    Ordered(u8),
    Delayed,
    /// Discarded after two attempts.
    Limited,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![
        3 => Just(Kind::Plain),
        4 => (0..2_u8).prop_map(Kind::Ordered),
        1 => Just(Kind::Delayed),
        3 => Just(Kind::Limited),
    ];
    let status = prop_oneof![2 => Just(200), 2 => Just(503), 1 => Just(404)];
    let step = prop_oneof![
        14 => kind.prop_map(Step::Enqueue),
        3 => Just(Step::Start),
        1 => Just(Step::Crash),
        1 => Just(Step::Shutdown),
        3 => (1..4_i32).prop_map(Step::Claim),
        4 => (1..6_i32).prop_map(Step::TakeOver),
        3 => Just(Step::EndLeases),
        8 => (1..6_usize, status).prop_map(|(number, status)| Step::Answer(number, status)),
        1 => Just(Step::Clear),
        3 => any::<prop::sample::Index>().prop_map(Step::Cancel),
        4 => any::<prop::sample::Index>().prop_map(Step::Replay),
        3 => any::<prop::sample::Index>().prop_map(Step::Damage),
        3 => any::<prop::sample::Index>().prop_map(Step::Renew),
        1 => Just(Step::Mend),
        4 => Just(Step::Pause),
    ];
    proptest::collection::vec(step, 90..130)
}

#[test]
fn no_interleaving_breaks_an_invariant() {
    let runtime = Runtime::new().unwrap();
    let database = runtime.block_on(migrated());
    let config = Config {
        cases: if is_long() { 100 } else { 5 },
        max_shrink_iters: 40,
        failure_persistence: None,
        ..Config::default()
    };
    let number = std::cell::Cell::new(0);
    let seen = std::cell::RefCell::new(BTreeMap::<String, usize>::new());
    let outcome = TestRunner::new(config).run(&steps(), |steps| {
        number.set(number.get() + 1);
        let mut case = Case::new(&runtime, &database, format!("case-{}", number.get()));
        for step in steps {
            case.take(&step)?;
            case.check()
                .map_err(|error| TestCaseError::fail(format!("after {step:?}: {error}")))?;
        }
        for status in case.finish()? {
            *seen.borrow_mut().entry(status).or_default() += 1;
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
    println!(
        "final statuses of the model's requests: {:?}",
        seen.borrow()
    );
    assert!(seen.borrow().contains_key("completed"));
}

/// The state of a request, read by one statement.
#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    queued: bool,
    claim_no: i32,
    attempts: i32,
    group: String,
    seq: Option<i64>,
    /// Whether polls pass over the request, because another one of its key comes first.
    behind: bool,
    /// The whole row of the outcome, as text.
    outcome: Option<String>,
    status: Option<String>,
    /// How many outcomes the request has.
    outcomes: i64,
    payload: bool,
}

/// A request that no runner may send, and what it was like when it became so.
#[derive(Debug)]
struct Unreadable {
    /// Runners leave newer requests alone, and park damaged ones.
    newer: bool,
    claim_no: i32,
    attempts: i32,
    deliveries: usize,
}

type Held = Arc<Mutex<Vec<oneshot::Sender<u16>>>>;
type Delivered = Arc<Mutex<Vec<String>>>;

struct Case<'t> {
    runtime: &'t Runtime,
    database: &'t TestDatabase,
    channel: String,
    server: Server,
    held: Held,
    /// The numbers that the receiver got, in the order of their arrival.
    delivered: Delivered,
    /// Whether the receiver answers every attempt at once.
    open: Arc<Mutex<bool>>,
    source: Durable,
    client: Client,
    live: Option<(Runtime, Durable)>,
    /// The ids and numbers of the enqueued requests.
    enqueued: Vec<(RequestId, String)>,
    last: HashMap<RequestId, Row>,
    /// The requests that the foreign runner holds, with their `claim_no`.
    foreign: HashMap<RequestId, i32>,
    replayed: HashSet<RequestId>,
    unreadable: HashMap<RequestId, Unreadable>,
}

impl<'t> Case<'t> {
    fn new(runtime: &'t Runtime, database: &'t TestDatabase, channel: String) -> Self {
        let (held, delivered) = (Held::default(), Delivered::default());
        let open = Arc::new(Mutex::new(false));
        let handler = {
            let (held, delivered, open) = (held.clone(), delivered.clone(), open.clone());
            move |_, seen: Seen| {
                let number = String::from_utf8(seen.body.to_vec()).unwrap();
                delivered.lock().unwrap().push(number);
                let (answer, answered) = oneshot::channel();
                if *open.lock().unwrap() {
                    answer.send(200).unwrap();
                } else {
                    held.lock().unwrap().push(answer);
                }
                async move { reply(answered.await.unwrap_or(503), "") }
            }
        };
        let _context = runtime.enter();
        Self {
            runtime,
            database,
            server: runtime.block_on(Server::start(handler)),
            held,
            delivered,
            open,
            source: channel_builder(database, &channel)
                .runner(false)
                .build()
                .unwrap(),
            client: runtime
                .block_on(Client::new(
                    database.pool().clone(),
                    Channels::List(&["nothing"]),
                ))
                .unwrap(),
            channel,
            live: None,
            enqueued: Vec::new(),
            last: HashMap::new(),
            foreign: HashMap::new(),
            replayed: HashSet::new(),
            unreadable: HashMap::new(),
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Enqueue(kind) => {
                let mut number = format!("{}", self.enqueued.len());
                if let Kind::Ordered(key) = kind {
                    number = format!("{number} key-{key}");
                }
                let request = request(&self.server.url("/"), &number, *kind, &self.channel);
                let handle = self.live.as_ref().map_or(&self.source, |(_, live)| live);
                let id = self
                    .runtime
                    .block_on(in_time(handle.fire(request)))
                    .unwrap();
                self.enqueued.push((id, number));
            }
            Step::Start if self.live.is_none() => {
                let runtime = own_runtime();
                let live = runtime
                    .block_on(async { channel_builder(self.database, &self.channel).build() });
                self.live = Some((runtime, live.unwrap()));
            }
            Step::Crash => {
                if let Some((runtime, live)) = self.live.take() {
                    drop(runtime);
                    drop(live);
                }
            }
            Step::Shutdown => {
                if let Some((runtime, live)) = self.live.take() {
                    let stopped = live.shutdown(Duration::from_millis(5));
                    runtime.block_on(in_time(stopped)).unwrap();
                }
            }
            Step::Claim(most) => self.claim(*most, false)?,
            Step::TakeOver(most) => self.claim(*most, true)?,
            Step::EndLeases => {
                // From here on any runner may claim the foreign runner's requests. Rows are locked
                // in the crate's order: else this statement and a settle could deadlock.
                self.foreign.clear();
                self.execute(
                    "UPDATE requeuest.mq_msgs SET attempt_at = now() WHERE id IN (
                         SELECT id FROM requeuest.mq_msgs WHERE channel_name = $1
                         ORDER BY id FOR UPDATE
                     )",
                );
            }
            Step::Answer(number, status) => {
                let mut held = self.held.lock().unwrap();
                let number = (*number).min(held.len());
                for answer in held.drain(..number) {
                    // The attempt's sender may be gone.
                    let _ = answer.send(*status);
                }
            }
            Step::Clear => {
                let channels = [&*self.channel];
                let cleared = self.client.clear(Channels::List(&channels));
                self.runtime.block_on(in_time(cleared)).unwrap();
                self.foreign.clear();
                let rows = self.state();
                prop_assert!(
                    rows.values().all(|row| row.status.is_some()),
                    "not all are cleared: {rows:?}"
                );
            }
            Step::Cancel(which) if !self.enqueued.is_empty() => self.cancel(*which)?,
            Step::Replay(which) if !self.enqueued.is_empty() => self.replay(*which)?,
            Step::Damage(which) if !self.enqueued.is_empty() => self.spoil(*which, false),
            Step::Renew(which) if !self.enqueued.is_empty() => self.spoil(*which, true),
            Step::Mend => self.mend(),
            Step::Start | Step::Cancel(_) | Step::Replay(_) | Step::Damage(_) | Step::Renew(_) => {}
            Step::Pause => std::thread::sleep(Duration::from_millis(25)),
        }
        Ok(())
    }

    /// Makes a request unreadable, unless it has ended or a process has it.
    fn spoil(&mut self, which: prop::sample::Index, newer: bool) {
        let (id, number) = which.get(&self.enqueued);
        let row = sqlx::query_as(if newer {
            "UPDATE requeuest.mq_msgs SET format = 2
             WHERE id = $1 AND state = 'waiting' AND format = 1 RETURNING claim_no, attempts"
        } else {
            "WITH waiting AS (
                SELECT claim_no, attempts FROM requeuest.mq_msgs
                WHERE id = $1 AND state = 'waiting' FOR UPDATE
             ), damaged AS (
                UPDATE requeuest.mq_payloads SET head = '{\"new\":1,' || substr(head, 2)
                WHERE id = $1 AND EXISTS (SELECT FROM waiting) AND head NOT LIKE '{\"new\":1,%'
                RETURNING id
             )
             SELECT claim_no, attempts FROM waiting, damaged"
        });
        let row: Option<(i32, i32)> = self
            .runtime
            .block_on(
                row.bind(uuid::Uuid::from(*id))
                    .fetch_optional(self.database.pool()),
            )
            .unwrap();
        if let Some((claim_no, attempts)) = row {
            let deliveries = self.deliveries(number);
            self.unreadable
                .entry(*id)
                .and_modify(|unreadable| unreadable.newer |= newer)
                .or_insert(Unreadable {
                    newer,
                    claim_no,
                    attempts,
                    deliveries,
                });
        }
    }

    fn mend(&mut self) {
        let ids: Vec<uuid::Uuid> = self.unreadable.drain().map(|(id, _)| id.into()).collect();
        self.runtime.block_on(async {
            for mend in [
                "UPDATE requeuest.mq_payloads
                 SET head = '{' || substr(head, length('{\"new\":1,') + 1)
                 WHERE id = ANY ($1) AND head LIKE '{\"new\":1,%'",
                "UPDATE requeuest.mq_msgs SET format = 1
                 WHERE id IN (
                     SELECT id FROM requeuest.mq_msgs WHERE id = ANY ($1) ORDER BY id FOR UPDATE
                 )",
            ] {
                let mend = sqlx::query(mend).bind(&ids);
                mend.execute(self.database.pool()).await.unwrap();
            }
        });
    }

    /// How often the receiver got a request.
    fn deliveries(&self, number: &str) -> usize {
        let delivered = self.delivered.lock().unwrap();
        delivered.iter().filter(|one| *one == number).count()
    }

    fn cancel(&mut self, which: prop::sample::Index) -> Result<(), TestCaseError> {
        let id = which.get(&self.enqueued).0;
        let before = self.state().remove(&id).unwrap();
        let cancelled = self.runtime.block_on(in_time(self.source.cancel(id)));
        let cancelled = cancelled.map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
        let held = self.foreign.remove(&id).is_some();
        let after = self.state().remove(&id).unwrap();
        if before.status.is_some() {
            prop_assert!(!cancelled && before == after, "{id}: {before:?}, {after:?}");
        }
        // The request may have finished in the meantime, unless the foreign runner held it.
        prop_assert!(cancelled || !held, "{id}: {after:?}");
        prop_assert_eq!(
            cancelled,
            before.status.is_none() && after.status.as_deref() == Some("cancelled"),
            "{}: {:?}",
            id,
            after
        );
        Ok(())
    }

    fn replay(&mut self, which: prop::sample::Index) -> Result<(), TestCaseError> {
        let (id, number) = which.get(&self.enqueued).clone();
        let before = self.state().remove(&id).unwrap();
        let kept = before.status.as_deref() == Some("discarded") && !self.replayed.contains(&id);
        match self.runtime.block_on(in_time(self.source.replay(id))) {
            Ok(new) => {
                self.replayed.insert(id);
                // The outcome now says that the request was replayed.
                let after = self.state().remove(&id).unwrap();
                prop_assert_eq!(after.status.as_deref(), Some("discarded"));
                self.last.insert(id, after);
                self.enqueued.push((new, number));
            }
            Err(error) => {
                prop_assert!(error.is_wrong_state() && !kept, "{error:?}: {before:?}");
            }
        }
        Ok(())
    }

    /// Claims as a runner of the channel would.
    fn claim(&mut self, most: i32, end_leases: bool) -> Result<(), TestCaseError> {
        let held: Vec<uuid::Uuid> = self.foreign.keys().map(|id| (*id).into()).collect();
        let claims = self.runtime.block_on(async {
            let mut transaction = self.database.pool().begin().await.unwrap();
            sqlx::query("SET LOCAL requeuest.lease = '1 hour'")
                .execute(&mut *transaction)
                .await
                .unwrap();
            if end_leases {
                // Locked in the crate's order, as above.
                sqlx::query(
                    "UPDATE requeuest.mq_msgs SET attempt_at = now() - interval '1 hour'
                     WHERE id IN (
                         SELECT id FROM requeuest.mq_msgs
                         WHERE channel_name = $1 AND state = 'claimed' AND id <> ALL ($2)
                         ORDER BY id FOR UPDATE
                     )",
                )
                .bind(&self.channel)
                .bind(&held)
                .execute(&mut *transaction)
                .await
                .unwrap();
            }
            let claims = sqlx::query(
                "SELECT id, payload_json FROM requeuest.mq_poll(ARRAY[$1], $2)
                 WHERE id IS NOT NULL",
            )
            .bind(&self.channel)
            .bind(most)
            .fetch_all(&mut *transaction)
            .await
            .unwrap();
            transaction.commit().await.unwrap();
            claims
        });
        prop_assert!(claims.len() <= most as usize);
        for claim in claims {
            let id = RequestId::from(claim.get::<uuid::Uuid, _>("id"));
            let head: serde_json::Value = serde_json::from_str(claim.get("payload_json")).unwrap();
            let claim_no = head["claim_no"].as_i64().unwrap() as i32;
            let before = self.last.get(&id).map_or(0, |row| row.claim_no);
            prop_assert!(
                claim_no > before,
                "{id} was claimed as {claim_no} after {before}"
            );
            let newer = self.unreadable.get(&id).is_some_and(|it| it.newer);
            prop_assert!(!newer, "{id} has a newer format and was claimed");
            let earlier = self.foreign.insert(id, claim_no);
            prop_assert!(earlier.is_none(), "{id} was claimed twice within its lease");
        }
        Ok(())
    }

    /// The state of all enqueued requests at one moment.
    fn state(&self) -> HashMap<RequestId, Row> {
        let ids: Vec<uuid::Uuid> = self.enqueued.iter().map(|(id, _)| (*id).into()).collect();
        let rows = sqlx::query(
            "SELECT i.id, m.id IS NOT NULL AS queued, coalesce(m.claim_no, 0) AS claim_no,
                 coalesce(m.attempts, 0) AS attempts,
                 coalesce(m.channel_args, '') AS channel_args, m.seq,
                 -- The next poll looks at the noted keys.
                 coalesce(m.state = 'behind' AND NOT EXISTS (
                     SELECT FROM requeuest.mq_freed_keys f
                     WHERE f.channel_name = m.channel_name AND f.channel_args = m.channel_args
                 ), false) AS behind,
                 (SELECT min(o::text) FROM requeuest.outcomes o WHERE o.id = i.id) AS outcome,
                 (SELECT min(o.status) FROM requeuest.outcomes o WHERE o.id = i.id) AS status,
                 (SELECT count(*) FROM requeuest.outcomes o WHERE o.id = i.id) AS outcomes,
                 EXISTS (SELECT FROM requeuest.mq_payloads p WHERE p.id = i.id) AS payload
             FROM unnest($1::uuid[]) AS i(id) LEFT JOIN requeuest.mq_msgs m ON m.id = i.id",
        )
        .bind(ids);
        let rows = self
            .runtime
            .block_on(rows.fetch_all(self.database.pool()))
            .unwrap();
        let row = |row: &sqlx::postgres::PgRow| Row {
            queued: row.get("queued"),
            claim_no: row.get("claim_no"),
            attempts: row.get("attempts"),
            group: row.get("channel_args"),
            seq: row.get("seq"),
            behind: row.get("behind"),
            outcome: row.get("outcome"),
            status: row.get("status"),
            outcomes: row.get("outcomes"),
            payload: row.get("payload"),
        };
        let rows = rows
            .iter()
            .map(|found| (found.get::<uuid::Uuid, _>("id").into(), row(found)));
        rows.collect()
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        let state = self.state();
        let heads = heads(&state);
        let delivered = self.delivered.lock().unwrap().clone();
        for (id, number) in &self.enqueued {
            let row = &state[id];
            prop_assert_eq!(
                i64::from(row.queued) + row.outcomes,
                1,
                "{} is at one place: {:?}",
                id,
                row
            );
            let discarded = row.status.as_deref() == Some("discarded");
            let kept = row.queued || discarded && !self.replayed.contains(id);
            prop_assert_eq!(
                row.payload,
                kept,
                "{} has a payload while it needs one: {:?}",
                id,
                row
            );
            if let Some(before) = self.last.get(id) {
                if row.queued {
                    prop_assert!(row.claim_no >= before.claim_no, "{id}: {before:?}, {row:?}");
                }
                if before.outcome.is_some() {
                    prop_assert_eq!(&row.outcome, &before.outcome, "{} had ended", id);
                }
            }
            if let (Some(seq), true) = (row.seq, row.behind) {
                prop_assert!(seq > heads[&*row.group], "{id} is behind none: {row:?}");
            }
            if let (Some(seq), true) = (row.seq, row.queued && row.claim_no > 0) {
                prop_assert_eq!(
                    seq,
                    heads[&*row.group],
                    "{} was claimed ahead of its turn: {:?}",
                    id,
                    row
                );
            }
            if let Some(claim_no) = self.foreign.get(id) {
                // Not even a late result may change the request.
                prop_assert!(
                    row.queued && row.claim_no == *claim_no,
                    "{id} is held elsewhere: {row:?}"
                );
            }
            if row.status.as_deref() == Some("completed") {
                prop_assert!(delivered.contains(number), "{id} ended without being sent");
            }
            if let Some(unreadable) = self.unreadable.get(id) {
                let deliveries = delivered.iter().filter(|one| *one == number).count();
                // Claims that were lost, and one that has not parked the request yet, are counted.
                let claims = row.claim_no - unreadable.claim_no;
                let attempts = row.attempts - unreadable.attempts;
                prop_assert!(
                    row.status.as_deref() == Some("cancelled")
                        || row.queued
                            && deliveries == unreadable.deliveries
                            && (0..=claims).contains(&attempts)
                            && (!unreadable.newer || claims == 0),
                    "{id} can't be read: {unreadable:?}, {deliveries}, {row:?}"
                );
            }
        }
        self.last = state;
        Ok(())
    }

    /// Lets a new handle finish all requests. Returns their statuses.
    fn finish(&mut self) -> Result<Vec<String>, TestCaseError> {
        *self.open.lock().unwrap() = true;
        self.take(&Step::Crash)?;
        self.take(&Step::Answer(usize::MAX, 200))?;
        self.take(&Step::Mend)?;
        self.take(&Step::EndLeases)?;
        self.take(&Step::Start)?;
        let ids: Vec<RequestId> = self.enqueued.iter().map(|(id, _)| *id).collect();
        for id in ids {
            let ended = requeuest::testkit::outcome(&self.source, id, LONG);
            let ended = self.runtime.block_on(ended);
            prop_assert!(ended.is_ok(), "{:?}", ended.err());
        }
        self.check()?;
        self.take(&Step::Shutdown)?;
        let mended = sqlx::query_scalar("SELECT requeuest.mend_behind(1000)");
        let mended: i32 = self
            .runtime
            .block_on(mended.fetch_one(self.database.pool()))
            .unwrap();
        prop_assert_eq!(mended, 0);
        self.in_order()?;
        Ok(self
            .last
            .values()
            .filter_map(|row| row.status.clone())
            .collect())
    }

    /// Checks that the deliveries of an ordering key arrive in the order of the inserts. A replayed
    /// request comes after those that were inserted before the replay.
    fn in_order(&self) -> Result<(), TestCaseError> {
        let delivered = self.delivered.lock().unwrap();
        let mut numbers = HashSet::new();
        let again = self.enqueued.iter().map(|(_, number)| number);
        let replayed: HashSet<_> = again.filter(|number| !numbers.insert(*number)).collect();
        for key in 0..2 {
            let mark = format!("key-{key}");
            let mut last = None;
            let ordered = delivered.iter().filter(|number| number.ends_with(&mark));
            for number in ordered.filter(|number| !replayed.contains(number)) {
                let place: usize = number.split(' ').next().unwrap().parse().unwrap();
                prop_assert!(
                    last.is_none_or(|last| last <= place),
                    "{number} after {last:?}"
                );
                last = Some(place);
            }
        }
        Ok(())
    }

    fn execute(&self, statement: &str) {
        let statement = sqlx::query(statement).bind(&self.channel);
        self.runtime
            .block_on(statement.execute(self.database.pool()))
            .unwrap();
    }
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        // Dropping a runtime waits for its blocking tasks, and this case may have failed.
        if let Some((runtime, _)) = self.live.take() {
            runtime.shutdown_background();
        }
    }
}

/// The lowest `seq` of each ordering key.
fn heads(state: &HashMap<RequestId, Row>) -> HashMap<&str, i64> {
    let mut heads = HashMap::new();
    for row in state.values().filter(|row| row.queued) {
        if let Some(seq) = row.seq {
            let head = heads.entry(&*row.group).or_insert(seq);
            *head = seq.min(*head);
        }
    }
    heads
}

/// Keys are a case's own, so that a case that fails leaves nothing to the next one.
fn request(url: &str, number: &str, kind: Kind, channel: &str) -> Request {
    let request = post(url, number.to_owned());
    match kind {
        Kind::Plain => request,
        Kind::Ordered(key) => {
            request.with(Options::default().ordered(format!("{channel} key-{key}")))
        }
        Kind::Delayed => request.with(Options::default().delay(Duration::from_secs(60))),
        Kind::Limited => {
            let twice = RetryPolicy::exponential()
                .base(Duration::from_millis(1))
                .max_attempts(2);
            request.with(Options::default().retry(twice))
        }
    }
}

fn channel_builder(database: &TestDatabase, channel: &str) -> DurableBuilder {
    builder(database)
        .channel(channel)
        .max_connections(3)
        .retry(quick())
}

fn own_runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}
