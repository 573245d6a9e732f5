//! The connection table ([`sheave_ebpf_abi::FlowSet`]). Invariant: an entry is stored by one processor at a time while nobody
//! else finds it, and who finds one reads a whole one.
//!
//! Who stores an entry holds the lock of its set. No crash leaves that behind for good, for it says when it was taken; only user
//! space, which copies entries when the table grows, can die with it. An entry is removed by freeing its tag, without the lock.
//!
//! What is called for each packet is a global function: the verifier looks at it once, and not at each call.

use crate::maps::FLOWS;
use core::mem::MaybeUninit;
use core::ptr::{addr_of, addr_of_mut, from_ref, read_volatile, write_volatile};
use sheave_ebpf_abi::{
    FLOW_LOCK_STALE_S, FLOW_WAYS, Flow, FlowEntry, FlowHead, FlowKey, FlowSet, Plain as _, place, until_s,
};
use sheave_ebpf_core::env::Claim;
use sheave_ebpf_kernel::value::{exchange32, exchange64, move_words, opaque};

/// How often a lock is tried: a processor takes some microseconds for so many atomic operations, and who stores an entry
/// needs a tenth of one.
const TRIES: u32 = 64;

/// Looks an entry up and leaves it as it is.
#[inline(always)]
pub fn get(key: &FlowKey) -> Option<Flow> {
    let mut flow = MaybeUninit::<Flow>::uninit();
    // SAFETY: the function has written all of it where it says so.
    if shv_flow_get(key, flow.as_mut_ptr()) != 0 { Some(unsafe { flow.assume_init() }) } else { None }
}

/// The same into a place that the caller has.
#[inline(always)]
pub fn get_into(key: &FlowKey, into: &mut Flow) -> bool {
    shv_flow_get(key, into) != 0
}

/// Notes in an entry that it was seen `now_s` and that `state` holds too; gives it as it was before.
#[inline(always)]
pub fn touch(key: &FlowKey, now_s: u32, state: u16) -> Option<Flow> {
    let mut before = MaybeUninit::<Flow>::uninit();
    // SAFETY: as in `get`.
    if shv_flow_touch(key, before.as_mut_ptr(), now_s, u32::from(state)) != 0 {
        Some(unsafe { before.assume_init() })
    } else {
        None
    }
}

/// Removes an entry, if there is one.
#[inline(always)]
pub fn remove(key: &FlowKey) {
    shv_flow_remove(key);
}

/// Stores an entry; with `fresh` unless there is one with its key. `evicted` is called when one that still counted had to
/// make room.
#[inline(always)]
pub fn put(key: &FlowKey, flow: &Flow, fresh: bool, evicted: impl FnOnce()) -> Claim {
    match shv_flow_put(key, flow, u32::from(fresh)) {
        STORED => Claim::Stored,
        TAKEN => Claim::Taken,
        EVICTED => {
            evicted();
            Claim::Stored
        }
        _ => Claim::Refused,
    }
}

/// The answers of [`shv_flow_put`].
const STORED: u32 = 0;
const TAKEN: u32 = 1;
const REFUSED: u32 = 2;
/// Stored, in the place of an entry that still counted.
const EVICTED: u32 = 3;

/// One of a set's entries, and what the set says of it.
struct Way {
    entry: *mut FlowEntry,
    tag: *mut u32,
    until_s: *mut u32,
}

/// The set that has the key's entry, if it is there, and the key's tag.
#[inline(always)]
fn set(key: &FlowKey) -> Option<(*mut FlowSet, u32)> {
    let head = FLOWS.get_ptr(0)?.cast::<FlowHead>();
    // SAFETY: the element stays, it has as many words, and each is read at once.
    let secret = |word| unsafe { read_volatile(addr_of!((*head).secret).cast::<u32>().add(word)) };
    // SAFETY: as above.
    let sets = unsafe { read_volatile(addr_of!((*head).sets)) };
    let place = place::place(key, secret, sets);
    Some((FLOWS.get_ptr_mut(place.set)?, place.tag))
}

/// Reads a set's tags.
#[inline(always)]
fn tags(set: *mut FlowSet) -> impl Fn(usize) -> u32 {
    // SAFETY: the element stays and has as many words.
    move |way| unsafe { read_volatile(addr_of!((*set).tags).cast::<u32>().add(way)) }
}

/// `None` where the set has no such entry.
#[inline(always)]
fn way(set: *mut FlowSet, way: u32) -> Option<Way> {
    // The verifier has to see the very register that was compared.
    let way = opaque(u64::from(way));
    if way >= FLOW_WAYS as u64 {
        return None;
    }
    // SAFETY: the element stays and has as many entries.
    unsafe {
        Some(Way {
            entry: addr_of_mut!((*set).entries).cast::<FlowEntry>().add(way as usize),
            tag: addr_of_mut!((*set).tags).cast::<u32>().add(way as usize),
            until_s: addr_of_mut!((*set).until_s).cast::<u32>().add(way as usize),
        })
    }
}

/// Whose entry it is.
#[inline(always)]
fn is_of(entry: *const FlowEntry, key: &FlowKey) -> bool {
    const { assert!(FlowKey::SIZE % 4 == 0) };
    let (mut apart, mut word) = (0, 0);
    while word < FlowKey::SIZE / 4 {
        // SAFETY: the entry is part of an element, which stays; both keys have as many words, none of them padding.
        let differ = unsafe {
            read_volatile(addr_of!((*entry).key).cast::<u32>().add(word))
                ^ from_ref(key).cast::<u32>().add(word).read()
        };
        // Compared word by word, the verifier would go as many ways.
        apart = opaque(apart | u64::from(differ));
        word += 1;
    }
    apart == 0
}

/// The key's entry, and its tag.
#[inline(always)]
fn find(key: &FlowKey) -> Option<(Way, u32)> {
    let (set, tag) = set(key)?;
    let way = way(set, place::find(tags(set), tag, opaque))?;
    is_of(way.entry, key).then_some((way, tag))
}

impl Way {
    /// Reads the flow of the entry that was found with `tag`; false when another one took the place meanwhile. Its own tag is the
    /// first that is overwritten and the last that is written.
    #[inline(always)]
    fn read(&self, tag: u32, into: *mut Flow) -> bool {
        // SAFETY: all are parts of an element, which stays, and the caller has room for a flow.
        unsafe {
            move_words(addr_of!((*self.entry).flow), into);
            read_volatile(addr_of!((*self.entry).tag)) == tag
        }
    }
}

/// [`get`]: 1 where there is an entry.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_flow_get(key: *const FlowKey, into: *mut Flow) -> u32 {
    if key.is_null() || into.is_null() {
        return 0;
    }
    // SAFETY: the verifier holds callers to whole values.
    let Some((way, tag)) = find(unsafe { &*key }) else { return 0 };
    u32::from(way.read(tag, into))
}

/// [`touch`]: 1 where there is an entry.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_flow_touch(key: *const FlowKey, before: *mut Flow, now_s: u32, state: u32) -> u32 {
    if key.is_null() || before.is_null() {
        return 0;
    }
    // SAFETY: as in `shv_flow_get`.
    let key = unsafe { &*key };
    let Some((way, tag)) = find(key) else { return 0 };
    if !way.read(tag, before) {
        return 0;
    }
    // SAFETY: `before` was just written. The others are parts of an element, which stays; a write that races with the entry's
    // eviction touches only the time and the state of a flow.
    unsafe {
        let flags = (*before).flags | state as u16;
        write_volatile(addr_of_mut!((*way.entry).flow.seen_s), now_s);
        write_volatile(addr_of_mut!((*way.entry).flow.flags), flags);
        write_volatile(way.until_s, until_s(now_s, flags, key.proto));
    }
    1
}

/// [`remove`]: 1 where there was an entry.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_flow_remove(key: *const FlowKey) -> u32 {
    if key.is_null() {
        return 0;
    }
    // SAFETY: as in `shv_flow_get`.
    let Some((way, tag)) = find(unsafe { &*key }) else { return 0 };
    // SAFETY: the words are parts of an element, which stays. An entry that took the place meanwhile has another tag.
    unsafe { exchange32(way.tag, tag, 0) };
    1
}

/// [`put`]: one of the answers above.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shv_flow_put(key: *const FlowKey, flow: *const Flow, fresh: u32) -> u32 {
    if key.is_null() || flow.is_null() {
        return REFUSED;
    }
    // SAFETY: as in `shv_flow_get`.
    let (key, flow) = unsafe { (&*key, &*flow) };
    let Some((set, tag)) = set(key) else { return REFUSED };
    // SAFETY: the element stays, and begins at a multiple of eight.
    let lock = unsafe { addr_of_mut!((*set).lock) };
    if !take(lock, flow.seen_s) {
        return REFUSED;
    }
    let done = store(set, tag, (key, flow), fresh != 0);
    // SAFETY: the lock is ours, or was taken from us for being stale.
    unsafe { exchange64(lock, u64::from(flow.seen_s) + 1, 0) };
    done
}

/// Takes a lock.
#[inline(always)]
fn take(lock: *mut u64, now_s: u32) -> bool {
    let mine = u64::from(now_s) + 1;
    let (mut free, mut tries) = (0, 0);
    while tries < TRIES {
        // SAFETY: the lock is part of an element, which stays, and aligned.
        let held = unsafe { exchange64(lock, free, mine) };
        if held == free {
            return true;
        }
        free = if held + FLOW_LOCK_STALE_S < mine { held } else { 0 };
        tries += 1;
    }
    false
}

/// Stores an entry in a set whose lock is held.
#[inline(always)]
fn store(set: *mut FlowSet, tag: u32, (key, flow): (&FlowKey, &Flow), fresh: bool) -> u32 {
    let found = place::find(tags(set), tag, opaque);
    let is_held = match way(set, found) {
        Some(way) => is_of(way.entry, key),
        None => false,
    };
    if is_held && fresh {
        return TAKEN;
    }
    let chosen = if found < FLOW_WAYS as u32 {
        // Its own entry, or that of another one which happens to have the tag.
        found
    } else {
        // SAFETY: the element stays and has as many words.
        let until_s = |way| unsafe { read_volatile(addr_of!((*set).until_s).cast::<u32>().add(way)) };
        place::victim(tags(set), until_s, opaque)
    };
    let Some(way) = way(set, chosen) else { return REFUSED };
    // SAFETY: all are parts of an element, which stays.
    unsafe {
        let evicts = !is_held && read_volatile(way.tag) != 0 && read_volatile(way.until_s) >= flow.seen_s;
        write_volatile(way.tag, 0);
        write_volatile(addr_of_mut!((*way.entry).tag), 0);
        move_words(key, addr_of_mut!((*way.entry).key));
        move_words(flow, addr_of_mut!((*way.entry).flow));
        write_volatile(way.until_s, until_s(flow.seen_s, flow.flags, key.proto));
        write_volatile(addr_of_mut!((*way.entry).tag), tag);
        write_volatile(way.tag, tag);
        if evicts { EVICTED } else { STORED }
    }
}
