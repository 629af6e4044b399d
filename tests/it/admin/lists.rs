//! Lists, searches and counts of requests.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use requeuest::admin::{
    Admin, Cursor, PageRequest, RequestFilter, RequestPage, RequestState, RequestSummary,
};
use requeuest::retry::RetryPolicy;
use requeuest::testkit::TestDatabase;
use requeuest::{Durable, Options, RequestId, Status, Uuid};
use sqlx::Executor;

use crate::damaged::damage;
use crate::support::{
    Server, builder, eventually, execute, migrated, other_process, outcome_of, post,
};

const HOUR: Duration = Duration::from_secs(3600);
const PATH: &str = "/hunter2?token=hunter2";

/// All pages of a list.
async fn all(admin: &Admin, filter: &RequestFilter, limit: u32) -> Vec<RequestSummary> {
    let mut page = PageRequest::new().limit(limit);
    let mut found = Vec::new();
    loop {
        let RequestPage { requests, next, .. } = admin.requests(filter, &page).await.unwrap();
        assert!(!format!("{requests:?}").contains("hunter2"), "{requests:?}");
        assert!(requests.len() <= limit as usize);
        found.extend(requests);
        let Some(next) = next else { return found };
        page = page.after(next.to_string().parse::<Cursor>().unwrap());
    }
}

async fn ids(admin: &Admin, filter: &RequestFilter) -> Vec<RequestId> {
    let found = all(admin, filter, 2).await;
    let ids: Vec<_> = found.iter().map(|request| request.id).collect();
    let count = admin.count(filter).await.unwrap();
    assert_eq!((count.number as usize, count.is_exact), (ids.len(), true));
    let mut sorted = ids.clone();
    sorted.sort_by(|a, b| b.cmp(a));
    sorted.dedup();
    assert_eq!(ids, sorted, "the newest first, and each once");
    ids
}

/// The requests of most kinds, none of which changes any more.
struct Mixture {
    admin: Admin,
    durable: Durable,
    server: Server,
    completed: RequestId,
    discarded: RequestId,
    /// It halts its ordering key, and has a caller's key.
    halted: RequestId,
    behind: RequestId,
    cancelled: RequestId,
    scheduled: RequestId,
    retryable: RequestId,
    elsewhere: RequestId,
}

async fn mixture(database: &TestDatabase) -> Mixture {
    let server = Server::start(|_, seen| async move {
        let status = if seen.uri.path() == "/404" { 404 } else { 200 };
        crate::support::reply(status, "")
    })
    .await;
    let gone = format!("http://{}/", crate::support::closed_port().await);
    let durable = builder(database).build().unwrap();
    let fire = async |url: String, options: Options| {
        durable.fire(post(url, "x").with(options)).await.unwrap()
    };
    let completed = fire(server.url(PATH), Options::default()).await;
    let discarded = fire(server.url("/404"), Options::default()).await;
    let halting = Options::default().ordered("orders").halt_on_discard();
    let halted = fire(server.url("/404"), halting.clone().key("invoice")).await;
    for id in [completed, discarded, halted] {
        outcome_of(&durable, id).await;
    }
    let behind = fire(server.url("/404"), halting).await;
    let cancelled = fire(server.url(PATH), Options::default().delay(HOUR)).await;
    assert!(durable.cancel(cancelled).await.unwrap());
    let scheduled = fire(server.url(PATH), Options::default().delay(HOUR)).await;
    let retry = Options::default().retry(RetryPolicy::constant(HOUR));
    let retryable = fire(gone, retry).await;
    let elsewhere = fire(server.url(PATH), Options::default().channel("elsewhere")).await;
    eventually("the attempt has failed", || async {
        durable.status(retryable).await.unwrap() == Some(Status::Retryable)
    })
    .await;
    // As a poll does that meets many such requests.
    damage(database, behind, "mq_msgs", "state = 'behind'").await;
    Mixture {
        admin: durable.admin(),
        durable,
        server,
        completed,
        discarded,
        halted,
        behind,
        cancelled,
        scheduled,
        retryable,
        elsewhere,
    }
}

#[tokio::test]
async fn a_list_has_the_requests_that_its_filter_selects_and_each_once() {
    let database = migrated().await;
    let all = mixture(&database).await;
    let admin = &all.admin;
    let filter = RequestFilter::new;
    let here = format!("http://{}", all.server.addr);
    let ended = [all.cancelled, all.halted, all.discarded, all.completed];
    let unfinished = [all.elsewhere, all.retryable, all.scheduled, all.behind];
    let everything = [&unfinished[..], &ended[..]].concat();
    for (filter, expected) in [
        (filter(), everything.clone()),
        (filter().id(all.halted), vec![all.halted]),
        (filter().id(Uuid::nil().into()), vec![]),
        (filter().channel("default").key("invoice"), vec![all.halted]),
        (filter().channel("elsewhere").key("invoice"), vec![]),
        (filter().channel("elsewhere"), vec![all.elsewhere]),
        (filter().channel("default"), everything[1..].to_vec()),
        (
            filter().ordering_key("orders"),
            vec![all.behind, all.halted],
        ),
        (filter().ordering_key("others"), vec![]),
        (
            filter().destination(&here),
            everything
                .iter()
                .copied()
                .filter(|id| *id != all.retryable)
                .collect(),
        ),
        (filter().status(Status::Completed), vec![all.completed]),
        (
            filter().status(Status::Discarded),
            vec![all.halted, all.discarded],
        ),
        (
            filter()
                .status(Status::Discarded)
                .channel("default")
                .destination(&here),
            vec![all.halted, all.discarded],
        ),
        (
            filter().status(Status::Cancelled).status(Status::Scheduled),
            vec![all.scheduled, all.cancelled],
        ),
        (filter().status(Status::Retryable), vec![all.retryable]),
        (filter().status(Status::Ambiguous), vec![]),
        (filter().state(RequestState::Behind), vec![all.behind]),
        (filter().state(RequestState::Halted), vec![all.halted]),
        (
            filter()
                .state(RequestState::Halted)
                .status(Status::Discarded),
            vec![all.halted],
        ),
        (
            filter()
                .state(RequestState::Halted)
                .status(Status::Ambiguous),
            vec![],
        ),
        (
            filter()
                .state(RequestState::Waiting)
                .status(Status::Available),
            vec![all.elsewhere],
        ),
        (filter().created_after(SystemTime::now() + HOUR), vec![]),
        (
            filter().created_before(SystemTime::now() + HOUR),
            everything.clone(),
        ),
        (
            filter().created_before(SystemTime::now() - HOUR * 24),
            vec![],
        ),
        (
            filter().error_contains("answered WITH 404 not"),
            vec![all.halted, all.discarded],
        ),
        (filter().error_contains("CONNECT"), vec![all.retryable]),
        (
            filter().error_contains("404").status(Status::Retryable),
            vec![],
        ),
        (filter().error_contains("%"), vec![]),
    ] {
        let mut expected = expected;
        expected.sort_by(|a, b| b.cmp(a));
        assert_eq!(ids(admin, &filter).await, expected, "{filter:?}");
    }

    // A letter that is replayed isn't one any more.
    let replayed = all.durable.replay(all.discarded).await.unwrap();
    outcome_of(&all.durable, replayed).await;
    let letters = ids(admin, &filter().status(Status::Discarded)).await;
    assert_eq!(letters, [replayed, all.halted]);
    assert_eq!(
        ids(admin, &filter().id(all.discarded)).await,
        [all.discarded]
    );
}

#[tokio::test]
async fn a_summary_shows_what_an_operator_looks_for() {
    let database = migrated().await;
    let mixture = mixture(&database).await;
    let found = all(&mixture.admin, &RequestFilter::new(), 100).await;
    let of = |id: RequestId| found.iter().find(|request| request.id == id).unwrap();
    let here = Some(format!("http://{}", mixture.server.addr));

    let halted = of(mixture.halted);
    assert_eq!(halted.status, Some(Status::Discarded));
    assert_eq!(halted.state, Some(RequestState::Halted));
    assert_eq!(halted.method.as_deref(), Some("POST"));
    assert_eq!(halted.destination, here);
    assert_eq!(halted.ordering_key.as_deref(), Some("orders"));
    assert_eq!((halted.attempts, halted.http_status), (1, Some(404)));
    assert_eq!(halted.error.as_deref(), Some("answered with 404 Not Found"));
    assert!(halted.finished_at.unwrap() >= halted.created_at);

    let retryable = of(mixture.retryable);
    assert_eq!(retryable.status, Some(Status::Retryable));
    assert_eq!(retryable.error_class.as_deref(), Some("connect"));
    assert!(retryable.error.is_some());
    assert!(retryable.due_at.unwrap() > retryable.created_at);
    assert_eq!(retryable.finished_at, None);

    let completed = of(mixture.completed);
    assert_eq!(completed.http_status, Some(200));
    assert_eq!((&completed.error, completed.state), (&None, None));
    let shown = mixture.admin.request(mixture.completed).await.unwrap();
    assert_eq!(shown.unwrap().error, None);
}

#[tokio::test]
async fn counts_are_by_status_and_by_state() {
    let database = migrated().await;
    let mixture = mixture(&database).await;
    let counts = mixture.admin.counts().await.unwrap();
    let by_status = counts.by_status.iter().map(|(_, count)| count.number);
    assert_eq!(by_status.sum::<u64>(), 8, "{counts:?}");
    for (status, number) in [
        (Status::Scheduled, 1),
        (Status::Retryable, 1),
        (Status::Completed, 1),
        (Status::Discarded, 2),
        (Status::Cancelled, 1),
    ] {
        let count = counts.status(status);
        assert_eq!((count.number, count.is_exact), (number, true), "{status}");
    }
    assert_eq!(counts.state(RequestState::Halted).number, 1);
    assert_eq!(counts.state(RequestState::Behind).number, 1);
    assert_eq!(counts.state(RequestState::Parked).to_string(), "0");
}

#[tokio::test]
async fn a_page_token_of_another_list_is_refused() {
    let database = migrated().await;
    let there = other_process(&database).await;
    for _ in 0..3 {
        let delayed = post("http://localhost:1/", "x").with(Options::default().delay(HOUR));
        there.fire(delayed).await.unwrap();
    }
    let admin = there.admin();
    let first = PageRequest::new().limit(1);
    let page = admin.requests(&RequestFilter::new(), &first).await.unwrap();
    let second = first.after(page.next.unwrap());
    let other = RequestFilter::new().channel("default");
    let error = admin.requests(&other, &second).await.unwrap_err();
    assert_eq!(error.field(), Some("cursor"));
    let page = admin.requests(&RequestFilter::new(), &second).await;
    assert_eq!(page.unwrap().requests.len(), 1);
    let bad = RequestFilter::new().channel("");
    let error = admin.count(&bad).await.unwrap_err();
    assert_eq!(error.field(), Some("channel"));
}

#[tokio::test]
async fn a_page_that_finds_nothing_among_many_says_where_to_continue() {
    let database = migrated().await;
    let there = other_process(&database).await;
    let first = there.fire(post("http://localhost:1/", "x")).await.unwrap();
    let first_error = "INSERT INTO requeuest.attempts (id, number, duration_ms, error_class, error)
        VALUES ($1, 1, 1, 'connect', 'a needle')";
    execute(&database, first, first_error).await;
    execute(
        &database,
        first,
        "UPDATE requeuest.mq_msgs SET attempts = 1 WHERE id = $1",
    )
    .await;
    let many = "INSERT INTO requeuest.mq_msgs (id, channel_name, channel_args, attempt_at)
        SELECT ('ffff' || substr(gen_random_uuid()::text, 5))::uuid, 'c', '0000|d|http://a:1', now()
        FROM generate_series(1, 15000)";
    database.pool().execute(many).await.unwrap();
    let admin = there.admin();
    let needle = RequestFilter::new().error_contains("needle");
    let page = admin.requests(&needle, &PageRequest::new()).await.unwrap();
    assert_eq!(page.requests, []);
    let page = PageRequest::new().after(page.next.unwrap());
    let page = admin.requests(&needle, &page).await.unwrap();
    assert_eq!(page.requests[0].id, first);
    assert_eq!(page.next, None);
    assert_eq!(admin.count(&needle).await.unwrap().to_string(), "0+");

    let channel = RequestFilter::new().channel("c");
    assert_eq!(admin.count(&channel).await.unwrap().to_string(), "10,000+");
    let counts = admin.counts().await.unwrap();
    assert!(!counts.status(Status::Available).is_exact);
    assert_eq!(counts.state(RequestState::Waiting).to_string(), "10,000+");
    let found = all(&admin, &channel, 1000).await;
    let distinct: BTreeSet<_> = found.iter().map(|request| request.id).collect();
    assert_eq!((found.len(), distinct.len()), (15_000, 15_000));
}

#[tokio::test]
async fn rows_that_can_not_be_read_are_listed_with_what_can() {
    let database = migrated().await;
    let mixture = mixture(&database).await;
    let (queued, ended) = (mixture.scheduled, mixture.cancelled);
    for change in [
        "attempt_at = '-infinity'",
        "attempt_at = 'infinity', state = 'held'",
        "attempt_at = '4713-01-01 BC', state = 'held'",
        "created_at = '-infinity', format = 32767",
        "attempts = -2147483648, channel_args = ''",
        "destination = 'https://u:p@a.example/?x'",
    ] {
        damage(&database, queued, "mq_msgs", change).await;
        let found = all(&mixture.admin, &RequestFilter::new(), 3).await;
        assert_eq!(found.len(), 8, "{change}");
        mixture.admin.counts().await.unwrap();
    }
    assert!(mixture.admin.request(queued).await.unwrap().is_some());
    for change in ["head = ''", "head = '{\"method\":7'", "metadata = '7'"] {
        damage(&database, queued, "mq_payloads", change).await;
    }
    for change in [
        "status = 'postponed', format = 7",
        "finished_at = 'infinity', http_status = -1, error_class = ''",
        "error = 'sealed:hunter', created_at = '-infinity', attempts = -1",
    ] {
        damage(&database, ended, "outcomes", change).await;
    }
    let found = all(&mixture.admin, &RequestFilter::new(), 3).await;
    let of = |id: RequestId| found.iter().find(|request| request.id == id).unwrap();
    assert_eq!(found.len(), 8);
    assert_eq!((of(ended).status, of(queued).method.as_ref()), (None, None));
    let text = of(ended).error.as_deref().unwrap();
    assert!(text.starts_with("it is encrypted"), "{text}");
}
