//! A server without an HTTP library. It keeps the bytes of each request, and answers with given
//! bytes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// The bytes that the server sends back.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub bytes: Vec<u8>,
    /// Whether the end of the connection ends the response.
    pub close: bool,
}

pub struct RawServer {
    pub addr: SocketAddr,
    answer: Arc<Mutex<Answer>>,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    accepting: JoinHandle<()>,
}

impl RawServer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(Answer::default()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (answers, record) = (Arc::clone(&answer), Arc::clone(&seen));
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (answers, record) = (Arc::clone(&answers), Arc::clone(&record));
                // Clients may cut the connection.
                tokio::spawn(async move { serve(stream, &answers, &record).await.ok() });
            }
        });
        Self {
            addr,
            answer,
            seen,
            accepting,
        }
    }

    /// Sets the answer to all later requests.
    pub fn answer(&self, answer: &Answer) {
        self.answer.lock().unwrap().clone_from(answer);
    }

    /// The requests since the last call, with everything but printable ASCII escaped.
    pub fn take_seen(&self) -> Vec<String> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        seen.iter()
            .map(|request| request.escape_ascii().to_string())
            .collect()
    }
}

impl Drop for RawServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    answer: &Mutex<Answer>,
    seen: &Mutex<Vec<Vec<u8>>>,
) -> std::io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        let request = loop {
            if let Some(len) = request_len(&buffer) {
                break buffer.split_to(len);
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                if buffer.has_remaining() {
                    seen.lock().unwrap().push(buffer.to_vec());
                }
                return Ok(());
            }
        };
        seen.lock().unwrap().push(request.to_vec());
        let answer = answer.lock().unwrap().clone();
        stream.write_all(&answer.bytes).await?;
        if answer.close {
            return stream.shutdown().await;
        }
    }
}

/// The length of the first request in the buffer, once it is complete. A body must come with a
/// `content-length`.
fn request_len(buffer: &[u8]) -> Option<usize> {
    let head = buffer.windows(4).position(|end| end == b"\r\n\r\n")? + 4;
    let body = buffer[..head]
        .split(|byte| *byte == b'\n')
        .find_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let (name, value) = line.split_at(colon);
            let value = std::str::from_utf8(&value[1..]).ok()?;
            name.eq_ignore_ascii_case(b"content-length")
                .then(|| value.trim().parse::<usize>().ok())?
        })
        .unwrap_or(0);
    (buffer.len() >= head + body).then_some(head + body)
}
