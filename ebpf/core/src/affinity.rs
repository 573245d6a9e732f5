//! Session affinity. Invariant: a bound client gets its backend only while that is one which the frontend might pick
//! for it now, so a binding never outlives what it was made for: readiness, traffic policy or membership.

use crate::env::{Affinities, Table};
use crate::select::{self, Scope};
use sheave_ebpf_abi::{
    Address, Affinity, AffinityKey, Backend, Counter, Frontend, MemberKey, affinity_scope, member_flag,
};

/// A client by its address: what packets are bound by.
#[inline(always)]
pub fn address_key(client: Address, service: u32, scope: Scope) -> AffinityKey {
    let scope = match scope {
        Scope::Cluster => affinity_scope::ADDRESS,
        Scope::Local => affinity_scope::ADDRESS_LOCAL,
    };
    AffinityKey { client, service, scope }
}

/// A client by the cookie of its network namespace: what sockets are bound by.
#[inline(always)]
pub fn netns_key(cookie: u64, service: u32, scope: Scope) -> AffinityKey {
    let client = Address::v6([0, 0, cookie as u32, (cookie >> 32) as u32]);
    let scope = match scope {
        Scope::Cluster => affinity_scope::NETNS,
        Scope::Local => affinity_scope::NETNS_LOCAL,
    };
    AffinityKey { client, service, scope }
}

/// The backend that the client is bound to or, where that is not good any more, what `pick` gives, to which it is
/// bound from now on. `None` when `pick` gives none. To be called once for each new connection of a frontend with
/// affinity: the timeout counts from here.
#[inline(always)]
pub fn choose<E: Table + Affinities>(
    env: &E,
    key: &AffinityKey,
    frontend: &Frontend,
    scope: Scope,
    now_s: u32,
    pick: impl FnOnce() -> Option<Backend>,
) -> Option<Backend> {
    let held = env.affinity(key);
    if let Some(held) = held
        && let Some(backend) = good(env, &held, frontend, scope, now_s)
    {
        if held.used_s != now_s {
            bind(env, key, &backend, now_s, false);
        }
        return Some(backend);
    }
    let backend = pick()?;
    if !bind(env, key, &backend, now_s, held.is_none()) {
        // Another connection of the same client was faster, or there is no memory; this one goes on either way.
        if held.is_none()
            && let Some(held) = env.affinity(key)
            && let Some(theirs) = good(env, &held, frontend, scope, now_s)
        {
            return Some(theirs);
        }
        env.count(Counter::AffinityFull);
    }
    Some(backend)
}

#[inline(always)]
fn bind<E: Affinities>(env: &E, key: &AffinityKey, to: &Backend, now_s: u32, fresh: bool) -> bool {
    env.bind(key, &Affinity { backend: to.id, used_s: now_s }, fresh)
}

/// The backend of a binding that still holds.
#[inline(always)]
fn good<E: Table + Affinities>(
    env: &E,
    held: &Affinity,
    frontend: &Frontend,
    scope: Scope,
    now_s: u32,
) -> Option<Backend> {
    // Another CPU may have written a later second than this one has read.
    if now_s.saturating_sub(held.used_s) > frontend.affinity_timeout_s {
        return None;
    }
    let flags = env.member(&MemberKey { service: frontend.service, backend: held.backend })?;
    if !is_eligible(frontend, scope, flags) {
        return None;
    }
    let backend = env.backend(held.backend)?;
    if backend.id == held.backend { Some(backend) } else { None }
}

/// Whether `scope` might pick a member with these flags: a ready one or, when there are none, one that terminates.
#[inline(always)]
fn is_eligible(frontend: &Frontend, scope: Scope, flags: u32) -> bool {
    let (_, ready) = select::ready_in(frontend, scope);
    if (flags & member_flag::READY != 0) != (ready != 0) {
        return false;
    }
    match scope {
        Scope::Local => flags & member_flag::LOCAL != 0,
        // Hints exclude ready endpoints only.
        Scope::Cluster => ready == 0 || flags & member_flag::CLUSTER != 0,
    }
}
