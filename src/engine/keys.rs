//! Requests whose keys another transaction holds.
//!
//! One request of each key asks the database again and again; the others wait behind it in memory.
//! Otherwise the callers of one busy key would take all of the pool's connections. Other processes
//! have queues of their own, so each of them has one request that asks.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::store::enqueue::{KeyField, NewRequest};

/// How many requests ask at the same time once a [`KeyField::Key`] is taken: each of them then
/// attaches to the request that has the key, and they exclude each other no longer.
const ATTACHING: usize = 4;

/// The keys of requests that wait here, and how long they may wait.
#[derive(Debug)]
pub(super) struct BusyKeys {
    queues: Mutex<HashMap<Name, Queue>>,
    /// How many queues there are. Read without the lock, so that a request whose keys are free
    /// doesn't take it.
    count: AtomicUsize,
    max_wait: Duration,
}

/// A key within its channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Name {
    field: KeyField,
    channel: Arc<str>,
    key: Box<str>,
}

#[derive(Debug)]
struct Queue {
    shared: Arc<Shared>,
    places: usize,
}

#[derive(Debug)]
struct Shared {
    turns: Arc<Semaphore>,
    progress: Mutex<Progress>,
}

#[derive(Debug)]
struct Progress {
    /// When a request of the queue got an answer last.
    at: Instant,
    /// Several may ask at the same time.
    wide: bool,
}

/// A request's place in the queue of one of its keys. Dropping it lets the next one ask.
#[derive(Debug)]
pub(super) struct Place {
    keys: Arc<BusyKeys>,
    name: Name,
    shared: Arc<Shared>,
    joined: Instant,
    turn: Option<OwnedSemaphorePermit>,
}

impl BusyKeys {
    pub(super) fn new(max_wait: Duration) -> Self {
        Self {
            queues: Mutex::default(),
            count: AtomicUsize::new(0),
            max_wait,
        }
    }

    /// A place behind the requests that wait for a key of this one, if there are any.
    pub(super) fn behind_others(self: &Arc<Self>, row: &NewRequest) -> Option<Place> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut queues = self.lock();
        KeyField::ALL.into_iter().find_map(|field| {
            let name = Name::of(row, field)?;
            let queue = queues.get_mut(&name)?;
            queue.places += 1;
            Some(self.place(name, &queue.shared))
        })
    }

    /// A place in the queue of this key. `None` if the request has no such key.
    pub(super) fn join(self: &Arc<Self>, row: &NewRequest, field: KeyField) -> Option<Place> {
        let name = Name::of(row, field)?;
        let mut queues = self.lock();
        let queue = match queues.entry(name.clone()) {
            Entry::Occupied(queue) => queue.into_mut(),
            Entry::Vacant(vacant) => {
                self.count.fetch_add(1, Ordering::Relaxed);
                vacant.insert(Queue::new())
            }
        };
        queue.places += 1;
        Some(self.place(name, &queue.shared))
    }

    fn place(self: &Arc<Self>, name: Name, shared: &Arc<Shared>) -> Place {
        Place {
            keys: Arc::clone(self),
            name,
            shared: Arc::clone(shared),
            joined: Instant::now(),
            turn: None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Name {
    fn of(row: &NewRequest, field: KeyField) -> Option<Self> {
        Some(Self {
            field,
            channel: Arc::clone(&row.channel),
            key: row.key_of(field)?.into(),
        })
    }
}

impl Queue {
    fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                turns: Arc::new(Semaphore::new(1)),
                progress: Mutex::new(Progress {
                    at: Instant::now(),
                    wide: false,
                }),
            }),
            places: 0,
        }
    }
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(super) fn field(&self) -> KeyField {
        self.name.field
    }

    /// Waits until the request may ask. `false` if it has waited for too long.
    pub(super) async fn turn(&mut self) -> bool {
        loop {
            let left = self.left();
            if left.is_zero() {
                return false;
            }
            if self.turn.is_some() {
                return true;
            }
            let turn = Arc::clone(&self.shared.turns).acquire_owned();
            // Meanwhile, requests ahead may have got through, and then there is more time.
            let turn = tokio::time::timeout(left, turn).await;
            self.turn = turn.ok().and_then(Result::ok);
        }
    }

    /// How long the request may still wait. Time counts only while no request of this queue gets
    /// through: a long queue that moves is no fault.
    fn left(&self) -> Duration {
        let since = self.joined.max(self.shared.progress().at);
        self.keys.max_wait.saturating_sub(since.elapsed())
    }

    /// The request got an answer, so its key is or was free.
    pub(super) fn passed(&self) {
        let mut progress = self.shared.progress();
        progress.at = Instant::now();
        if self.name.field == KeyField::Key && !progress.wide {
            progress.wide = true;
            self.shared.turns.add_permits(ATTACHING - 1);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = self.keys.lock();
        if let Entry::Occupied(mut queue) = queues.entry(self.name.clone()) {
            queue.get_mut().places -= 1;
            if queue.get().places == 0 {
                queue.remove();
                self.keys.count.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::RequestId;
    use crate::options::Priority;
    use crate::store::enqueue::{Initial, Key};

    const WAIT: Duration = Duration::from_secs(30);

    fn row(key: Option<&str>, ordered: bool) -> NewRequest {
        NewRequest {
            id: RequestId::generate(),
            channel: "c".into(),
            group: "0000|o|k".to_owned(),
            destination: None,
            priority: Priority::default(),
            ordered,
            halts: false,
            delay: Duration::ZERO,
            deadline: None,
            head: String::new(),
            body: None,
            metadata: None,
            waiter: None,
            key: key.map(|key| Key {
                text: key.into(),
                fingerprint: [0; 32],
                sealed: None,
            }),
            supersede: None,
            initial: Initial::Waiting,
        }
    }

    async fn has_turn(place: &mut Place) -> bool {
        let turn = tokio::time::timeout(Duration::from_millis(1), place.turn());
        turn.await == Ok(true)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_of_an_ordering_key_ask_one_after_another() {
        let keys = Arc::new(BusyKeys::new(WAIT));
        let row = row(None, true);
        assert!(keys.behind_others(&row).is_none());
        let mut first = keys.join(&row, KeyField::Ordered).unwrap();
        let mut second = keys.behind_others(&row).unwrap();
        assert!(has_turn(&mut first).await && has_turn(&mut first).await);
        assert!(!has_turn(&mut second).await);
        first.passed();
        assert!(!has_turn(&mut second).await);
        drop(first);
        assert!(has_turn(&mut second).await);
        drop(second);
        assert!(keys.behind_others(&row).is_none());
        assert!(keys.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_that_attach_to_a_taken_key_ask_together() {
        let keys = Arc::new(BusyKeys::new(WAIT));
        let row = row(Some("k"), false);
        let mut first = keys.join(&row, KeyField::Key).unwrap();
        assert!(first.turn().await);
        let mut others: Vec<_> = (0..ATTACHING)
            .map(|_| keys.behind_others(&row).unwrap())
            .collect();
        assert!(!has_turn(&mut others[0]).await);
        first.passed();
        first.passed();
        drop(first);
        for other in &mut others {
            assert!(has_turn(other).await);
        }
        let mut last = keys.behind_others(&row).unwrap();
        assert!(!has_turn(&mut last).await);
    }

    #[tokio::test(start_paused = true)]
    async fn time_counts_while_no_request_of_the_key_gets_through() {
        let keys = Arc::new(BusyKeys::new(WAIT));
        let row = row(None, true);
        let began = Instant::now();
        let mut first = keys.join(&row, KeyField::Ordered).unwrap();
        let mut second = keys.join(&row, KeyField::Ordered).unwrap();
        assert!(first.turn().await);
        let waiting = tokio::spawn(async move { (second.turn().await, Instant::now()) });
        for _ in 0..10 {
            tokio::time::sleep(WAIT - Duration::from_secs(1)).await;
            first.passed();
        }
        let moved = began.elapsed();
        // The one that asks gives up too.
        tokio::time::sleep(WAIT).await;
        assert!(!first.turn().await);
        let (in_time, gave_up) = waiting.await.unwrap();
        assert!(!in_time);
        let after = gave_up - began;
        let slack = Duration::from_millis(10);
        assert!(
            (moved + WAIT..moved + WAIT + slack).contains(&after),
            "{after:?}"
        );
    }
}
