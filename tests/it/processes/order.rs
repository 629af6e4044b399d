//! Ordered requests from many processes and transactions.

use std::collections::HashMap;
use std::error::Error as _;
use std::time::Duration;

use sqlx::PgPool;

use super::{Arrivals, Me, Member, completed, echo_server, named_builder, ordered};
use crate::support::{count, eventually, in_time, migrated, plays, rows};

const KEYS: [&str; 3] = ["a", "b", "c"];

#[tokio::test]
async fn concurrent_ordered_inserts_all_arrive_in_commit_order() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::ZERO).await;
    let mut members: Vec<Member> = (0..4)
        .map(|n| {
            let (name, url) = (format!("{n}"), server.url("/"));
            Member::start(module_path!(), "insert_in_order", &name, &database, &url)
        })
        .collect();
    for member in &mut members {
        let status = in_time(member.child.wait()).await.unwrap();
        assert!(status.success(), "an insert failed");
    }
    assert_eq!(server.count(), 0);
    let inserted: Vec<(String, String)> = sqlx::query_as(
        "SELECT m.channel_args, convert_from(p.body, 'UTF8') FROM requeuest.mq_msgs m
         JOIN requeuest.mq_payloads p USING (id) ORDER BY m.channel_args, m.seq",
    )
    .fetch_all(database.pool())
    .await
    .unwrap();
    // Four processes, three keys, and for each 20 requests alone and 20 in committed transactions.
    assert_eq!(inserted.len(), 4 * 3 * 40);
    assert!(
        !inserted
            .iter()
            .any(|(_, number)| number.contains("rolled back"))
    );

    let _runner = named_builder(database.pool(), "runner").build().unwrap();
    eventually("all requests are delivered", || async {
        completed(&database).await.len() == inserted.len()
    })
    .await;
    let mut expected: HashMap<String, Vec<String>> = HashMap::new();
    for (_, number) in inserted {
        let key = number.split('/').next().unwrap().to_owned();
        expected.entry(key).or_default().push(number);
    }
    let mut arrived: HashMap<String, Vec<String>> = HashMap::new();
    let mut last: HashMap<String, usize> = HashMap::new();
    for arrival in arrivals.all() {
        let (line, place) = arrival.number.rsplit_once('/').unwrap();
        let key = line.split('/').next().unwrap().to_owned();
        arrived.entry(key).or_default().push(arrival.number.clone());
        // One caller's requests arrive in the order in which it made them.
        let place: usize = place.parse().unwrap();
        let before = last.insert(line.to_owned(), place);
        assert!(before.is_none_or(|before| before < place), "{arrival:?}");
    }
    assert_eq!(arrived, expected);
}

#[tokio::test]
#[ignore = "a part played by a copy of this binary"]
async fn insert_in_order() {
    if !plays("insert_in_order") {
        return;
    }
    let me = Me::new();
    let durable = me.handle().runner(false).build().unwrap();
    let alone = async {
        for n in 0..20 {
            for key in KEYS {
                let number = format!("{key}/{}/alone/{n}", me.name);
                durable.fire(ordered(&me.url, &number, key)).await.unwrap();
            }
        }
    };
    let together = async {
        for n in 0..25 {
            // Every fifth transaction is rolled back.
            let rolled_back = n % 5 == 4;
            let how = if rolled_back {
                "rolled back"
            } else {
                "together"
            };
            let mut transaction = me.pool.begin().await.unwrap();
            for key in KEYS {
                let number = format!("{key}/{}/{how}/{n}", me.name);
                let request = ordered(&me.url, &number, key);
                durable.fire_in(&mut *transaction, request).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..4))).await;
            if rolled_back {
                transaction.rollback().await.unwrap();
            } else {
                transaction.commit().await.unwrap();
            }
        }
    };
    tokio::join!(alone, together);
}

#[tokio::test]
async fn opposite_key_orders_abort_one_transaction_completely() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::ZERO).await;
    let durable = named_builder(database.pool(), "runner").build().unwrap();
    let meet = tokio::sync::Barrier::new(2);
    let transaction = |name: &'static str, keys: [&'static str; 2]| {
        let (durable, url, meet) = (durable.clone(), server.url("/"), &meet);
        let pool: PgPool = database.pool().clone();
        async move {
            let mut transaction = pool.begin().await.unwrap();
            let first = ordered(&url, &format!("{name}/0"), keys[0]);
            durable.fire_in(&mut *transaction, first).await.unwrap();
            meet.wait().await;
            let second = ordered(&url, &format!("{name}/1"), keys[1]);
            match durable.fire_in(&mut *transaction, second).await {
                Ok(_) => {
                    transaction.commit().await.unwrap();
                    None
                }
                Err(error) => {
                    transaction.rollback().await.unwrap();
                    Some(error)
                }
            }
        }
    };
    let both = async {
        tokio::join!(
            transaction("one", ["a", "b"]),
            transaction("two", ["b", "a"])
        )
    };
    let (survivor, error) = match in_time(both).await {
        (None, Some(error)) => ("one", error),
        (Some(error), None) => ("two", error),
        other => panic!("{other:?}"),
    };
    assert!(
        error.is_database() && !error.is_indeterminate(),
        "{error:?}"
    );
    let source = error
        .source()
        .and_then(|source| source.downcast_ref::<sqlx::Error>());
    let code = source.and_then(|error| error.as_database_error()?.code());
    assert_eq!(code.as_deref(), Some("40P01"), "{error:?}");
    eventually("the committed requests are delivered", || async {
        completed(&database).await.len() == 2
    })
    .await;
    assert_eq!(rows(&database, "mq_msgs").await, 0);
    assert_eq!(rows(&database, "mq_payloads").await, 0);
    assert!(
        arrivals
            .all()
            .iter()
            .all(|arrival| arrival.number.starts_with(survivor))
    );
    assert_eq!(arrivals.all().len(), 2);
}

#[tokio::test]
async fn ordered_inserts_keep_commit_order_at_every_isolation_level() {
    let database = migrated().await;
    let arrivals = Arrivals::default();
    let server = echo_server(&arrivals, Duration::ZERO).await;
    let durable = named_builder(database.pool(), "source")
        .runner(false)
        .build()
        .unwrap();
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let url = server.url("/");
        let request = |number: &str| ordered(&url, &format!("{level}: {number}"), level);
        let begin = format!("BEGIN ISOLATION LEVEL {level}");
        // This snapshot is older than all of the following inserts.
        let mut late = database.pool().begin_with(begin.clone()).await.unwrap();
        sqlx::query("SELECT pg_current_snapshot()")
            .execute(&mut *late)
            .await
            .unwrap();
        let mut early = database.pool().begin_with(begin).await.unwrap();
        sqlx::query("SELECT pg_current_snapshot()")
            .execute(&mut *early)
            .await
            .unwrap();
        durable.fire_in(&mut *early, request("0")).await.unwrap();
        let waiting = tokio::spawn({
            let (durable, request) = (durable.clone(), request("1"));
            async move {
                durable.fire_in(&mut *late, request).await.unwrap();
                late.commit().await.unwrap();
            }
        });
        let blocked = "SELECT count(*) FROM pg_stat_activity
                       WHERE datname = current_database()
                           AND wait_event_type = 'Lock' AND wait_event = 'advisory'";
        eventually("the insert waits for the key", || async {
            count(&database, blocked).await == 1
        })
        .await;
        early.commit().await.unwrap();
        in_time(waiting).await.unwrap();
        durable.fire(request("2")).await.unwrap();
    }
    let _runner = named_builder(database.pool(), "runner").build().unwrap();
    eventually("all requests are delivered", || async {
        completed(&database).await.len() == 9
    })
    .await;
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let arrived = arrivals.all();
        let arrived = arrived
            .iter()
            .filter_map(|arrival| arrival.number.strip_prefix(level));
        assert_eq!(arrived.collect::<Vec<_>>(), [": 0", ": 1", ": 2"]);
    }
}
