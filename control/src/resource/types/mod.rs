//! The shape of the API's types, as a table of fields: what is decoded has the types that the table names, and
//! nothing that it does not.

mod conform;
pub mod protobuf;
mod schema;

use std::collections::HashMap;
use std::sync::LazyLock;

use super::kinds::{Kind, Subresource};

pub use conform::{FieldValidation, conform, unknown_fields};
pub use schema::schemas;

/// How often and how a field appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Once; its zero value is not written.
    Plain,
    /// Once; its zero value is written.
    Zero,
    /// Once; zero and absent differ.
    Pointer,
    /// Any number of times.
    List,
    /// Values under string keys.
    Map,
    /// A message whose members are this message's members in JSON.
    Inline,
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Str,
    Bool,
    Int32,
    Int64,
    /// Base64 in JSON.
    Bytes,
    Quantity,
    /// RFC 3339, whole seconds.
    Time,
    /// RFC 3339, microseconds.
    MicroTime,
    IntOrString,
    /// Any JSON.
    Raw,
    /// Position in the table.
    Message(usize),
}

#[derive(Debug)]
pub(super) struct Field {
    pub number: u32,
    pub name: &'static str,
    pub shape: Shape,
    pub ty: Type,
}

#[derive(Debug)]
pub(super) struct Message {
    pub name: &'static str,
    /// In the table's order.
    pub fields: Vec<Field>,
    /// Every JSON member, inlined ones included, sorted by name.
    members: Vec<(&'static str, Shape, Type)>,
}

impl Message {
    /// The JSON member of this name.
    pub(super) fn member(&self, name: &str) -> Option<(Shape, Type)> {
        let i = self.members.binary_search_by(|(n, ..)| (*n).cmp(name)).ok()?;
        Some((self.members[i].1, self.members[i].2))
    }

    pub(super) fn by_number(&self, number: u32) -> Option<&Field> {
        self.fields.iter().find(|f| f.number == number)
    }
}

struct Table {
    messages: Vec<Message>,
    names: HashMap<&'static str, usize>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| match parse(include_str!("fields.txt")) {
    Ok(table) => table,
    // The text is part of the program; the tests read all of it.
    Err(line) => unreachable!("fields.txt: {line}"),
});

pub(super) fn message(index: usize) -> &'static Message {
    &TABLE.messages[index]
}

fn index_of(name: &str) -> Option<usize> {
    TABLE.names.get(name).copied()
}

/// The message that a kind's endpoint takes as body.
pub(super) fn body_of(kind: &Kind, sub: Subresource) -> Option<usize> {
    match sub {
        Subresource::Scale => index_of("Scale"),
        Subresource::Binding => index_of("Binding"),
        _ => index_of(kind.kind),
    }
}

fn scalar(name: &str) -> Option<Type> {
    Some(match name {
        "string" => Type::Str,
        "bool" => Type::Bool,
        "int32" => Type::Int32,
        "int64" => Type::Int64,
        "bytes" => Type::Bytes,
        "Quantity" => Type::Quantity,
        "Time" => Type::Time,
        "MicroTime" => Type::MicroTime,
        "IntOrString" => Type::IntOrString,
        "FieldsV1" => Type::Raw,
        _ => return None,
    })
}

type Paragraph = (&'static str, Vec<&'static str>);

fn paragraphs(text: &'static str) -> Result<Vec<Paragraph>, String> {
    let mut out: Vec<Paragraph> = Vec::new();
    for line in text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
        let mut words = line.split_ascii_whitespace();
        if !line.starts_with(' ') {
            out.push((words.next().ok_or("an empty line")?, Vec::new()));
        }
        out.last_mut().ok_or_else(|| line.to_owned())?.1.extend(words);
    }
    Ok(out)
}

fn parse(text: &'static str) -> Result<Table, String> {
    let list = paragraphs(text)?;
    let names: HashMap<&'static str, usize> =
        list.iter().enumerate().map(|(i, (name, _))| (*name, i)).collect();
    let mut messages = Vec::with_capacity(list.len());
    for (name, words) in list {
        let fields = words
            .into_iter()
            .map(|word| parse_field(word, &names).ok_or_else(|| format!("{name}: {word}")))
            .collect::<Result<Vec<_>, _>>()?;
        messages.push(Message { name, fields, members: Vec::new() });
    }
    for i in 0..messages.len() {
        let mut members = Vec::new();
        collect_members(&messages, i, &mut members);
        members.sort_unstable_by_key(|(name, ..)| *name);
        messages[i].members = members;
    }
    Ok(Table { messages, names })
}

fn parse_field(word: &'static str, names: &HashMap<&'static str, usize>) -> Option<Field> {
    let (number, rest) = word.split_once(':')?;
    let (name, rest, inline) = match rest.strip_prefix('+') {
        Some(rest) => ("", rest, true),
        None => {
            let (name, rest) = rest.split_once(':')?;
            (name, rest, false)
        }
    };
    let (shape, ty) = if inline {
        (Shape::Inline, rest)
    } else {
        let prefixes = [("[]", Shape::List), ("{}", Shape::Map), ("?", Shape::Pointer), ("!", Shape::Zero)];
        prefixes
            .into_iter()
            .find_map(|(prefix, shape)| rest.strip_prefix(prefix).map(|ty| (shape, ty)))
            .unwrap_or((Shape::Plain, rest))
    };
    let ty = match scalar(ty) {
        Some(ty) => ty,
        None => Type::Message(*names.get(ty)?),
    };
    Some(Field { number: number.parse().ok()?, name, shape, ty })
}

fn collect_members(messages: &[Message], i: usize, out: &mut Vec<(&'static str, Shape, Type)>) {
    for field in &messages[i].fields {
        match (field.shape, field.ty) {
            (Shape::Inline, Type::Message(inner)) => collect_members(messages, inner, out),
            _ => out.push((field.name, field.shape, field.ty)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::kinds::kinds;

    #[test]
    fn the_table_is_whole() {
        let table = parse(include_str!("fields.txt")).unwrap();
        assert_eq!(table.messages.len(), table.names.len(), "a name twice");
        for m in &table.messages {
            let mut numbers: Vec<u32> = m.fields.iter().map(|f| f.number).collect();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), m.fields.len(), "{}: a number twice", m.name);
            assert!(m.members.windows(2).all(|w| w[0].0 < w[1].0), "{}: a member twice", m.name);
            for f in &m.fields {
                assert_eq!(f.name.is_empty(), f.shape == Shape::Inline, "{}", m.name);
            }
        }
        for kind in kinds() {
            assert!(body_of(kind, Subresource::Main).is_some(), "{}", kind.kind);
        }
        assert!(index_of("DeleteOptions").is_some() && index_of("Scale").is_some());
    }

    fn depth(i: usize, seen: &mut Vec<usize>) -> usize {
        assert!(!seen.contains(&i), "{} holds itself", message(i).name);
        seen.push(i);
        let inner =
            message(i).fields.iter().map(|f| if let Type::Message(m) = f.ty { depth(m, seen) } else { 0 });
        let deepest = inner.max().unwrap_or(0) + 1;
        seen.pop();
        deepest
    }

    #[test]
    fn types_do_not_recur() {
        for kind in kinds() {
            assert!(depth(index_of(kind.kind).unwrap(), &mut Vec::new()) < 20, "{}", kind.kind);
        }
    }

    #[test]
    fn broken_tables_are_found() {
        for text in ["A 1:x:Nope", "A x:y:string", "A 1:x", "  1:x:string"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
