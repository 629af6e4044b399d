//! A bad network: a TCP proxy whose connections are delayed, cut, reset, or go silent.
//!
//! The proxy knows enough of Postgres' protocol to lose the answer to a statement, to refuse a
//! statement in the server's place, or to drop the startup options that a pooler drops.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// What a connection does to the bytes that go through it.
#[derive(Clone, Copy, Debug, Default)]
pub enum Manner {
    #[default]
    Pass,
    /// Each piece, in either direction, is delayed by this long.
    Delay(Duration),
    /// Closed after this many bytes from the client.
    CutRequest(usize),
    /// Closed after this many bytes from the server.
    CutAnswer(usize),
    /// Reset (RST) after this many bytes from the server.
    ResetAnswer(usize),
    /// The connection is accepted, and no byte goes through.
    BlackHole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Any,
    Postgres,
}

/// Forwards connections to another address.
pub struct Proxy {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    target: SocketAddr,
    protocol: Protocol,
    manner: Mutex<Manner>,
    drop_options: bool,
    /// The text of the statement whose next answers are lost, and how many answers are still to be
    /// lost.
    losing: Mutex<(String, usize)>,
    lost: AtomicUsize,
    /// The text of the statements that are refused, and the SQLSTATE.
    refusing: Mutex<Option<(String, String)>>,
    refused: AtomicUsize,
    /// The text of the statements that are counted.
    counting: Mutex<String>,
    counted: AtomicUsize,
    broken: AtomicUsize,
    connections: Mutex<Vec<Connection>>,
}

/// A connection that is or was open.
struct Connection {
    fate: watch::Sender<Option<Fate>>,
    /// The text of the client's statements, by statement name.
    said: Arc<Mutex<HashMap<String, String>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Closed,
    Reset,
    /// Both sockets stay open, and no byte goes through.
    Held,
}

impl Proxy {
    /// A proxy for any protocol.
    pub async fn start(target: SocketAddr) -> Self {
        Self::with(target, Protocol::Any, false).await
    }

    /// A proxy for Postgres without TLS.
    pub async fn postgres(target: SocketAddr) -> Self {
        Self::with(target, Protocol::Postgres, false).await
    }

    /// A proxy for Postgres that drops the `options` of the startup message, as poolers do.
    pub async fn pooler(target: SocketAddr) -> Self {
        Self::with(target, Protocol::Postgres, true).await
    }

    async fn with(target: SocketAddr, protocol: Protocol, drop_options: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target,
            protocol,
            manner: Mutex::default(),
            drop_options,
            losing: Mutex::default(),
            lost: AtomicUsize::new(0),
            refusing: Mutex::default(),
            refused: AtomicUsize::new(0),
            counting: Mutex::default(),
            counted: AtomicUsize::new(0),
            broken: AtomicUsize::new(0),
            connections: Mutex::default(),
        });
        let passed = Arc::clone(&shared);
        // Aborting the task drops the set, which closes all connections.
        let accepting = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let manner = *passed.manner.lock().unwrap();
                open.spawn(serve(Arc::clone(&passed), manner, client));
            }
        });
        Self {
            addr,
            shared,
            accepting,
        }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.addr)
    }

    /// Sets how new connections behave.
    pub fn treat(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    /// Lets no byte through on existing and new connections. [`treat`](Self::treat) ends this for
    /// new connections.
    pub fn black_hole(&self) {
        self.treat(Manner::BlackHole);
        self.decide(Fate::Held, |_| true);
    }

    /// Like [`black_hole`](Self::black_hole), but only for connections whose client has sent a
    /// statement that contains this text. Returns how many there are.
    pub fn black_hole_those_that_said(&self, text: &str) -> usize {
        self.decide(Fate::Held, |said| {
            said.values().any(|statement| statement.contains(text))
        })
    }

    /// Resets all connections, also those that let no byte through, and returns how many.
    pub fn reset(&self) -> usize {
        self.decide(Fate::Reset, |_| true)
    }

    /// Closes the connection instead of passing on the answer, for the next `times` statements that
    /// contain this text. The server executes those statements.
    pub fn lose_answers_to(&self, text: &str, times: usize) {
        *self.shared.losing.lock().unwrap() = (text.to_owned(), times);
    }

    /// From now on, answers statements that contain this text with an error of this SQLSTATE. They
    /// don't reach the server.
    pub fn refuse(&self, text: &str, code: &str) {
        *self.shared.refusing.lock().unwrap() = Some((text.to_owned(), code.to_owned()));
    }

    /// Lets all statements through again. Returns how many were refused since the last call.
    pub fn refuse_nothing(&self) -> usize {
        *self.shared.refusing.lock().unwrap() = None;
        self.shared.refused.swap(0, Ordering::SeqCst)
    }

    /// From now on, counts statements that contain this text.
    pub fn count(&self, text: &str) {
        text.clone_into(&mut self.shared.counting.lock().unwrap());
        self.shared.counted.store(0, Ordering::SeqCst);
    }

    /// How many statements have been counted.
    pub fn counted(&self) -> usize {
        self.shared.counted.load(Ordering::SeqCst)
    }

    /// How many statements have been refused.
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::SeqCst)
    }

    /// How many answers have been lost.
    pub fn lost(&self) -> usize {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// How many connections have broken as their [`Manner`] says.
    pub fn broken(&self) -> usize {
        self.shared.broken.load(Ordering::SeqCst)
    }

    fn decide(&self, fate: Fate, concerned: impl Fn(&HashMap<String, String>) -> bool) -> usize {
        let connections = self.shared.connections.lock().unwrap();
        let concerned = connections
            .iter()
            .filter(|connection| !connection.fate.is_closed())
            .filter(|connection| concerned(&connection.said.lock().unwrap()));
        let mut count = 0;
        for connection in concerned {
            connection.fate.send_replace(Some(fate));
            count += 1;
        }
        count
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(shared: Arc<Shared>, manner: Manner, mut client: TcpStream) {
    let (fate, mut fated) = watch::channel(None);
    let said = Arc::default();
    shared.connections.lock().unwrap().push(Connection {
        fate,
        said: Arc::clone(&said),
    });
    if matches!(manner, Manner::BlackHole) {
        shared.broken.fetch_add(1, Ordering::SeqCst);
        return held(&client, fated).await;
    }
    let Ok(mut server) = TcpStream::connect(shared.target).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ended = tokio::select! {
        ended = pass(&shared, manner, &said, &mut client, &mut server) => ended,
        fated = fated.wait_for(Option::is_some) => match fated {
            Ok(fate) => fate.unwrap_or(Fate::Closed),
            Err(_) => Fate::Closed,
        },
    };
    match ended {
        Fate::Closed => {}
        Fate::Reset => {
            let _ = client.set_zero_linger();
        }
        Fate::Held => held(&client, fated).await,
    }
}

/// Keeps a connection open until it is reset.
async fn held(client: &TcpStream, mut fated: watch::Receiver<Option<Fate>>) {
    let _ = fated.wait_for(|fate| *fate == Some(Fate::Reset)).await;
    let _ = client.set_zero_linger();
}

/// Forwards bytes until one side closes or the manner's limit is reached.
async fn pass(
    shared: &Shared,
    manner: Manner,
    said: &Mutex<HashMap<String, String>>,
    client: &mut TcpStream,
    server: &mut TcpStream,
) -> Fate {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let delay = match manner {
        Manner::Delay(delay) => delay,
        _ => Duration::ZERO,
    };
    let limit = |limit: Option<usize>| limit.unwrap_or(usize::MAX);
    let request = limit(match manner {
        Manner::CutRequest(bytes) => Some(bytes),
        _ => None,
    });
    let answer = limit(match manner {
        Manner::CutAnswer(bytes) | Manner::ResetAnswer(bytes) => Some(bytes),
        _ => None,
    });
    let (losing, lost) = watch::channel(false);
    let (own_answers, to_be_said) = mpsc::unbounded_channel();
    let (_nothing, to_be_asked) = mpsc::unbounded_channel();
    let asking = {
        let mut frontend = Frontend {
            shared,
            said,
            started: false,
            losing,
            refusing: None,
            own_answers,
        };
        let take = move |input: &mut BytesMut| match shared.protocol {
            Protocol::Any => Some(input.split()),
            Protocol::Postgres => frontend.take(input),
        };
        pump(from_client, to_server, to_be_asked, delay, request, take)
    };
    let answering = {
        let take = move |input: &mut BytesMut| {
            if *lost.borrow() {
                lose_answer(input)
            } else {
                Some(input.split())
            }
        };
        pump(from_server, to_client, to_be_said, delay, answer, take)
    };
    let ended = tokio::select! {
        ended = asking => ended,
        ended = answering => ended,
    };
    match ended {
        Ok(Pumped::Ended) | Err(_) => {}
        Ok(Pumped::Lost) => {
            shared.lost.fetch_add(1, Ordering::SeqCst);
        }
        Ok(Pumped::Limit) => {
            shared.broken.fetch_add(1, Ordering::SeqCst);
            if matches!(manner, Manner::ResetAnswer(_)) {
                return Fate::Reset;
            }
        }
    }
    Fate::Closed
}

enum Pumped {
    Ended,
    Limit,
    Lost,
}

/// Forwards what `take` returns of the bytes read, and what `added` yields. Ends once `take`
/// returns `None`.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut added: mpsc::UnboundedReceiver<BytesMut>,
    delay: Duration,
    mut limit: usize,
    mut take: impl FnMut(&mut BytesMut) -> Option<BytesMut>,
) -> io::Result<Pumped> {
    let mut input = BytesMut::new();
    loop {
        let mut output = tokio::select! {
            Some(added) = added.recv() => added,
            read = from.read_buf(&mut input) => match read? {
                0 => return Ok(Pumped::Ended),
                _ => match take(&mut input) {
                    Some(output) => output,
                    None => return Ok(Pumped::Lost),
                },
            },
        };
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        output.truncate(limit);
        limit -= output.len();
        to.write_all(&output).await?;
        if limit == 0 {
            return Ok(Pumped::Limit);
        }
    }
}

/// The messages that a Postgres client sends.
struct Frontend<'a> {
    shared: &'a Shared,
    said: &'a Mutex<HashMap<String, String>>,
    started: bool,
    losing: watch::Sender<bool>,
    /// The SQLSTATE of the statement being refused, until the client waits for the answer.
    refusing: Option<String>,
    own_answers: mpsc::UnboundedSender<BytesMut>,
}

impl Frontend<'_> {
    /// Takes the messages that have arrived completely.
    #[allow(clippy::unnecessary_wraps)] // `pump` takes an `Option`
    fn take(&mut self, input: &mut BytesMut) -> Option<BytesMut> {
        let mut output = BytesMut::new();
        loop {
            let kind = usize::from(self.started);
            let Some(length) = message_length(input, kind) else {
                return Some(output);
            };
            let message = input.split_to(kind + length);
            if self.started {
                self.look_at(message[0], &message[5..]);
                if self.refusing.is_none() {
                    output.extend_from_slice(&message);
                } else if matches!(message[0], b'S' | b'Q') {
                    self.refuse();
                }
            } else {
                self.started = true;
                output.extend_from_slice(&self.startup(&message));
            }
        }
    }

    fn startup(&self, message: &[u8]) -> BytesMut {
        let mut rewritten = BytesMut::from(&message[..8]);
        let mut parameters = message[8..].split(|byte| *byte == 0);
        while let (Some(name), Some(value)) = (parameters.next(), parameters.next()) {
            if name.is_empty() || (self.shared.drop_options && name == b"options") {
                continue;
            }
            for part in [name, value] {
                rewritten.extend_from_slice(part);
                rewritten.extend_from_slice(&[0]);
            }
        }
        rewritten.extend_from_slice(&[0]);
        let length = u32::try_from(rewritten.len()).unwrap();
        rewritten[..4].copy_from_slice(&length.to_be_bytes());
        rewritten
    }

    fn look_at(&mut self, kind: u8, body: &[u8]) {
        let mut texts = body
            .split(|byte| *byte == 0)
            .map(|text| String::from_utf8_lossy(text).into_owned());
        let mut next = || texts.next().unwrap_or_default();
        match kind {
            // Parse: the statement's name, then its text.
            b'P' => {
                let name = next();
                self.said.lock().unwrap().insert(name, next());
            }
            // Bind: the portal's name, then the statement's.
            b'B' => {
                let name = { (next(), next()).1 };
                let text = self.said.lock().unwrap().get(&name).cloned();
                self.carried_out(&text.unwrap_or_default());
            }
            // Query: its text.
            b'Q' => {
                let text = next();
                self.carried_out(&text);
                self.said.lock().unwrap().insert(text.clone(), text);
            }
            _ => {}
        }
    }

    /// Answers as the server would: `ErrorResponse`, then `ReadyForQuery`.
    fn refuse(&mut self) {
        let Some(code) = self.refusing.take() else {
            return;
        };
        let mut fields = Vec::new();
        for (kind, value) in [
            ('S', "ERROR"),
            ('V', "ERROR"),
            ('C', &code),
            ('M', "a fault for a test"),
        ] {
            fields.put_slice(&[kind as u8]);
            fields.put_slice(value.as_bytes());
            fields.put_u8(0);
        }
        fields.put_u8(0);
        let mut answer = BytesMut::new();
        answer.put_u8(b'E');
        answer.put_u32(u32::try_from(fields.len() + 4).unwrap());
        answer.put_slice(&fields);
        answer.put_slice(b"Z\0\0\0\x05I");
        self.shared.refused.fetch_add(1, Ordering::SeqCst);
        let _ = self.own_answers.send(answer);
    }

    fn carried_out(&mut self, text: &str) {
        let counting = self.shared.counting.lock().unwrap().clone();
        if !counting.is_empty() && text.contains(&counting) {
            self.shared.counted.fetch_add(1, Ordering::SeqCst);
        }
        if let Some((marker, code)) = &*self.shared.refusing.lock().unwrap() {
            if text.contains(&**marker) {
                self.refusing = Some(code.clone());
                return;
            }
        }
        let (marker, times) = &mut *self.shared.losing.lock().unwrap();
        if *times > 0 && text.contains(&**marker) {
            *times -= 1;
            self.losing.send_replace(true);
        }
    }
}

/// Waits for the whole answer, which the server sends after the commit, then ends the connection.
fn lose_answer(input: &mut BytesMut) -> Option<BytesMut> {
    while let Some(length) = message_length(input, 1) {
        let kind = input[0];
        input.advance(1 + length);
        // ReadyForQuery
        if kind == b'Z' {
            return None;
        }
    }
    Some(BytesMut::new())
}

/// The length field of a message that has arrived completely.
fn message_length(input: &[u8], kind: usize) -> Option<usize> {
    let length = input.get(kind..kind + 4)?;
    let length = u32::from_be_bytes(length.try_into().ok()?) as usize;
    (input.len() >= kind + length).then_some(length)
}
