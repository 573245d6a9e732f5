//! Lists: a page is of exactly one revision, whichever revision the client meant, and goes out in
//! pieces so that a large one is never in memory twice.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream;
use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::negotiate::Form;
use super::request::{Query, Target};
use super::respond::{self, Answer};
use crate::limits::PIECE_BYTES;
use crate::registry::Registry;
use crate::resource::table::{self, IncludeObject};
use crate::resource::{ApiError, Cause, CauseReason, Kind, Selectors};
use crate::store::{Key, Object, Rev};

/// Which revision a list is to be of.
#[derive(Clone, Debug, PartialEq, Eq)]
enum At {
    /// What is there now, but not before this revision was reached.
    NotOlderThan(Rev),
    /// As it was.
    Exact(Rev),
    /// The rest of an earlier list: as it was, after this key.
    After(Rev, String),
}

/// A 422 for list or watch options.
pub(super) fn invalid_option(field: &str, message: &str) -> ApiError {
    let cause =
        Cause { reason: CauseReason::Forbidden, message: message.to_owned(), field: field.to_owned() };
    ApiError::invalid_as("meta.k8s.io", "ListOptions", "", vec![cause])
}

/// Reads `resourceVersion`; `None` when unset.
pub(super) fn revision(query: &Query) -> Result<Option<Rev>, ApiError> {
    let Some(text) = query.get("resourceVersion") else { return Ok(None) };
    text.parse()
        .map(Some)
        .map_err(|_| ApiError::bad_request(format!("Invalid value: resourceVersion={text:?}")))
}

fn at(query: &Query) -> Result<At, ApiError> {
    let rev = revision(query)?;
    let matching = query.get("resourceVersionMatch");
    if query.get("sendInitialEvents").is_some() {
        return Err(invalid_option(
            "sendInitialEvents",
            "Forbidden: sendInitialEvents is forbidden for list",
        ));
    }
    if let Some(token) = query.get("continue") {
        if matching.is_some() {
            let why = "Forbidden: resourceVersionMatch is forbidden when continue is provided";
            return Err(invalid_option("resourceVersionMatch", why));
        }
        if rev.is_some_and(|rev| rev != 0) {
            return Err(ApiError::bad_request(
                "specifying resource version is not allowed when using continue",
            ));
        }
        let (rev, start) = decode_continue(token).ok_or_else(|| {
            ApiError::bad_request("continue key is not valid: it was not given out by this server")
        })?;
        return Ok(At::After(rev, start));
    }
    match (matching, rev) {
        (None, None) => Ok(At::NotOlderThan(0)),
        (None | Some("NotOlderThan"), Some(rev)) => Ok(At::NotOlderThan(rev)),
        (Some("Exact"), Some(0)) => {
            let why = "Forbidden: resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"";
            Err(invalid_option("resourceVersionMatch", why))
        }
        (Some("Exact"), Some(rev)) => Ok(At::Exact(rev)),
        (Some(_), None) => {
            let why = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided";
            Err(invalid_option("resourceVersionMatch", why))
        }
        (Some(other), Some(_)) => {
            let why = format!("Unsupported value: {other:?}: supported values: \"Exact\", \"NotOlderThan\"");
            Err(invalid_option("resourceVersionMatch", &why))
        }
    }
}

fn encode_continue(rev: Rev, start: &Key) -> String {
    let token = json!({"v": "meta.k8s.io/v1", "rv": rev, "start": start.as_str()});
    URL_SAFE_NO_PAD.encode(token.to_string())
}

fn decode_continue(token: &str) -> Option<(Rev, String)> {
    let bytes = URL_SAFE_NO_PAD.decode(token.trim_end_matches('=')).ok()?;
    let token: Value = serde_json::from_slice(&bytes).ok()?;
    (token.get("v")? == "meta.k8s.io/v1").then_some(())?;
    Some((token.get("rv")?.as_u64()?, token.get("start")?.as_str()?.to_owned()))
}

/// Reads `includeObject` of a table request.
pub(super) fn include(query: &Query) -> Result<IncludeObject, ApiError> {
    match query.get("includeObject") {
        None | Some("Metadata") => Ok(IncludeObject::Metadata),
        Some("None") => Ok(IncludeObject::None),
        Some("Object") => Ok(IncludeObject::Object),
        Some(other) => Err(ApiError::bad_request(format!(
            "includeObject={other:?} is not supported: use \"None\", \"Metadata\" or \"Object\""
        ))),
    }
}

/// Answers a list.
pub(super) async fn list(
    registry: &Registry,
    target: &Target,
    query: &Query,
    form: Form,
) -> Result<Answer, ApiError> {
    let kind = target.kind;
    let selectors = Selectors::parse(kind, query.get("labelSelector"), query.get("fieldSelector"))?;
    let namespace = target.namespace.as_deref();
    let (mut objects, rev) = match at(query)? {
        At::NotOlderThan(rev) => {
            registry.reach(rev).await?;
            registry.list(kind, namespace, &selectors)
        }
        At::Exact(rev) => {
            registry.reach(rev).await?;
            (registry.list_at(kind, namespace, &selectors, rev)?, rev)
        }
        At::After(rev, start) => {
            registry.reach(rev).await?;
            let mut objects = registry.list_at(kind, namespace, &selectors, rev)?;
            objects.retain(|object| object.key.as_str() > start.as_str());
            (objects, rev)
        }
    };
    let mut metadata = json!({"resourceVersion": rev.to_string()});
    let limit = usize::try_from(query.number("limit")?.unwrap_or(0)).unwrap_or(usize::MAX);
    if limit > 0 && objects.len() > limit {
        let rest = objects.len() - limit;
        objects.truncate(limit);
        if let Some(last) = objects.last() {
            metadata["continue"] = encode_continue(rev, &last.key).into();
        }
        if selectors.is_everything() {
            metadata["remainingItemCount"] = rest.into();
        }
    }
    Ok(match form {
        Form::Plain => plain(kind, &metadata, objects),
        Form::Table => rows(kind, &metadata, objects, include(query)?),
    })
}

/// One object as a table.
pub(super) fn single(kind: &'static Kind, object: Arc<Object>, include: IncludeObject) -> Answer {
    let metadata = json!({"resourceVersion": object.rev.to_string()});
    rows(kind, &metadata, vec![object], include)
}

/// Objects as a plain list.
pub(super) fn plain(kind: &'static Kind, metadata: &Value, objects: Vec<Arc<Object>>) -> Answer {
    let head = format!(
        "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
        kind.list_kind(),
        kind.api_version()
    );
    pieces(head, objects, "]}\n", |object, out| out.extend_from_slice(&object.bytes))
}

fn rows(kind: &'static Kind, metadata: &Value, objects: Vec<Arc<Object>>, include: IncludeObject) -> Answer {
    let head = format!(
        "{{\"kind\":\"Table\",\"apiVersion\":\"meta.k8s.io/v1\",\"metadata\":{metadata},\
         \"columnDefinitions\":{},\"rows\":[",
        table::columns(kind)
    );
    let now = Timestamp::now();
    pieces(head, objects, "]}\n", move |object, out| {
        let row = table::row(kind, &object.value(), now, include);
        out.extend_from_slice(row.to_string().as_bytes());
    })
}

/// Joins the items with commas; what fits into one piece is sent whole.
fn pieces(
    head: String,
    objects: Vec<Arc<Object>>,
    tail: &'static str,
    render: impl Fn(&Object, &mut BytesMut) + Send + 'static,
) -> Answer {
    let mut buffer = BytesMut::from(head.as_bytes());
    let mut rest = objects.into_iter();
    let mut first = true;
    let mut fill = move |buffer: &mut BytesMut| {
        for object in rest.by_ref() {
            if !std::mem::take(&mut first) {
                buffer.put_u8(b',');
            }
            render(&object, buffer);
            if buffer.len() >= PIECE_BYTES {
                return true;
            }
        }
        buffer.extend_from_slice(tail.as_bytes());
        false
    };
    if !fill(&mut buffer) {
        return respond::json_bytes(StatusCode::OK, buffer.freeze());
    }
    let more = stream::unfold(Some((buffer, fill)), |state| async move {
        let (mut buffer, mut fill) = state?;
        let piece: Bytes = buffer.split().freeze();
        let more = fill(&mut buffer);
        let last = (!more).then(|| buffer.split().freeze());
        let pieces = [Some(piece), last];
        Some((stream::iter(pieces.into_iter().flatten().map(Ok)), more.then_some((buffer, fill))))
    });
    respond::stream(futures::StreamExt::flatten(more))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(query: &str) -> Result<At, u16> {
        at(&Query::parse(Some(query)).unwrap()).map_err(|e| e.code)
    }

    #[test]
    fn the_revision_that_is_meant() {
        assert_eq!(of(""), Ok(At::NotOlderThan(0)));
        assert_eq!(of("resourceVersion=0"), Ok(At::NotOlderThan(0)));
        assert_eq!(of("resourceVersion=7"), Ok(At::NotOlderThan(7)));
        assert_eq!(of("resourceVersion=7&resourceVersionMatch=Exact"), Ok(At::Exact(7)));
        assert_eq!(of("resourceVersionMatch=Exact"), Err(422));
        assert_eq!(of("resourceVersion=0&resourceVersionMatch=Exact"), Err(422));
        assert_eq!(of("resourceVersion=7&resourceVersionMatch=Sometimes"), Err(422));
        assert_eq!(of("resourceVersion=x"), Err(400));
        assert_eq!(of("sendInitialEvents=true"), Err(422));
        let token = encode_continue(9, &Key::new("pods", "n", "p"));
        assert_eq!(of(&format!("continue={token}")), Ok(At::After(9, "/registry/pods/n/p".to_owned())));
        assert_eq!(of(&format!("continue={token}&resourceVersion=3")), Err(400));
        assert_eq!(of("continue=nonsense"), Err(400));
    }
}
