//! Watches: every event after the asked revision once and in order, or an honest 410. A session
//! pulls from the shared history when its client takes bytes, so a slow client delays nobody.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream;
use jiff::Timestamp;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::list::{include, invalid_option, revision};
use super::metrics::Metrics;
use super::negotiate::Form;
use super::request::{Query, Target};
use super::respond::{self, Answer};
use crate::limits::{BOOKMARK_SECS, PIECE_BYTES, WATCH_TIMEOUT_MIN_SECS};
use crate::registry::{Registry, Start, select};
use crate::resource::table::{self, IncludeObject};
use crate::resource::{ApiError, Kind, Selectors};
use crate::store::{Change, Event, Expired, Object, Rev, Watch};

/// How a watch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Opening {
    /// Events of the state that is there.
    initial: bool,
    /// After them a bookmark that says so.
    mark_end: bool,
    /// Revision that the client knows.
    rev: Rev,
}

fn opening(query: &Query) -> Result<Opening, ApiError> {
    let rev = revision(query)?.unwrap_or(0);
    let matching = query.get("resourceVersionMatch");
    let bookmarks = query.flag("allowWatchBookmarks")?.unwrap_or(false);
    match query.flag("sendInitialEvents")? {
        None if matching.is_some() => {
            let why =
                "Forbidden: resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
            Err(invalid_option("resourceVersionMatch", why))
        }
        None => Ok(Opening { initial: rev == 0, mark_end: false, rev }),
        Some(_) if matching != Some("NotOlderThan") => {
            let why = "Forbidden: sendInitialEvents requires resourceVersionMatch to be \"NotOlderThan\"";
            Err(invalid_option("resourceVersionMatch", why))
        }
        Some(initial) => Ok(Opening { initial, mark_end: initial && bookmarks, rev }),
    }
}

/// Counts a watch for as long as it lives.
struct Counted(Arc<Metrics>);

impl Counted {
    fn new(metrics: Arc<Metrics>) -> Self {
        metrics.watches.fetch_add(1, Ordering::Relaxed);
        Self(metrics)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Session {
    kind: &'static Kind,
    selectors: Selectors,
    watch: Watch,
    initial: std::vec::IntoIter<Arc<Object>>,
    mark_end: bool,
    bookmarks: bool,
    renderer: Renderer,
    deadline: Instant,
    next_bookmark: Instant,
    shutdown: CancellationToken,
    over: bool,
    _counted: Counted,
}

/// Answers a watch.
pub(super) async fn watch(
    registry: &Registry,
    target: &Target,
    query: &Query,
    form: Form,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) -> Result<Answer, ApiError> {
    let kind = target.kind;
    let selectors = Selectors::parse(kind, query.get("labelSelector"), query.get("fieldSelector"))?;
    let namespace = target.namespace.as_deref();
    let opening = opening(query)?;
    let seconds = query.number("timeoutSeconds")?.filter(|s| *s > 0);
    let renderer = Renderer { kind, form, include: include(query)?, columns_sent: false };
    registry.reach(opening.rev).await?;
    let (initial, start) = if opening.initial {
        let (objects, rev) = registry.list(kind, namespace, &selectors);
        (objects, Start::Rev(rev))
    } else if opening.rev == 0 {
        (Vec::new(), Start::Now)
    } else {
        (Vec::new(), Start::Rev(opening.rev))
    };
    let now = Instant::now();
    let session = Session {
        kind,
        selectors,
        watch: registry.watch(kind, namespace, start)?,
        initial: initial.into_iter(),
        mark_end: opening.mark_end,
        bookmarks: query.flag("allowWatchBookmarks")?.unwrap_or(false),
        renderer,
        deadline: now + lifetime(seconds),
        next_bookmark: now + bookmark_interval(),
        shutdown,
        over: false,
        _counted: Counted::new(metrics),
    };
    Ok(respond::stream(stream::unfold(session, |mut session| async move {
        let piece = session.next().await?;
        Some((Ok(piece), session))
    })))
}

fn lifetime(seconds: Option<u64>) -> Duration {
    // Spread, so that the clients of a restarted server don't all come back at once for ever.
    let spread = || rand::random_range(WATCH_TIMEOUT_MIN_SECS..2 * WATCH_TIMEOUT_MIN_SECS);
    Duration::from_secs(seconds.unwrap_or_else(spread).min(24 * 3600))
}

fn bookmark_interval() -> Duration {
    Duration::from_secs(BOOKMARK_SECS).mul_f64(rand::random_range(0.75..1.0))
}

impl Session {
    /// The next bytes of the stream; `None` at its end.
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let mut out = BytesMut::new();
        for object in self.initial.by_ref() {
            self.renderer.event(&mut out, Change::Added, &object);
            if out.len() >= PIECE_BYTES {
                return Some(out.freeze());
            }
        }
        if std::mem::take(&mut self.mark_end) {
            self.bookmark(&mut out, true);
        }
        if !out.is_empty() {
            return Some(out.freeze());
        }
        loop {
            let wake = self.deadline.min(if self.bookmarks { self.next_bookmark } else { self.deadline });
            let events = tokio::select! {
                events = self.watch.next() => events,
                () = tokio::time::sleep_until(wake) => self.watch.poll(),
                () = self.shutdown.cancelled() => {
                    self.over = true;
                    self.watch.poll()
                }
            };
            self.render(&mut out, events);
            let now = Instant::now();
            if now >= self.deadline {
                self.over = true;
            }
            if self.bookmarks && (self.over || now >= self.next_bookmark) {
                self.bookmark(&mut out, false);
                self.next_bookmark = now + bookmark_interval();
            }
            if !out.is_empty() {
                return Some(out.freeze());
            }
            if self.over {
                return None;
            }
        }
    }

    fn render(&mut self, out: &mut BytesMut, events: Result<Vec<Arc<Event>>, Expired>) {
        match events {
            Ok(events) => {
                for event in events {
                    self.event(out, &event);
                }
            }
            Err(expired) => {
                let status = ApiError::expired(expired.to_string()).to_status();
                frame(out, "ERROR", status.to_string().as_bytes());
                self.over = true;
                self.bookmarks = false;
            }
        }
    }

    fn event(&mut self, out: &mut BytesMut, event: &Event) {
        match (select(event, &self.selectors), event.change, &event.prev) {
            (None, _, _) => {}
            // It stopped to match: what the client knew goes, at the revision of the change.
            (Some(Change::Deleted), Change::Modified, Some(prev)) => {
                let gone = prev.at_rev(event.rev(), event.object.written_secs);
                self.renderer.event(out, Change::Deleted, &gone);
            }
            (Some(change), _, _) => self.renderer.event(out, change, &event.object),
        }
    }

    fn bookmark(&self, out: &mut BytesMut, end_of_initial: bool) {
        let mut object = json!({
            "kind": self.kind.kind,
            "apiVersion": self.kind.api_version(),
            "metadata": {"resourceVersion": self.watch.rev().to_string()},
        });
        if end_of_initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        frame(out, "BOOKMARK", object.to_string().as_bytes());
    }
}

/// Writes events in the form that was asked for.
struct Renderer {
    kind: &'static Kind,
    form: Form,
    include: IncludeObject,
    columns_sent: bool,
}

impl Renderer {
    fn event(&mut self, out: &mut BytesMut, change: Change, object: &Object) {
        let name = match change {
            Change::Added => "ADDED",
            Change::Modified => "MODIFIED",
            Change::Deleted => "DELETED",
        };
        match self.form {
            Form::Plain => frame(out, name, &object.bytes),
            Form::Table => {
                let columns = if std::mem::replace(&mut self.columns_sent, true) {
                    json!([])
                } else {
                    table::columns(self.kind)
                };
                let row = table::row(self.kind, &object.value(), Timestamp::now(), self.include);
                let table = json!({
                    "kind": "Table", "apiVersion": "meta.k8s.io/v1",
                    "metadata": {"resourceVersion": object.rev.to_string()},
                    "columnDefinitions": columns, "rows": [row],
                });
                frame(out, name, table.to_string().as_bytes());
            }
        }
    }
}

fn frame(out: &mut BytesMut, kind: &str, object: &[u8]) {
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    out.extend_from_slice(object);
    out.extend_from_slice(b"}\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(query: &str) -> Result<Opening, u16> {
        opening(&Query::parse(Some(query)).unwrap()).map_err(|e| e.code)
    }

    #[test]
    fn openings() {
        let opening = |initial, mark_end, rev| Ok(Opening { initial, mark_end, rev });
        assert_eq!(of(""), opening(true, false, 0));
        assert_eq!(of("resourceVersion=0"), opening(true, false, 0));
        assert_eq!(of("resourceVersion=5"), opening(false, false, 5));
        let wanted = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan";
        assert_eq!(of(&format!("{wanted}&allowWatchBookmarks=true")), opening(true, true, 0));
        assert_eq!(of(wanted), opening(true, false, 0));
        assert_eq!(of("sendInitialEvents=false&resourceVersionMatch=NotOlderThan"), opening(false, false, 0));
        assert_eq!(of("sendInitialEvents=true"), Err(422));
        assert_eq!(of("resourceVersionMatch=NotOlderThan"), Err(422));
    }
}
