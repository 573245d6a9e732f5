//! The gap trick: an object's bytes are serialised once by the caller, and the writer only fills
//! in the digits of `metadata.resourceVersion`, so what is stored is what is served.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::{Draft, Key, Object, Rev};
use crate::resource::ObjectIndex;

const REV_FIELD: &[u8] = b"\"resourceVersion\":\"";

impl Draft {
    /// Serialises an object. Whatever `metadata.resourceVersion` it has is left out. `None` when
    /// it isn't a JSON object with an object as `metadata`.
    pub fn new(value: &Value, index: ObjectIndex) -> Option<Self> {
        let top = value.as_object()?;
        let metadata = top.get("metadata")?.as_object()?;
        let mut bytes = Vec::with_capacity(1024);
        bytes.extend_from_slice(b"{\"metadata\":{");
        bytes.extend_from_slice(REV_FIELD);
        let rev_at = u32::try_from(bytes.len()).ok()?;
        bytes.push(b'"');
        for (key, member) in metadata.iter().filter(|(key, _)| *key != "resourceVersion") {
            put_member(&mut bytes, key, member)?;
        }
        bytes.push(b'}');
        for (key, member) in top.iter().filter(|(key, _)| *key != "metadata") {
            put_member(&mut bytes, key, member)?;
        }
        bytes.push(b'}');
        Some(Self { bytes, rev_at, index })
    }

    /// Size of the serialised object in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Never: an object has at least its metadata.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The object as it would be created: without a revision (0 stands for none).
    pub fn without_rev(self, key: Key) -> Object {
        let at = self.rev_at as usize;
        let (head, tail) = (&self.bytes[..at - REV_FIELD.len()], &self.bytes[at + 1..]);
        let tail = tail.strip_prefix(b",").unwrap_or(tail);
        let bytes = [head, tail].concat().into();
        Object { key, rev: 0, bytes, index: self.index, written_secs: 0, rev_at: 0 }
    }

    /// The object as it would be stored at `rev`.
    pub fn finish(self, key: Key, rev: Rev, written_secs: u64) -> Object {
        let at = self.rev_at as usize;
        let bytes = splice(&self.bytes[..at], rev, &self.bytes[at..]);
        Object { key, rev, bytes, index: self.index, written_secs, rev_at: self.rev_at }
    }
}

impl Object {
    /// Parses the object.
    pub fn value(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_default()
    }

    /// The same object under another revision.
    pub(crate) fn at_rev(&self, rev: Rev, written_secs: u64) -> Self {
        let at = self.rev_at as usize;
        let digits = self.bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
        Self {
            key: self.key.clone(),
            rev,
            bytes: splice(&self.bytes[..at], rev, &self.bytes[at + digits..]),
            index: self.index.clone(),
            written_secs,
            rev_at: self.rev_at,
        }
    }

    /// Puts an object together from what the engine kept; `None` when the parts don't fit.
    pub(super) fn from_parts(
        key: Key,
        rev: Rev,
        bytes: Bytes,
        index: ObjectIndex,
        written_secs: u64,
        rev_at: u32,
    ) -> Option<Arc<Self>> {
        let digits = rev.to_string();
        let there = bytes.get(rev_at as usize..rev_at as usize + digits.len())?;
        (there == digits.as_bytes()).then(|| Arc::new(Self { key, rev, bytes, index, written_secs, rev_at }))
    }

    /// Offset of the revision's digits in the bytes.
    pub(super) fn rev_at(&self) -> u32 {
        self.rev_at
    }
}

fn put_member(out: &mut Vec<u8>, key: &str, value: &Value) -> Option<()> {
    out.push(b',');
    serde_json::to_writer(&mut *out, key).ok()?;
    out.push(b':');
    serde_json::to_writer(out, value).ok()
}

fn splice(head: &[u8], rev: Rev, tail: &[u8]) -> Bytes {
    let digits = rev.to_string();
    let mut out = Vec::with_capacity(head.len() + digits.len() + tail.len());
    out.extend_from_slice(head);
    out.extend_from_slice(digits.as_bytes());
    out.extend_from_slice(tail);
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_gap_takes_any_revision_and_nothing_else_changes() {
        let mut value = json!({"kind": "ConfigMap", "apiVersion": "v1", "data": {"resourceVersion": "x"},
            "metadata": {"name": "a\"b", "resourceVersion": "17", "labels": {"l": "é"}}});
        let draft = Draft::new(&value, ObjectIndex::default()).unwrap();
        let key = Key::new("configmaps", "d", "a");
        let none = draft.clone().without_rev(key.clone());
        let mut bare = value.clone();
        bare["metadata"].as_object_mut().unwrap().remove("resourceVersion");
        assert_eq!(none.value(), bare);
        let object = draft.finish(key, 9, 0);
        value["metadata"]["resourceVersion"] = json!("9");
        assert_eq!(object.value(), value);
        let later = object.at_rev(123_456, 1);
        value["metadata"]["resourceVersion"] = json!("123456");
        assert_eq!(later.value(), value);
        assert_eq!(later.rev, 123_456);
    }

    #[test]
    fn what_has_no_metadata_is_refused() {
        assert!(Draft::new(&json!({"kind": "Pod"}), ObjectIndex::default()).is_none());
        assert!(Draft::new(&json!([1]), ObjectIndex::default()).is_none());
    }
}
