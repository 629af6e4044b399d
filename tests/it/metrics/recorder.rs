//! What a recorder is told.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use requeuest::recorder::{
    AttemptEnded, BatchKind, BatchWritten, Enqueued, Finished, HandleState, Limited, LimitedHow,
    MAX_LABELS, OTHER, QueueState, Recorder, TakenOver,
};
use requeuest::retry::RetryPolicy;
use requeuest::{
    CircuitBreaker, DestinationEvent, DestinationEventKind, DestinationPolicy, DestinationState,
    FailureClass, Options, RateLimit, Status,
};

use super::{lapse, usurp};
use crate::support::{
    LONG, Server, builder, closed_port, eventually, eventually_some, execute, in_time, migrated,
    other_process, outcome_of, post, quick,
};

/// Keeps what it is told.
#[derive(Default)]
struct Told {
    told: Mutex<Everything>,
}

#[derive(Default)]
struct Everything {
    enqueued: Vec<(String, String, u64, Option<Duration>)>,
    batches: Vec<BatchWritten>,
    takeovers: Vec<(String, Duration)>,
    attempts: Vec<Attempt>,
    finished: Vec<(String, String, Status, u32, Duration)>,
    stale: u64,
    limited: Vec<(String, LimitedHow)>,
    events: Vec<DestinationEvent>,
    handle: Vec<HandleState>,
    queue: Vec<Option<QueueState>>,
}

#[derive(Clone, Debug)]
struct Attempt {
    place: (String, String),
    number: u32,
    failure: Option<FailureClass>,
    status: Option<u16>,
    queue_wait: Duration,
    duration: Duration,
}

impl Told {
    fn told(&self) -> MutexGuard<'_, Everything> {
        self.told.lock().unwrap()
    }
}

impl Recorder for Told {
    fn enqueued(&self, it: &Enqueued<'_>) {
        let (channel, destination) = (it.channel.to_owned(), it.destination.to_owned());
        self.told()
            .enqueued
            .push((channel, destination, it.requests, it.latency));
    }

    fn batch_written(&self, batch: &BatchWritten) {
        self.told().batches.push(batch.clone());
    }

    fn taken_over(&self, takeover: &TakenOver<'_>) {
        let channel = takeover.channel.to_owned();
        self.told().takeovers.push((channel, takeover.late_by));
    }

    fn attempt_ended(&self, it: &AttemptEnded<'_>) {
        self.told().attempts.push(Attempt {
            place: (it.channel.to_owned(), it.destination.to_owned()),
            number: it.number,
            failure: it.failure,
            status: it.status.map(|status| status.as_u16()),
            queue_wait: it.queue_wait,
            duration: it.duration,
        });
    }

    fn finished(&self, it: &Finished<'_>) {
        let (channel, destination) = (it.channel.to_owned(), it.destination.to_owned());
        self.told()
            .finished
            .push((channel, destination, it.status, it.attempts, it.latency));
    }

    fn results_stale(&self, number: u64) {
        self.told().stale += number;
    }

    fn limited(&self, limited: &Limited<'_>) {
        let destination = limited.destination.to_owned();
        self.told().limited.push((destination, limited.how));
    }

    fn destination_changed(&self, event: &DestinationEvent) {
        self.told().events.push(event.clone());
    }

    fn handle_state(&self, state: &HandleState) {
        self.told().handle.push(state.clone());
    }

    fn queue_state(&self, state: Option<&QueueState>) {
        self.told().queue.push(state.cloned());
    }
}

/// Waits until the recorder has been told something.
async fn once<T>(told: &Told, what: &str, find: impl Fn(&Everything) -> Option<T>) -> T {
    eventually_some(what, || {
        let found = find(&told.told());
        async { found }
    })
    .await
}

#[tokio::test]
async fn a_recorder_is_told_of_each_request_attempt_outcome_and_batch() {
    let database = migrated().await;
    let server = Server::in_turn(&[500, 200]).await;
    let dead = format!("http://{}", closed_port().await);
    let told = Arc::new(Told::default());
    let durable = builder(&database)
        .recorder(Arc::<Told>::clone(&told))
        .retry(quick())
        .build()
        .unwrap();
    durable.fire(post(server.url("/a?b"), "x")).await.unwrap();
    let place = ("default".to_owned(), format!("http://{}", server.addr));
    once(&told, "an outcome", |told| told.finished.first().cloned()).await;
    let batches = |told: &Everything, kind| {
        let of_kind = told.batches.iter().filter(|batch| batch.kind == kind);
        of_kind.count()
    };
    let settled = |told: &Everything| (batches(told, BatchKind::Settle) == 2).then_some(());
    once(&told, "two writes of results", settled).await;
    {
        let told = told.told();
        let (channel, destination, requests, latency) = &told.enqueued[0];
        assert_eq!((channel.clone(), destination.clone()), place);
        assert!(!latency.unwrap().is_zero());
        assert_eq!((told.enqueued.len(), *requests), (1, 1));
        let [first, second] = &*told.attempts else {
            panic!("{:?}", told.attempts);
        };
        assert_eq!((&first.place, &second.place), (&place, &place));
        assert_eq!((first.number, second.number), (1, 2));
        assert_eq!((first.status, second.status), (Some(500), Some(200)));
        assert_eq!(
            (first.failure, second.failure),
            (Some(FailureClass::Status), None)
        );
        assert!(!first.duration.is_zero() && first.queue_wait < LONG);
        let (_, _, status, attempts, took) = &told.finished[0];
        assert_eq!((*status, *attempts), (Status::Completed, 2));
        // From the insert, where a runner has claimed it. Claims tell its age in milliseconds.
        let attempts = first.duration + second.duration;
        assert!(*took + Duration::from_millis(2) >= attempts, "{took:?}");
        assert!(told.batches.iter().all(|it| it.is_written && it.size == 1));
        assert_eq!(batches(&told, BatchKind::Enqueue), 1);
    }

    let once_only = Options::default()
        .retry(RetryPolicy::none())
        .limit_key("partner");
    let many = [post(&dead, "x").with(once_only)];
    durable.fire_many(many).await.unwrap();
    let (_, destination, status, ..) =
        once(&told, "a dead letter", |told| told.finished.get(1).cloned()).await;
    assert_eq!((&*destination, status), ("partner", Status::Discarded));
    let told = told.told();
    assert_eq!(told.enqueued[1].3, None);
    let refused = told.attempts.last().unwrap();
    assert_eq!(refused.place.1, "partner");
    assert_eq!(
        (refused.failure, refused.status),
        (Some(FailureClass::Connect), None)
    );
}

#[tokio::test]
async fn attempts_under_way_takeovers_and_stale_results_are_told() {
    let database = migrated().await;
    let (server, gate) = Server::held(200).await;
    let elsewhere = other_process(&database).await;
    let request = post(server.url("/"), "x");
    let id = elsewhere.fire(request).await.unwrap();
    lapse(&database, id).await;

    let told = Arc::new(Told::default());
    let durable = builder(&database).recorder(Arc::<Told>::clone(&told));
    let durable = durable.build().unwrap();
    let takeover = |told: &Everything| told.takeovers.first().cloned();
    let (channel, late_by) = once(&told, "a takeover", takeover).await;
    assert_eq!(channel, "default");
    assert!(late_by >= Duration::from_secs(60), "{late_by:?}");
    server.wait_for(1).await;
    let in_flight = |number: usize| {
        move |told: &Everything| {
            let state = told.handle.last()?;
            (state.in_flight == number).then_some(state.concurrency)
        }
    };
    once(&told, "an attempt under way", in_flight(1)).await;
    usurp(&database, id).await;
    gate.add_permits(1);
    let stale = |told: &Everything| (told.stale == 1).then_some(());
    once(&told, "a stale result", stale).await;
    once(&told, "no attempt under way", in_flight(0)).await;
    let told = told.told();
    assert_eq!((told.attempts.len(), told.takeovers.len()), (1, 1));
    assert!(
        told.attempts[0].queue_wait >= late_by,
        "{:?}",
        told.attempts
    );
    // A stale result is no outcome.
    assert!(told.finished.is_empty());
    drop(durable);
}

#[tokio::test]
async fn limits_and_breakers_are_told() {
    let database = migrated().await;
    let (server, broken) = (Server::always(200).await, Server::always(500).await);
    let told = Arc::new(Told::default());
    let slow = DestinationPolicy::default().rate(RateLimit::new(20, Duration::from_secs(1)));
    let breaker = CircuitBreaker::default().open_for(Duration::from_secs(3600));
    let with_breaker = DestinationPolicy::default()
        .circuit_breaker(breaker.max_open_for(Duration::from_secs(3600)));
    let origin = |server: &Server| format!("http://{}", server.addr);
    let durable = builder(&database)
        .recorder(Arc::<Told>::clone(&told))
        .destination(origin(&server), slow)
        .destination(origin(&broken), with_breaker)
        .retry(quick())
        .build()
        .unwrap();
    let to = |server: &Server, number| {
        let url = server.url("/");
        (0..number).map(move |_| post(&url, "x"))
    };
    durable.fire_many(to(&server, 40)).await.unwrap();
    durable.fire_many(to(&broken, 40)).await.unwrap();
    let is_slow = origin(&server);
    let waited = |told: &Everything| {
        let mut limited = told.limited.iter();
        limited.find_map(|(destination, how)| match how {
            LimitedHow::Waited(waited) if *destination == is_slow => Some(*waited),
            _ => None,
        })
    };
    assert!(once(&told, "a wait for a token", waited).await > Duration::ZERO);
    let opened = |told: &Everything| {
        let mut events = told.events.iter();
        events
            .find(|event| event.kind == DestinationEventKind::Opened)
            .map(|event| event.destination.to_string())
    };
    assert_eq!(
        once(&told, "an open breaker", opened).await,
        origin(&broken)
    );
    let deferred = |told: &Everything| {
        let deferred = (origin(&broken), LimitedHow::Deferred);
        told.limited.contains(&deferred).then_some(())
    };
    once(&told, "a request deferred by the breaker", deferred).await;
    in_time(durable.shutdown(LONG)).await.unwrap();

    // The next process that looks knows it.
    let told = Arc::new(Told::default());
    let durable = builder(&database)
        .recorder(Arc::<Told>::clone(&told))
        .build()
        .unwrap();
    let open = |told: &Everything| {
        let queue = told.queue.first()?.as_ref()?;
        let mut destinations = queue.destinations.iter();
        destinations
            .find(|(name, _)| **name == *origin(&broken))
            .map(|(_, state)| *state)
    };
    let state = once(&told, "the state of the destination", open).await;
    assert_eq!(state, DestinationState::CircuitOpen);
    in_time(durable.shutdown(LONG)).await.unwrap();
}

#[tokio::test]
async fn one_process_is_told_how_deep_the_queue_of_all_is() {
    let database = migrated().await;
    let elsewhere = other_process(&database).await;
    let dead = format!("http://{}", closed_port().await);
    let on = |channel: &str| Options::default().channel(channel);
    let due = (0..30).map(|number| {
        let options = on(if number < 10 { "a" } else { "b" });
        post(&dead, "x").with(options)
    });
    elsewhere.fire_many(due).await.unwrap();
    let later = (0..5).map(|_| post(&dead, "x").with(on("a").delay(LONG)));
    elsewhere.fire_many(later).await.unwrap();
    let ordered = (0..4).map(|_| post(&dead, "x").with(on("c").ordered("key")));
    elsewhere.fire_many(ordered).await.unwrap();
    let id = elsewhere
        .fire(post(&dead, "x").with(on("b")))
        .await
        .unwrap();
    let oldest = "UPDATE requeuest.mq_msgs SET attempt_at = now() - interval '1 hour'
        WHERE id = $1";
    execute(&database, id, oldest).await;
    crate::support::add_outcomes(&database, 3, 5, 7200, 3600).await;
    crate::support::add_outcomes(&database, -1, 2, 10, 3600).await;

    let recorders = [Arc::new(Told::default()), Arc::new(Told::default())];
    let mut handles = Vec::new();
    for recorder in &recorders {
        let handle = builder(&database).channel("d");
        let handle = handle.recorder(Arc::<Told>::clone(recorder));
        handles.push(handle.build().unwrap());
        // The first look comes before the second state of the handle.
        once(recorder, "a look", |told| {
            (told.handle.len() >= 2).then_some(())
        })
        .await;
        if handles.len() == 1 {
            once(recorder, "the queue", |told| {
                Some(told.queue.len()).filter(|it| *it > 0)
            })
            .await;
        }
    }
    let queue = recorders[0].told().queue[0].clone().unwrap();
    let depth: Vec<_> = queue
        .depth
        .iter()
        .filter(|(_, number)| *number > 0)
        .collect();
    // One of the ordered requests is due.
    assert_eq!(depth, [&("due", 32), &("scheduled", 5), &("behind", 3)]);
    let due: Vec<_> = queue
        .due
        .iter()
        .map(|it| (&*it.channel, it.requests, it.oldest.as_secs() / 3600))
        .collect();
    assert_eq!(due, [("a", 10, 0), ("b", 21, 1), ("c", 1, 0)]);
    assert_eq!(queue.dead_letters, 2);
    let expired = queue.oldest_expired_outcome.unwrap().as_secs();
    assert!((3590..4000).contains(&expired), "{expired}");
    assert!(recorders[1].told().queue.is_empty());
    // A third one takes it over.
    in_time(handles.remove(0).shutdown(LONG)).await.unwrap();
    let third = Arc::new(Told::default());
    let recorder = builder(&database).recorder(Arc::<Told>::clone(&third));
    let handle = recorder.channel("d").build().unwrap();
    once(&third, "the queue", |told| told.queue.first().cloned()).await;
    drop(handle);
}

#[tokio::test]
async fn a_recorder_is_told_a_bounded_number_of_names() {
    let database = migrated().await;
    let told = Arc::new(Told::default());
    let durable = builder(&database)
        .runner(false)
        .recorder(Arc::<Told>::clone(&told))
        .build()
        .unwrap();
    let requests = (0..1000).map(|number| {
        let url = format!("http://host-{number}.example.com/");
        post(url, "x").with(Options::default().channel(format!("channel {number}")))
    });
    durable.fire_many(requests).await.unwrap();
    let told = told.told();
    let sum: u64 = told.enqueued.iter().map(|(.., requests, _)| requests).sum();
    assert_eq!(sum, 1000);
    let channels: HashSet<_> = told.enqueued.iter().map(|(channel, ..)| channel).collect();
    let destinations: HashSet<_> = told.enqueued.iter().map(|(_, it, ..)| it).collect();
    assert_eq!(channels.len(), MAX_LABELS + 1);
    assert_eq!(destinations.len(), MAX_LABELS + 1);
    assert!(channels.contains(&OTHER.to_owned()));
    assert!(destinations.contains(&OTHER.to_owned()));
}

#[tokio::test]
async fn a_recorder_that_panics_loses_no_request() {
    struct Panics;
    impl Recorder for Panics {
        fn enqueued(&self, _: &Enqueued<'_>) {
            panic!("enqueued");
        }
        fn batch_written(&self, _: &BatchWritten) {
            panic!("batch");
        }
        fn attempt_ended(&self, _: &AttemptEnded<'_>) {
            panic!("attempt");
        }
        fn finished(&self, _: &Finished<'_>) {
            panic!("finished");
        }
        fn handle_state(&self, _: &HandleState) {
            panic!("state");
        }
        fn queue_state(&self, _: Option<&QueueState>) {
            panic!("queue");
        }
    }
    let database = migrated().await;
    let server = Server::in_turn(&[500, 200]).await;
    let handle = builder(&database).recorder(Arc::new(Panics));
    let durable = handle.retry(quick()).build().unwrap();
    let answered = durable.await_response(post(server.url("/"), "x"));
    assert_eq!(in_time(answered).await.unwrap().status(), 200);
    let id = durable.fire(post(server.url("/"), "x")).await.unwrap();
    assert_eq!(outcome_of(&durable, id).await.status(), Status::Completed);
    let many = durable.fire_many([post(server.url("/"), "x")]).await;
    assert_eq!(outcome_of(&durable, many.unwrap()[0]).await.attempts(), 1);
    assert_eq!(server.count(), 4);
    eventually("no task has stopped", || async {
        durable
            .background_tasks()
            .iter()
            .all(|task| task.panics == 0)
    })
    .await;
    in_time(durable.shutdown(LONG)).await.unwrap();
}
