//! A connection to an agent. Invariant: it never makes the shim wait: what cannot be written stays in a
//! bounded buffer, and a peer that reads nothing is dropped.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use super::super::protocol::{Call, Message, decode, encode};

/// Twice the longest message, and some.
const UNSENT_BYTES_MAX: usize = 9 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    received: Vec<u8>,
    unsent: Vec<u8>,
    /// True once the peer said `Hello`: it gets events from then on.
    pub(super) listening: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        Ok(Connection { stream, received: Vec::new(), unsent: Vec::new(), listening: false })
    }

    /// Reads what is there; the calls that are complete. `Err` means that the connection is over.
    pub(super) fn receive(&mut self) -> io::Result<Vec<Call>> {
        let mut buffer = [0u8; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.received.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let mut calls = Vec::new();
        while let Some(call) = decode(&mut self.received)? {
            calls.push(call);
        }
        if self.received.is_empty() {
            self.received = Vec::new();
        }
        Ok(calls)
    }

    pub(super) fn send(&mut self, message: &Message) -> io::Result<()> {
        self.unsent.extend_from_slice(&encode(message)?);
        self.flush()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.unsent.is_empty() {
            self.unsent = Vec::new();
        }
        if self.unsent.len() > UNSENT_BYTES_MAX { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }
}
