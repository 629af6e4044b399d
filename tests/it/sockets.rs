//! The connections of the transport that a handle has by default.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::support::{builder, eventually, in_time, migrated};

/// Receivers that keep their connections open, and count them.
struct Receivers {
    addresses: Vec<SocketAddr>,
    connections: Arc<Connections>,
    _accepting: JoinSet<()>,
}

#[derive(Default)]
struct Connections {
    open: AtomicUsize,
    most: AtomicUsize,
    accepted: AtomicUsize,
}

impl Connections {
    async fn serve(self: Arc<Self>, mut stream: TcpStream) {
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(open, Ordering::SeqCst);
        self.accepted.fetch_add(1, Ordering::SeqCst);
        let mut received = Vec::new();
        while stream
            .read_buf(&mut received)
            .await
            .is_ok_and(|read| read > 0)
        {
            if received.ends_with(b"\r\n\r\n") {
                received.clear();
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                if stream.write_all(answer).await.is_err() {
                    break;
                }
            }
        }
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

impl Receivers {
    async fn start(number: usize) -> Self {
        let connections = Arc::new(Connections::default());
        let (mut addresses, mut accepting) = (Vec::new(), JoinSet::new());
        for _ in 0..number {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            let connections = Arc::clone(&connections);
            accepting.spawn(async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    tokio::spawn(Arc::clone(&connections).serve(stream));
                }
            });
        }
        Self {
            addresses,
            connections,
            _accepting: accepting,
        }
    }

    fn request(&self, number: usize) -> http::Request<&'static str> {
        let address = self.addresses[number];
        http::Request::get(format!("http://{address}/"))
            .body("")
            .unwrap()
    }
}

#[tokio::test]
async fn idle_connections_to_many_receivers_are_bounded_in_all() {
    let database = migrated().await;
    let receivers = Receivers::start(300).await;
    let durable = builder(&database).concurrency(16).build().unwrap();
    let sent = (0..300).map(|number| durable.await_response(receivers.request(number)));
    for response in in_time(join_all(sent)).await {
        assert_eq!(response.unwrap().status(), 200);
    }
    let connections = &receivers.connections;
    assert_eq!(connections.accepted.load(Ordering::SeqCst), 300);
    // 64 idle ones, and at most 16 in use. A receiver notices a closed one a little later.
    eventually("few are open", || async { connections.open() <= 64 }).await;
    let most = connections.most.load(Ordering::SeqCst);
    assert!(most < 200, "{most} connections at once");
    // A receiver that is used all the time keeps its connection.
    let before = connections.accepted.load(Ordering::SeqCst);
    for _ in 0..50 {
        let request = receivers.request(0);
        in_time(durable.await_response(request)).await.unwrap();
    }
    let opened = connections.accepted.load(Ordering::SeqCst) - before;
    assert!(opened <= 2, "{opened} connections for 50 requests in turn");
    assert!(connections.open() > 0);
}
