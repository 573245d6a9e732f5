//! As much of HTTP/1.1 as both sides need. Every read has a bound: a peer can make nobody hold more than
//! [`HEAD_BYTES_MAX`] and [`BODY_BYTES_MAX`].

use std::io::{self, BufRead, Read, Write};

/// Longest request or status line with all its headers.
const HEAD_BYTES_MAX: u64 = 16 << 10;
/// Longest body.
const BODY_BYTES_MAX: u64 = 1 << 20;

/// The first line of a message, what its headers say about its end, and its body.
pub(crate) struct Message {
    pub(crate) first: String,
    pub(crate) close: bool,
    pub(crate) body: Vec<u8>,
}

/// Reads one message; `None` if the peer closed before one began.
pub(crate) fn read(stream: &mut impl BufRead) -> io::Result<Option<Message>> {
    let mut head = stream.by_ref().take(HEAD_BYTES_MAX);
    let mut first = String::new();
    if head.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let (mut close, mut length) = (first.trim_end().ends_with("HTTP/1.0"), 0);
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Err(bad("the head is cut off or too long"));
        }
        if line.trim_end().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without a colon"))?;
        match name.trim().to_ascii_lowercase().as_str() {
            "content-length" => {
                length = value.trim().parse().map_err(|_| bad("content-length is no number"))?
            }
            "connection" => close = value.trim().eq_ignore_ascii_case("close"),
            "transfer-encoding" => return Err(bad("transfer encodings are not supported")),
            _ => {}
        }
    }
    if length > BODY_BYTES_MAX {
        return Err(bad("the body is too long"));
    }
    let mut body = Vec::new();
    stream.by_ref().take(length).read_to_end(&mut body)?;
    if body.len() as u64 != length {
        return Err(bad("the body is cut off"));
    }
    Ok(Some(Message { first: first.trim_end().to_owned(), close, body }))
}

/// Writes an answer in one piece.
pub(crate) fn answer(stream: &mut impl Write, status: &str, body: &str, close: bool) -> io::Result<()> {
    let kind = if body.starts_with('{') { "application/json" } else { "text/plain" };
    let connection = if close { "close" } else { "keep-alive" };
    let length = body.len();
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes())
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_reads_back() {
        let mut bytes = Vec::new();
        answer(&mut bytes, "200 OK", "hello", true).expect("write to memory");
        let message = read(&mut bytes.as_slice()).expect("it parses").expect("it is there");
        assert_eq!(
            (message.first.as_str(), message.close, message.body.as_slice()),
            ("HTTP/1.1 200 OK", true, &b"hello"[..])
        );
    }

    #[test]
    fn junk_is_refused() {
        assert!(read(&mut &b""[..]).expect("closed is fine").is_none());
        for junk in ["GET / HTTP/1.1\r\n", "GET /\r\nnocolon\r\n\r\n", "POST /\r\nContent-Length: x\r\n\r\n"]
        {
            assert!(read(&mut junk.as_bytes()).is_err(), "{junk:?}");
        }
        let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(HEAD_BYTES_MAX as usize));
        assert!(read(&mut long.as_bytes()).is_err());
        assert!(read(&mut &b"POST / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n"[..]).is_err());
    }
}
