//! One HTTP/2 connection that does what no client would: it is silent, stops in the middle, or does not read.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// The largest frame that everybody takes.
const FRAME_BYTES: usize = 16_384;

/// What a new stream and a new connection may send.
const WINDOW: i64 = 65_535;

/// How long the other side may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Raw {
    socket: TcpStream,
    next_stream: u32,
    /// What the connection and the last stream may still send.
    windows: [i64; 2],
    initial_window: i64,
}

/// What came from the other side.
#[derive(Debug, PartialEq)]
pub(crate) enum Frame {
    /// A stream's last frame, or its reset.
    End(u32),
    Data(u32, usize),
    /// The answer to a ping.
    Pong,
    Other,
    /// The connection is closed.
    Closed,
}

impl Raw {
    /// Says nothing yet. `target` is `http://host:port`.
    pub(crate) fn silent(target: &str) -> Raw {
        let socket = TcpStream::connect(target.trim_start_matches("http://")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Raw { socket, next_stream: 1, windows: [WINDOW; 2], initial_window: WINDOW }
    }

    /// Greets, and asks nothing.
    pub(crate) fn greeting(target: &str) -> Raw {
        let mut raw = Raw::silent(target);
        raw.socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        raw.frame(SETTINGS, 0, 0, &[]);
        raw
    }

    /// Begins a call.
    pub(crate) fn open(&mut self, path: &str) -> u32 {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.windows[1] = self.initial_window;
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "test"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        let mut block = Vec::new();
        for (name, value) in fields {
            // A literal that is not indexed, with both texts as they are.
            block.extend([0, name.len() as u8]);
            block.extend(name.as_bytes());
            block.push(value.len() as u8);
            block.extend(value.as_bytes());
        }
        self.frame(HEADERS, END_HEADERS, stream, &block);
        stream
    }

    /// Sends bytes of the last call that was begun, as the other side makes room; how many until it ended the call.
    pub(crate) fn send(&mut self, stream: u32, bytes: &[u8]) -> usize {
        let mut sent = 0;
        while sent < bytes.len() {
            let room = self.windows[0].min(self.windows[1]);
            if room <= 0 {
                match self.next() {
                    Frame::End(ended) if ended == stream => return sent,
                    Frame::Closed => return sent,
                    _ => continue,
                }
            }
            let part = (bytes.len() - sent).min(FRAME_BYTES).min(room as usize);
            self.windows = self.windows.map(|window| window - part as i64);
            self.frame(DATA, 0, stream, &bytes[sent..sent + part]);
            sent += part;
        }
        sent
    }

    /// Says that the call has all that it needs.
    pub(crate) fn finish(&mut self, stream: u32) {
        self.frame(DATA, END_STREAM, stream, &[]);
    }

    /// The next frame; answers pings and settings as anybody does.
    pub(crate) fn next(&mut self) -> Frame {
        let mut head = [0; 9];
        if self.socket.read_exact(&mut head).is_err() {
            return Frame::Closed;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        let (kind, flags) = (head[3], head[4]);
        let mut body = vec![0; length];
        if self.socket.read_exact(&mut body).is_err() {
            return Frame::Closed;
        }
        match kind {
            SETTINGS if flags & ACK == 0 => {
                for setting in body.chunks_exact(6).filter(|setting| setting[..2] == [0, 4]) {
                    let window = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]) as i64;
                    self.windows[1] += window - self.initial_window;
                    self.initial_window = window;
                }
                self.frame(SETTINGS, ACK, 0, &[]);
            }
            PING if flags & ACK == 0 => self.frame(PING, ACK, 0, &body),
            PING => return Frame::Pong,
            WINDOW_UPDATE => {
                let more = u32::from_be_bytes([body[0], body[1], body[2], body[3]]) as i64;
                self.windows[(stream != 0) as usize] += more;
            }
            GOAWAY => return Frame::Closed,
            DATA => return Frame::Data(stream, length),
            RESET => return Frame::End(stream),
            HEADERS if flags & END_STREAM != 0 => return Frame::End(stream),
            _ => {}
        }
        Frame::Other
    }

    /// Waits until the other side has read what was sent.
    pub(crate) fn settle(&mut self) {
        self.frame(PING, 0, 0, &[0; 8]);
        loop {
            match self.next() {
                Frame::Pong => return,
                Frame::Closed => panic!("the connection was closed"),
                _ => {}
            }
        }
    }

    /// Whether the call ends, and does not wait for ever.
    pub(crate) fn ends(&mut self, stream: u32) -> bool {
        loop {
            match self.next() {
                Frame::End(ended) if ended == stream => return true,
                Frame::Closed => return false,
                _ => {}
            }
        }
    }

    /// Whether the connection is closed by the other side.
    pub(crate) fn is_closed(&mut self) -> bool {
        loop {
            let mut byte = [0; 4096];
            match self.socket.read(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, body: &[u8]) {
        let mut frame = (body.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(body);
        // That the other side has closed is seen when reading.
        let _ = self.socket.write_all(&frame);
    }
}

/// The header of a message of so many bytes.
pub(crate) fn header(bytes: u32) -> Vec<u8> {
    [&[0], &bytes.to_be_bytes()[..]].concat()
}
