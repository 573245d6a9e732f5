//! Answers: every body is JSON (a log is text), every failure is a Status.

use std::convert::Infallible;

use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::Value;

use crate::resource::ApiError;

/// Why a streamed body broke off.
pub(super) type BodyError = Box<dyn std::error::Error + Send + Sync>;
/// Any body.
pub(super) type Body = UnsyncBoxBody<Bytes, BodyError>;
/// Any answer.
pub(super) type Answer = Response<Body>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// JSON that is ready to be sent.
pub(super) fn json_bytes(status: StatusCode, bytes: Bytes) -> Answer {
    let mut answer = Response::new(full(bytes));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    answer
}

/// A JSON value.
pub(super) fn json(status: StatusCode, value: &Value) -> Answer {
    json_bytes(status, value.to_string().into())
}

/// Plain text.
pub(super) fn text(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(full(text.into()));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

/// JSON in pieces.
pub(super) fn stream(pieces: impl Stream<Item = Result<Bytes, BodyError>> + Send + 'static) -> Answer {
    use futures::StreamExt;
    let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data)));
    let mut answer = Response::new(BodyExt::boxed_unsync(body));
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    answer
}

/// A failure as a Status.
pub(super) fn error(error: &ApiError) -> Answer {
    let status = StatusCode::from_u16(error.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut answer = json(status, &error.to_status());
    let retry = error.details.as_ref().and_then(|d| d.retry_after_seconds);
    if let Some(seconds) = retry {
        answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        // The rest of the body is still on its way; it isn't worth reading.
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}
