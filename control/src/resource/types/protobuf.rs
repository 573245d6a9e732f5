//! Requests in protobuf, turned into the JSON that they mean. kubectl sends its typed writes in this form; answers
//! are always JSON, which every client takes. Nothing here trusts a length.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value};
use thiserror::Error;

use super::{Field, Shape, Type, index_of, message};
use crate::resource::object;

/// The media type of such a body.
pub const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

/// The four bytes that every such body starts with.
const MAGIC: &[u8; 4] = b"k8s\0";

/// Why a body could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtobufError {
    /// Not the envelope that Kubernetes puts around objects.
    #[error("the body does not start with the bytes of a Kubernetes protobuf object")]
    Magic,
    /// Ends in the middle, or a number or length is impossible.
    #[error("malformed protobuf in {message}")]
    Malformed {
        /// The message that was being read.
        message: &'static str,
    },
    /// Text that is not UTF-8.
    #[error("field {field} of {message} is not UTF-8 text")]
    Utf8 {
        /// The message.
        message: &'static str,
        /// The field.
        field: &'static str,
    },
    /// The object's kind has no table.
    #[error("objects of kind {kind:?} in {api_version:?} are not served")]
    UnknownKind {
        /// `apiVersion` of the object.
        api_version: String,
        /// Its kind.
        kind: String,
    },
    /// Encoded in a way that is not understood.
    #[error("content encoding {encoding:?} inside a protobuf object is not supported")]
    Encoding {
        /// What the envelope names.
        encoding: String,
    },
}

/// Reads a body. The result has `apiVersion` and `kind` and is as unchecked as any other JSON body.
pub fn to_json(body: &[u8]) -> Result<Value, ProtobufError> {
    let envelope = body.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?;
    let mut reader = Reader { bytes: envelope, message: "the envelope" };
    let (mut api_version, mut kind, mut raw, mut encoding) =
        (String::new(), String::new(), &[][..], String::new());
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Bytes(meta)) => {
                let mut meta = Reader { bytes: meta, message: "the envelope" };
                while let Some((number, wire)) = meta.next()? {
                    match (number, wire) {
                        (1, Wire::Bytes(b)) => api_version = meta.text(b, "apiVersion")?.to_owned(),
                        (2, Wire::Bytes(b)) => kind = meta.text(b, "kind")?.to_owned(),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(b)) => raw = b,
            (3, Wire::Bytes(b)) => encoding = reader.text(b, "contentEncoding")?.to_owned(),
            _ => {}
        }
    }
    if !encoding.is_empty() {
        return Err(ProtobufError::Encoding { encoding });
    }
    let index = index_of(&kind).filter(|_| !api_version.is_empty());
    let Some(index) = index else { return Err(ProtobufError::UnknownKind { api_version, kind }) };
    let mut map = Map::new();
    read_message(index, raw, &mut map)?;
    map.insert("apiVersion".to_owned(), Value::String(api_version));
    map.insert("kind".to_owned(), Value::String(kind));
    Ok(Value::Object(map))
}

enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// 32 or 64 bits; no field here has them.
    Fixed,
}

struct Reader<'a> {
    bytes: &'a [u8],
    message: &'static str,
}

impl<'a> Reader<'a> {
    fn malformed(&self) -> ProtobufError {
        ProtobufError::Malformed { message: self.message }
    }

    fn varint(&mut self) -> Result<u64, ProtobufError> {
        let mut value = 0_u64;
        for (i, byte) in self.bytes.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte & 0x80 == 0 {
                self.bytes = &self.bytes[i + 1..];
                return Ok(value);
            }
        }
        Err(self.malformed())
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], ProtobufError> {
        let count =
            usize::try_from(count).ok().filter(|n| *n <= self.bytes.len()).ok_or_else(|| self.malformed())?;
        let (head, tail) = self.bytes.split_at(count);
        self.bytes = tail;
        Ok(head)
    }

    fn next(&mut self) -> Result<Option<(u32, Wire<'a>)>, ProtobufError> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| self.malformed())?;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => self.take(8).map(|_| Wire::Fixed)?,
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Wire::Fixed)?,
            _ => return Err(self.malformed()),
        };
        Ok(Some((number, wire)))
    }

    fn text(&self, bytes: &'a [u8], field: &'static str) -> Result<&'a str, ProtobufError> {
        std::str::from_utf8(bytes).map_err(|_| ProtobufError::Utf8 { message: self.message, field })
    }
}

fn read_message(index: usize, bytes: &[u8], out: &mut Map<String, Value>) -> Result<(), ProtobufError> {
    let shape = message(index);
    let mut reader = Reader { bytes, message: shape.name };
    while let Some((number, wire)) = reader.next()? {
        let Some(field) = shape.by_number(number) else { continue };
        read_field(&reader, field, wire, out)?;
    }
    Ok(())
}

fn read_field(
    reader: &Reader<'_>,
    field: &Field,
    wire: Wire<'_>,
    out: &mut Map<String, Value>,
) -> Result<(), ProtobufError> {
    match field.shape {
        Shape::Inline => match (field.ty, wire) {
            (Type::Message(inner), Wire::Bytes(bytes)) => read_message(inner, bytes, out),
            _ => Err(reader.malformed()),
        },
        Shape::List => {
            let item = read_value(reader, field, wire)?;
            let slot = out.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = slot {
                list.push(item);
            }
            Ok(())
        }
        Shape::Map => {
            let Wire::Bytes(entry) = wire else { return Err(reader.malformed()) };
            let mut entry = Reader { bytes: entry, message: reader.message };
            let (mut key, mut value) = ("", None);
            while let Some((number, wire)) = entry.next()? {
                match (number, wire) {
                    (1, Wire::Bytes(b)) => key = entry.text(b, field.name)?,
                    (2, wire) => value = Some(read_value(&entry, field, wire)?),
                    _ => {}
                }
            }
            let value = match value {
                Some(value) => value,
                None => read_value(&entry, field, Wire::Bytes(&[]))?,
            };
            let slot = out.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = slot {
                map.insert(key.to_owned(), value);
            }
            Ok(())
        }
        Shape::Plain | Shape::Zero | Shape::Pointer => {
            let value = read_value(reader, field, wire)?;
            // Encoders write zero values of fields that cannot be absent; to JSON they are absent.
            if field.shape != Shape::Plain || !is_zero(&value) {
                out.insert(field.name.to_owned(), value);
            }
            Ok(())
        }
    }
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_i64() == Some(0),
        Value::String(s) => s.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// A varint as protobuf's int32 and int64 write it: negative numbers are their two's complement in 64 bits.
fn signed(value: u64) -> i64 {
    i64::from_ne_bytes(value.to_ne_bytes())
}

fn read_value(reader: &Reader<'_>, field: &Field, wire: Wire<'_>) -> Result<Value, ProtobufError> {
    Ok(match (field.ty, wire) {
        (Type::Bool, Wire::Varint(n)) => Value::Bool(n != 0),
        (Type::Int32 | Type::Int64, Wire::Varint(n)) => Value::from(signed(n)),
        (Type::Str, Wire::Bytes(b)) => Value::String(reader.text(b, field.name)?.to_owned()),
        (Type::Bytes, Wire::Bytes(b)) => Value::String(STANDARD.encode(b)),
        (Type::Message(inner), Wire::Bytes(b)) => {
            let mut map = Map::new();
            read_message(inner, b, &mut map)?;
            Value::Object(map)
        }
        (Type::Quantity, Wire::Bytes(b)) => {
            let mut inner = Reader { bytes: b, message: "Quantity" };
            let mut text = "";
            while let Some((number, wire)) = inner.next()? {
                if let (1, Wire::Bytes(b)) = (number, wire) {
                    text = inner.text(b, "string")?;
                }
            }
            Value::String(text.to_owned())
        }
        (ty @ (Type::Time | Type::MicroTime), Wire::Bytes(b)) => read_time(b, ty == Type::MicroTime)?,
        (Type::IntOrString, Wire::Bytes(b)) => read_int_or_string(b)?,
        (Type::Raw, Wire::Bytes(b)) => {
            let mut inner = Reader { bytes: b, message: "FieldsV1" };
            let mut value = Value::Null;
            while let Some((number, wire)) = inner.next()? {
                if let (1, Wire::Bytes(b)) = (number, wire) {
                    value = serde_json::from_slice(b).map_err(|_| inner.malformed())?;
                }
            }
            value
        }
        _ => return Err(reader.malformed()),
    })
}

fn read_time(bytes: &[u8], micro: bool) -> Result<Value, ProtobufError> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut reader = Reader { bytes, message: "Time" };
    let (mut seconds, mut nanos) = (0_i64, 0_i64);
    while let Some((number, wire)) = reader.next()? {
        match (number, wire) {
            (1, Wire::Varint(n)) => seconds = signed(n),
            (2, Wire::Varint(n)) => nanos = signed(n),
            _ => {}
        }
    }
    let nanos = i32::try_from(nanos).map_err(|_| reader.malformed())?;
    let time = Timestamp::new(seconds, nanos).map_err(|_| reader.malformed())?;
    Ok(Value::String(if micro { object::format_micro_time(time) } else { object::format_time(time) }))
}

fn read_int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut reader = Reader { bytes, message: "IntOrString" };
    let (mut is_text, mut number, mut text) = (false, 0_i64, "");
    while let Some((field, wire)) = reader.next()? {
        match (field, wire) {
            (1, Wire::Varint(n)) => is_text = n == 1,
            (2, Wire::Varint(n)) => number = signed(n),
            (3, Wire::Bytes(b)) => text = reader.text(b, "strVal")?,
            _ => {}
        }
    }
    Ok(if is_text { Value::String(text.to_owned()) } else { Value::from(number) })
}

#[cfg(test)]
mod tests;
