//! nf_tables' messages: tables, chains, rules, sets, elements. Invariant: pure; every message is one of a batch, and
//! numbers that the kernel keeps in its own byte order (marks, counters of `numgen`) are written so.
//!
//! Names of messages, attributes and values are those of `linux/netfilter/nf_tables.h`.

use std::borrow::Cow;
use std::io;

use super::nfnl::{Batch, Netfilter, Writer, attribute, attributes, number, text};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
/// `NFPROTO_INET`: both families.
pub(crate) const INET: u8 = 1;
/// `NFPROTO_IPV4`.
pub(crate) const IPV4: u8 = 2;
/// `NFPROTO_IPV6`.
pub(crate) const IPV6: u8 = 10;

const NEW_TABLE: u8 = 0;
const GET_TABLE: u8 = 1;
const DEL_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const GET_CHAIN: u8 = 4;
const DEL_CHAIN: u8 = 5;
const NEW_RULE: u8 = 6;
const GET_RULE: u8 = 7;
const DEL_RULE: u8 = 8;
const NEW_SET: u8 = 9;
const NEW_ELEMENTS: u8 = 12;
const GET_ELEMENTS: u8 = 13;
const DEL_ELEMENTS: u8 = 14;
const GET_GENERATION: u8 = 16;

const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// Most bytes of an element's note: as many as `nft` allows for a comment.
pub(crate) const NOTE_BYTES_MAX: usize = 128;

/// Bytes of elements in one message: attributes count their length in 16 bits.
const ELEMENTS_BYTES_MAX: usize = 60_000;

/// `NFT_SET_…`: what a set is like.
pub(crate) mod set_flag {
    /// Ranges.
    pub(crate) const INTERVAL: u32 = 0x4;
    /// A map.
    pub(crate) const MAP: u32 = 0x8;
    /// Elements may end by themselves.
    pub(crate) const TIMEOUT: u32 = 0x10;
    /// Rules may add elements.
    pub(crate) const EVAL: u32 = 0x20;
    /// Keys of several fields, each a range.
    pub(crate) const CONCAT: u32 = 0x80;
}

/// Types as `nft list` shows them, and their bytes in a key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Type {
    /// `ipv4_addr`.
    Ip4,
    /// `ipv6_addr`.
    Ip6,
    /// `inet_proto`.
    Proto,
    /// `inet_service`: a port.
    Port,
    /// `mark`: a number of the host's.
    Mark,
}

impl Type {
    const fn number(self) -> u32 {
        match self {
            Self::Ip4 => 7,
            Self::Ip6 => 8,
            Self::Proto => 12,
            Self::Port => 13,
            Self::Mark => 19,
        }
    }

    /// Bytes by itself.
    pub(crate) const fn bytes(self) -> u32 {
        match self {
            Self::Ip4 | Self::Mark => 4,
            Self::Ip6 => 16,
            Self::Proto => 1,
            Self::Port => 2,
        }
    }
}

/// What a map's elements hold.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Data {
    /// It is a set.
    None,
    /// Values of these types.
    Values(&'static [Type]),
    /// Verdicts.
    Verdict,
}

/// A set or map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set {
    /// Its name.
    pub(crate) name: &'static str,
    /// Fields of its keys.
    pub(crate) key: &'static [Type],
    /// What it holds.
    pub(crate) data: Data,
    /// [`set_flag`]s but `MAP` and `CONCAT`, which follow from the rest.
    pub(crate) flags: u32,
    /// Most elements; 0 means any number.
    pub(crate) size: u32,
}

/// Bytes of a key or value: in those of several fields each is padded to four.
fn bytes_of(types: &[Type]) -> u32 {
    match types {
        [one] => one.bytes(),
        many => many.iter().map(|t| t.bytes().next_multiple_of(4)).sum(),
    }
}

fn numbers_of(types: &[Type]) -> u32 {
    types.iter().fold(0, |all, one| all << 6 | one.number())
}

/// Where and when a base chain is called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Base {
    /// `nat` or `filter`.
    pub(crate) kind: &'static str,
    /// `NF_INET_…`.
    pub(crate) hook: u32,
    /// Lower ones come first.
    pub(crate) priority: i32,
}

/// `NF_INET_PRE_ROUTING`.
pub(crate) const PREROUTING: u32 = 0;
/// `NF_INET_LOCAL_OUT`.
pub(crate) const OUTPUT: u32 = 3;
/// `NF_INET_POST_ROUTING`.
pub(crate) const POSTROUTING: u32 = 4;

/// What a rule ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict<'a> {
    /// Drop the packet.
    Drop,
    /// Accept it as far as this base chain goes.
    Accept,
    /// Go on in a chain and do not come back.
    Goto(&'a str),
}

impl Verdict<'_> {
    fn write(self, writer: &mut Writer) {
        // NFTA_DATA_VERDICT { NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN }
        let at = writer.nest(2);
        let (code, chain) = match self {
            Self::Drop => (0_i32, None),
            Self::Accept => (1, None),
            Self::Goto(chain) => (-4, Some(chain)),
        };
        writer.put_u32(1, code as u32);
        if let Some(chain) = chain {
            writer.put_str(2, chain);
        }
        writer.end(at);
    }
}

/// An element of a set or map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Element<'a> {
    /// The key, fields padded as in the set.
    pub(crate) key: &'a [u8],
    /// In sets of ranges, the last key; for one of single fields the first one after it.
    pub(crate) end: Option<&'a [u8]>,
    /// What a map holds for it.
    pub(crate) value: Value<'a>,
}

/// What a map holds for an element.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    /// Nothing: in sets, and where elements are deleted.
    None,
    /// Nothing: in a set of ranges of one field the key is the first one after a range.
    RangeEnd,
    /// Bytes.
    Bytes(&'a [u8]),
    /// A verdict.
    Verdict(Verdict<'a>),
}

/// A transaction on one table.
#[derive(Debug)]
pub(crate) struct Transaction<'a> {
    batch: Batch,
    family: u8,
    table: &'a str,
    /// Elements that wait for their message.
    waiting: Option<Waiting>,
    rules: usize,
    elements: usize,
}

#[derive(Debug)]
struct Waiting {
    kind: u8,
    set: &'static str,
    elements: Writer,
}

impl<'a> Transaction<'a> {
    /// An empty one.
    pub(crate) fn new(family: u8, table: &'a str) -> Self {
        Self { batch: Batch::new(SUBSYSTEM), family, table, waiting: None, rules: 0, elements: 0 }
    }

    /// Rules added so far.
    pub(crate) fn rules(&self) -> usize {
        self.rules
    }

    /// Elements added and deleted so far.
    pub(crate) fn elements(&self) -> usize {
        self.elements
    }

    fn message(
        &mut self,
        kind: u8,
        flags: u16,
        label: impl Into<Cow<'static, str>>,
        write: impl FnOnce(&mut Writer),
    ) {
        self.flush();
        self.message_now(kind, flags, label, write);
    }

    fn message_now(
        &mut self,
        kind: u8,
        flags: u16,
        label: impl Into<Cow<'static, str>>,
        write: impl FnOnce(&mut Writer),
    ) {
        self.batch.begin(kind, flags, self.family, label);
        let writer = self.batch.writer();
        writer.put_str(1, self.table);
        write(writer);
        self.batch.finish();
    }

    /// Makes the table, where there is none.
    pub(crate) fn add_table(&mut self) {
        self.message(NEW_TABLE, CREATE, "add the table", |_| {});
    }

    /// Removes the table, which must be there, with all that is in it.
    pub(crate) fn delete_table(&mut self) {
        self.message(DEL_TABLE, 0, "delete the table", |_| {});
    }

    /// Makes a chain; without `base` it must be gone to.
    pub(crate) fn add_chain(&mut self, name: &str, base: Option<Base>) {
        self.message(NEW_CHAIN, CREATE, format!("add chain {name}"), |writer| {
            writer.put_str(3, name);
            if let Some(base) = base {
                // NFTA_CHAIN_HOOK { NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY }, NFTA_CHAIN_TYPE
                let at = writer.nest(4);
                writer.put_u32(1, base.hook);
                writer.put_u32(2, base.priority as u32);
                writer.end(at);
                writer.put_str(7, base.kind);
            }
        });
    }

    /// Removes all rules of a chain.
    pub(crate) fn flush_chain(&mut self, name: &str) {
        self.message(DEL_RULE, 0, format!("flush chain {name}"), |writer| writer.put_str(2, name));
    }

    /// Removes one rule.
    pub(crate) fn delete_rule(&mut self, chain: &str, handle: u64) {
        self.message(DEL_RULE, 0, format!("delete a rule of chain {chain}"), |writer| {
            writer.put_str(2, chain);
            writer.put_u64(3, handle);
        });
    }

    /// Removes an empty chain.
    pub(crate) fn delete_chain(&mut self, name: &str) {
        self.message(DEL_CHAIN, 0, format!("delete chain {name}"), |writer| writer.put_str(3, name));
    }

    /// Appends a rule.
    pub(crate) fn add_rule(&mut self, chain: &str, rule: &super::nft_expr::Rule) {
        self.rules += 1;
        self.message(NEW_RULE, CREATE | APPEND, format!("add a rule to chain {chain}"), |writer| {
            writer.put_str(2, chain);
            let at = writer.nest(4);
            writer.append(rule.expressions());
            writer.end(at);
        });
    }

    /// Makes a set or map.
    pub(crate) fn add_set(&mut self, set: &Set, id: u32) {
        self.message(NEW_SET, CREATE, format!("add set {}", set.name), |writer| {
            let ranges_of_fields = set.flags & set_flag::INTERVAL != 0 && set.key.len() > 1;
            let mut flags = set.flags;
            flags |= if matches!(set.data, Data::None) { 0 } else { set_flag::MAP };
            flags |= if ranges_of_fields { set_flag::CONCAT } else { 0 };
            writer.put_str(2, set.name);
            writer.put_u32(3, flags);
            writer.put_u32(4, numbers_of(set.key));
            writer.put_u32(5, bytes_of(set.key));
            match set.data {
                Data::None => {}
                Data::Values(types) => {
                    writer.put_u32(6, numbers_of(types));
                    writer.put_u32(7, bytes_of(types));
                }
                Data::Verdict => writer.put_u32(6, 0xffff_ff00),
            }
            let at = writer.nest(9);
            if set.size != 0 {
                writer.put_u32(1, set.size);
            }
            if ranges_of_fields {
                let fields = writer.nest(2);
                for field in set.key {
                    let one = writer.nest(1);
                    writer.put_u32(1, field.bytes());
                    writer.end(one);
                }
                writer.end(fields);
            }
            writer.end(at);
            writer.put_u32(10, id);
        });
    }

    /// Puts an element in. One that is there already must be deleted before, in the same transaction.
    pub(crate) fn add_element(&mut self, set: &'static str, element: Element<'_>) {
        self.element(NEW_ELEMENTS, set, element, "");
    }

    /// The same with a note that `nft` shows as its comment and that is read back with it; at most
    /// [`NOTE_BYTES_MAX`].
    pub(crate) fn add_noted_element(&mut self, set: &'static str, element: Element<'_>, note: &str) {
        self.element(NEW_ELEMENTS, set, element, note);
    }

    /// Takes an element out, which must be there.
    pub(crate) fn delete_element(&mut self, set: &'static str, element: Element<'_>) {
        self.element(DEL_ELEMENTS, set, element, "");
    }

    fn element(&mut self, kind: u8, set: &'static str, element: Element<'_>, note: &str) {
        self.elements += 1;
        let full = self.waiting.as_ref().is_some_and(|waiting| {
            waiting.kind != kind || waiting.set != set || waiting.elements.len() > ELEMENTS_BYTES_MAX
        });
        if full {
            self.flush();
        }
        let waiting = self.waiting.get_or_insert_with(|| Waiting { kind, set, elements: Writer::default() });
        element.write(&mut waiting.elements, note);
    }

    /// Makes a message of the elements that wait.
    fn flush(&mut self) {
        let Some(Waiting { kind, set, elements }) = self.waiting.take() else { return };
        let (flags, verb) = if kind == NEW_ELEMENTS { (CREATE, "add") } else { (0, "delete") };
        self.message_now(kind, flags, format!("{verb} elements of {set}"), |writer| {
            writer.put_str(2, set);
            let at = writer.nest(3);
            writer.append(&elements);
            writer.end(at);
        });
    }

    /// Runs it; on an error nothing of it has happened.
    pub(crate) fn commit(mut self, netfilter: &mut Netfilter) -> io::Result<()> {
        self.flush();
        netfilter.commit(self.batch).map_err(io::Error::from)
    }
}

impl Element<'_> {
    fn write(self, writer: &mut Writer, note: &str) {
        let at = writer.nest(1);
        data(writer, 1, self.key);
        if let Some(end) = self.end {
            data(writer, 10, end);
        }
        match self.value {
            Value::None => {}
            // NFTA_SET_ELEM_FLAGS: NFT_SET_ELEM_INTERVAL_END
            Value::RangeEnd => writer.put_u32(3, 1),
            Value::Bytes(bytes) => data(writer, 2, bytes),
            Value::Verdict(verdict) => {
                let inner = writer.nest(2);
                verdict.write(writer);
                writer.end(inner);
            }
        }
        if !note.is_empty() && note.len() <= NOTE_BYTES_MAX {
            // NFTA_SET_ELEM_USERDATA: kind 0 (a comment), length, text with its final zero, as nft writes them.
            let mut bytes = vec![0, note.len() as u8 + 1];
            bytes.extend_from_slice(note.as_bytes());
            bytes.push(0);
            writer.put(6, &bytes);
        }
        writer.end(at);
    }
}

/// An attribute that holds `NFTA_DATA_VALUE`.
pub(super) fn data(writer: &mut Writer, kind: u16, bytes: &[u8]) {
    let at = writer.nest(kind);
    writer.put(1, bytes);
    writer.end(at);
}

/// An attribute that holds `NFTA_DATA_VERDICT`.
pub(super) fn verdict(writer: &mut Writer, kind: u16, verdict: Verdict<'_>) {
    let at = writer.nest(kind);
    verdict.write(writer);
    writer.end(at);
}

/// A chain as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChainRow {
    /// `NFPROTO_…`.
    pub(crate) family: u8,
    /// Its table.
    pub(crate) table: String,
    /// Its name.
    pub(crate) name: String,
}

/// A rule as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuleRow {
    /// Its chain.
    pub(crate) chain: String,
    /// By which it is deleted.
    pub(crate) handle: u64,
    /// The chain that it ends in, if it does.
    pub(crate) target: Option<String>,
}

/// An element of a set or map as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ElementRow {
    /// Its key.
    pub(crate) key: Vec<u8>,
    /// What the map holds for it; empty in sets.
    pub(crate) value: Vec<u8>,
    /// It ends a range: [`Value::RangeEnd`].
    pub(crate) range_end: bool,
    /// Its note; empty where it has none.
    pub(crate) note: String,
}

impl Netfilter {
    /// Number that changes with every change of the ruleset of this namespace.
    pub(crate) fn generation(&mut self) -> io::Result<u32> {
        let read = |bytes: &[u8]| attribute(bytes, 1).and_then(number);
        let found = self.get(SUBSYSTEM, GET_GENERATION, 0, |_| {}, read)?;
        Ok(found.flatten().unwrap_or_default())
    }

    /// The handle of a table, `None` where there is no such table. One that was made anew has another.
    pub(crate) fn table_handle(&mut self, family: u8, table: &str) -> io::Result<Option<u64>> {
        let read =
            |bytes: &[u8]| attribute(bytes, 4).and_then(|v| v.try_into().ok()).map_or(0, u64::from_be_bytes);
        self.get(SUBSYSTEM, GET_TABLE, family, |writer| writer.put_str(1, table), read)
    }

    /// All chains of a family.
    pub(crate) fn chains(&mut self, family: u8) -> io::Result<Vec<ChainRow>> {
        let read = |bytes: &[u8]| {
            let (table, name) = (attribute(bytes, 1)?, attribute(bytes, 3)?);
            Some(ChainRow { family, table: text(table), name: text(name) })
        };
        self.dump(SUBSYSTEM, GET_CHAIN, family, |_| {}, read)
    }

    /// All tables of a family.
    pub(crate) fn tables(&mut self, family: u8) -> io::Result<Vec<String>> {
        let read = |bytes: &[u8]| attribute(bytes, 1).map(text);
        self.dump(SUBSYSTEM, GET_TABLE, family, |_| {}, read)
    }

    /// All rules of a table.
    pub(crate) fn rules(&mut self, family: u8, table: &str) -> io::Result<Vec<RuleRow>> {
        let read = |bytes: &[u8]| {
            let handle = attribute(bytes, 3)?.try_into().ok().map(u64::from_be_bytes)?;
            let target = attribute(bytes, 4).and_then(target);
            Some(RuleRow { chain: text(attribute(bytes, 2)?), handle, target })
        };
        self.dump(SUBSYSTEM, GET_RULE, family, |writer| writer.put_str(1, table), read)
    }

    /// All elements of a set or map; none where there is no such set.
    pub(crate) fn elements(&mut self, family: u8, table: &str, set: &str) -> io::Result<Vec<ElementRow>> {
        let asked = |writer: &mut Writer| {
            writer.put_str(1, table);
            writer.put_str(2, set);
        };
        let read = |bytes: &[u8]| {
            let list = attribute(bytes, 3)?;
            Some(attributes(list).filter_map(|(_, element)| element_row(element)).collect::<Vec<_>>())
        };
        Ok(self.dump(SUBSYSTEM, GET_ELEMENTS, family, asked, read)?.into_iter().flatten().collect())
    }
}

/// An element out of a list of them.
fn element_row(bytes: &[u8]) -> Option<ElementRow> {
    let value_of = |kind| Some(attribute(attribute(bytes, kind)?, 1)?.to_vec());
    let note = |data: &[u8]| match data {
        [0, length, text_bytes @ ..] => text_bytes.get(..usize::from(*length)).map(text),
        _ => None,
    };
    Some(ElementRow {
        key: value_of(1)?,
        value: value_of(2).unwrap_or_default(),
        range_end: attribute(bytes, 3).and_then(number).is_some_and(|flags| flags & 1 != 0),
        note: attribute(bytes, 6).and_then(note).unwrap_or_default(),
    })
}

/// The chain that the last `immediate` expression of these names.
fn target(expressions: &[u8]) -> Option<String> {
    attributes(expressions)
        .filter_map(|(_, expression)| {
            if text(attribute(expression, 1)?) != "immediate" {
                return None;
            }
            // NFTA_EXPR_DATA { NFTA_IMMEDIATE_DATA { NFTA_DATA_VERDICT { NFTA_VERDICT_CHAIN } } }
            let verdict = attribute(attribute(attribute(expression, 2)?, 2)?, 2)?;
            attribute(verdict, 2).map(text)
        })
        .last()
}
