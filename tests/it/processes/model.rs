//! Random interleavings of everything that moves a request, against a model of what may become of it.
//!
//! The receiver holds each attempt until a step answers it. A foreign runner claims through `mq_poll` and never settles, so that
//! what it holds must not change. After each step one statement reads the whole state, and all invariants are checked on it. A new
//! operation is a variant of [`Step`], its weight in [`steps`], and its arm in [`Case::take`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Channels, Client, Durable, Options, Request, RequestId};
use sqlx::Row as _;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::{long, post};
use crate::support::{Server, in_time, migrated, reply};

#[derive(Clone, Debug)]
enum Step {
    /// By the live handle if there is one, which may claim it at once, else by one that only enqueues.
    Enqueue(Kind),
    /// A handle with a runner begins to live, on a runtime of its own.
    Start,
    /// Its runtime is dropped, without ceremony.
    Crash,
    Shutdown,
    /// A foreign runner claims up to so many, for an hour.
    Claim(i32),
    /// The leases of what the live handle attempts end, and the foreign runner is there before its next poll.
    TakeOver(i32),
    /// The leases of what is being attempted end, those of the foreign runner included, and all that waits falls due.
    EndLeases,
    /// The receiver answers the oldest attempts that it holds. If they were taken over meanwhile, the result is stale.
    Answer(usize, u16),
    Clear,
    /// One of the requests, wherever it stands.
    Cancel(prop::sample::Index),
    /// One of the requests, which may have been given up or not.
    Replay(prop::sample::Index),
    /// Time goes by.
    Pause,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Plain,
    Ordered(u8),
    Delayed,
    /// Given up after two attempts.
    Limited,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop_oneof![
        3 => Just(Kind::Plain),
        3 => (0..2_u8).prop_map(Kind::Ordered),
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
        4 => Just(Step::Pause),
    ];
    proptest::collection::vec(step, 90..130)
}

#[test]
fn no_interleaving_breaks_an_invariant() {
    let runtime = Runtime::new().unwrap();
    let database = runtime.block_on(migrated());
    let config = Config {
        cases: if long() { 100 } else { 5 },
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
    println!("the model's requests ended so: {:?}", seen.borrow());
    assert!(seen.borrow().contains_key("completed"));
}

/// A request as one statement found it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Row {
    queued: bool,
    claim_no: i32,
    attempts: i32,
    group: String,
    seq: Option<i64>,
    /// The whole row of its outcome.
    outcome: Option<String>,
    status: Option<String>,
    /// How many outcomes it has.
    outcomes: i64,
    payload: bool,
}

type Held = Arc<Mutex<Vec<oneshot::Sender<u16>>>>;
type Delivered = Arc<Mutex<Vec<String>>>;

struct Case<'t> {
    runtime: &'t Runtime,
    database: &'t TestDatabase,
    channel: String,
    server: Server,
    held: Held,
    /// What the receiver got, by number, in the order in which it came.
    delivered: Delivered,
    /// Answers everything at once from now on.
    open: Arc<Mutex<bool>>,
    source: Durable,
    client: Client,
    live: Option<(Runtime, Durable)>,
    /// What was enqueued: ids and their numbers.
    enqueued: Vec<(RequestId, String)>,
    last: HashMap<RequestId, Row>,
    /// What the foreign runner holds, with the claim's number.
    foreign: HashMap<RequestId, i32>,
    replayed: HashSet<RequestId>,
}

impl<'t> Case<'t> {
    fn new(runtime: &'t Runtime, database: &'t TestDatabase, channel: String) -> Self {
        let (held, delivered) = (Held::default(), Delivered::default());
        let open = Arc::new(Mutex::new(false));
        let handler = {
            let (held, delivered, open) = (held.clone(), delivered.clone(), open.clone());
            move |_, seen: crate::support::Seen| {
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
            source: builder(database, &channel).runner(false).build().unwrap(),
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
        }
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Enqueue(kind) => {
                let mut number = format!("{}", self.enqueued.len());
                if let Kind::Ordered(key) = kind {
                    number = format!("{number} key-{key}");
                }
                let request = request(&self.server.url("/"), &number, *kind);
                let handle = self.live.as_ref().map_or(&self.source, |(_, live)| live);
                let id = self
                    .runtime
                    .block_on(in_time(handle.fire(request)))
                    .unwrap();
                self.enqueued.push((id, number));
            }
            Step::Start if self.live.is_none() => {
                let runtime = own_runtime();
                let live =
                    runtime.block_on(async { builder(self.database, &self.channel).build() });
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
                // The foreign runner's too: from here on they are anybody's. In the order in which the crate locks rows, or this and a
                // settle could wait for each other.
                self.foreign.clear();
                self.execute(
                    "update requeuest.mq_msgs set attempt_at = now() where id in (
                         select id from requeuest.mq_msgs where channel_name = $1 order by id for update
                     )",
                );
            }
            Step::Answer(number, status) => {
                let mut held = self.held.lock().unwrap();
                let number = (*number).min(held.len());
                for answer in held.drain(..number) {
                    // Its sender may be gone.
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
            Step::Start | Step::Cancel(_) | Step::Replay(_) => {}
            Step::Pause => std::thread::sleep(Duration::from_millis(25)),
        }
        Ok(())
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
        // In between it may have ended by itself, unless it was in other hands.
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
                // Its outcome says so, once.
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

    /// Claims as any runner of the channel would.
    fn claim(&mut self, most: i32, end_leases: bool) -> Result<(), TestCaseError> {
        let held: Vec<uuid::Uuid> = self.foreign.keys().map(|id| (*id).into()).collect();
        let claims = self.runtime.block_on(async {
            let mut transaction = self.database.pool().begin().await.unwrap();
            sqlx::query("set local requeuest.lease = '1 hour'")
                .execute(&mut *transaction)
                .await
                .unwrap();
            if end_leases {
                // In order, as above.
                sqlx::query(
                    "update requeuest.mq_msgs set attempt_at = now() - interval '1 hour'
                     where id in (
                         select id from requeuest.mq_msgs where channel_name = $1 and state = 1 and id <> all ($2)
                         order by id for update
                     )",
                )
                .bind(&self.channel)
                .bind(&held)
                .execute(&mut *transaction)
                .await
                .unwrap();
            }
            let claims = sqlx::query("select id, payload_json from requeuest.mq_poll(array[$1], $2) where id is not null")
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
            let earlier = self.foreign.insert(id, claim_no);
            prop_assert!(earlier.is_none(), "{id} was claimed twice within its lease");
        }
        Ok(())
    }

    /// Everything there is to know of what was enqueued, at one moment.
    fn state(&self) -> HashMap<RequestId, Row> {
        let ids: Vec<uuid::Uuid> = self.enqueued.iter().map(|(id, _)| (*id).into()).collect();
        let rows = sqlx::query(
            "select i.id, m.id is not null as queued, coalesce(m.claim_no, 0) as claim_no,
                 coalesce(m.attempts, 0) as attempts, coalesce(m.channel_args, '') as channel_args, m.seq,
                 (select min(o::text) from requeuest.outcomes o where o.id = i.id) as outcome,
                 (select min(o.status) from requeuest.outcomes o where o.id = i.id) as status,
                 (select count(*) from requeuest.outcomes o where o.id = i.id) as outcomes,
                 exists (select from requeuest.mq_payloads p where p.id = i.id) as payload
             from unnest($1::uuid[]) as i(id) left join requeuest.mq_msgs m on m.id = i.id",
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
            let given_up = row.status.as_deref() == Some("discarded");
            let kept = row.queued || given_up && !self.replayed.contains(id);
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
                // Not even a result that came late may touch it.
                prop_assert!(
                    row.queued && row.claim_no == *claim_no,
                    "{id} is held elsewhere: {row:?}"
                );
            }
            if row.status.as_deref() == Some("completed") {
                prop_assert!(delivered.contains(number), "{id} ended without being sent");
            }
        }
        self.last = state;
        Ok(())
    }

    /// Survivors end all that is left. Returns how everything ended.
    fn finish(&mut self) -> Result<Vec<String>, TestCaseError> {
        *self.open.lock().unwrap() = true;
        self.take(&Step::Crash)?;
        self.take(&Step::Answer(usize::MAX, 200))?;
        self.take(&Step::EndLeases)?;
        self.take(&Step::Start)?;
        let ids: Vec<RequestId> = self.enqueued.iter().map(|(id, _)| *id).collect();
        for id in ids {
            let ended = requeuest::testkit::outcome(&self.source, id, crate::support::LONG);
            let ended = self.runtime.block_on(ended);
            prop_assert!(ended.is_ok(), "{:?}", ended.err());
        }
        self.check()?;
        self.take(&Step::Shutdown)?;
        self.in_order()?;
        Ok(self
            .last
            .values()
            .filter_map(|row| row.status.clone())
            .collect())
    }

    /// Of an ordering key, first deliveries come in the order of the inserts.
    fn in_order(&self) -> Result<(), TestCaseError> {
        let delivered = self.delivered.lock().unwrap();
        for key in 0..2 {
            let mark = format!("key-{key}");
            let mut last = None;
            for number in delivered.iter().filter(|number| number.ends_with(&mark)) {
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
        // A runtime's own drop waits for what it runs, and this may be one that failed.
        if let Some((runtime, _)) = self.live.take() {
            runtime.shutdown_background();
        }
    }
}

/// The least place of each ordering key.
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

fn request(url: &str, number: &str, kind: Kind) -> Request {
    match kind {
        Kind::Plain => post(url, number),
        Kind::Ordered(key) => {
            post(url, number).with(Options::default().ordered(format!("key-{key}")))
        }
        Kind::Delayed => post(url, number).with(Options::default().delay(Duration::from_secs(60))),
        Kind::Limited => {
            let twice = RetryPolicy::exponential()
                .base(Duration::from_millis(1))
                .max_attempts(2);
            post(url, number).with(Options::default().retry(twice))
        }
    }
}

fn builder(database: &TestDatabase, channel: &str) -> requeuest::DurableBuilder {
    let quick = crate::support::quick();
    Durable::builder(database.pool().clone())
        .channel(channel)
        .max_connections(3)
        .retry(quick)
}

fn own_runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}
