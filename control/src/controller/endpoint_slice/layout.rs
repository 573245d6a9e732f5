//! Which endpoint goes into which slice. Invariant: the fewest writes that lead from the slices that exist to the
//! endpoints that are wanted; what is new goes first into slices that have to be written anyway.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Endpoint, Family, MANAGED_BY, MANAGER, Observed, Port, Slice, TRIGGER_TIME};
use crate::controller::action::{Action, Part, Target};
use crate::controller::claim::controller_reference;
use crate::controller::model::StringMap;
use crate::limits::ENDPOINTS_PER_SLICE_MAX;
use crate::resource::Propagation;
use crate::resource::kinds::{ENDPOINT_SLICES, SERVICES};
use crate::resource::object::format_time;

/// The endpoints per family and per set of ports: pods may differ in what a named port means.
pub(super) type Wanted = BTreeMap<Family, BTreeMap<Vec<Port>, Vec<Endpoint>>>;

/// A slice as it is to be.
struct Page<'a> {
    /// The slice that is there already.
    slice: Option<&'a Slice>,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

impl Page<'_> {
    fn room(&self) -> usize {
        ENDPOINTS_PER_SLICE_MAX.saturating_sub(self.endpoints.len())
    }

    fn is_changed(&self) -> bool {
        self.slice.is_none_or(|s| s.endpoints != self.endpoints || s.ports != self.ports)
    }
}

/// Plans the writes for all families.
pub(super) fn plan(
    seen: &Observed,
    wanted: Wanted,
    labels: &StringMap,
    trigger: Option<Timestamp>,
) -> Vec<Action> {
    let mine = |s: &&Slice| {
        !s.metadata.is_deleting() && s.metadata.labels.get(MANAGED_BY).is_some_and(|m| m == MANAGER)
    };
    let mut slices: Vec<&Slice> = seen.slices.iter().filter(mine).collect();
    slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let mut writes = Vec::new();
    let mut deletes = Vec::new();
    for (family, groups) in wanted {
        let (of_family, others): (Vec<&Slice>, Vec<&Slice>) =
            slices.into_iter().partition(|s| s.address_type == family.as_str());
        slices = others;
        let (pages, unused) = arrange(groups, of_family);
        writes.extend(pages.iter().filter_map(|page| write(seen, family, page, labels, trigger)));
        deletes.extend(unused);
    }
    deletes.extend(slices);
    let mut actions = Vec::new();
    if !writes.is_empty() {
        actions.push(Action::Together(writes));
    }
    // What goes, goes last: an endpoint is rather in two slices for a moment than in none.
    if !deletes.is_empty() {
        actions.push(Action::Together(deletes.into_iter().map(delete).collect()));
    }
    actions
}

/// Distributes the endpoints of one family. Returns the slices to keep or make, and those that are not needed.
fn arrange<'a>(
    mut groups: BTreeMap<Vec<Port>, Vec<Endpoint>>,
    slices: Vec<&'a Slice>,
) -> (Vec<Page<'a>>, Vec<&'a Slice>) {
    let mut pages: Vec<Page<'a>> = Vec::new();
    let mut spare: Vec<&'a Slice> = Vec::new();
    let mut left: BTreeMap<Vec<Port>, HashMap<String, Endpoint>> = std::mem::take(&mut groups)
        .into_iter()
        .map(|(ports, endpoints)| (ports, endpoints.into_iter().map(|e| (key(&e), e)).collect()))
        .collect();
    for slice in slices {
        let mut ports = slice.ports.clone();
        ports.sort();
        let kept: Vec<Endpoint> = match left.get_mut(&ports) {
            Some(left) => slice.endpoints.iter().filter_map(|e| left.remove(&key(e))).collect(),
            None => Vec::new(),
        };
        if kept.is_empty() {
            spare.push(slice);
        } else {
            pages.push(Page { slice: Some(slice), ports: slice.ports.clone(), endpoints: kept });
        }
    }
    for (ports, endpoints) in left {
        let mut endpoints: Vec<Endpoint> = endpoints.into_values().collect();
        endpoints.sort_by_cached_key(key);
        fill(&mut pages, &mut spare, &ports, endpoints);
    }
    if pages.is_empty() {
        // A Service without endpoints keeps one empty slice, which tells that it was looked at.
        let slice = (!spare.is_empty()).then(|| spare.remove(0));
        let ports = slice.map_or_else(Vec::new, |s| s.ports.clone());
        pages.push(Page { slice, ports, endpoints: Vec::new() });
    }
    (pages, spare)
}

/// Puts new endpoints into slices of the same ports.
fn fill<'a>(
    pages: &mut Vec<Page<'a>>,
    spare: &mut Vec<&'a Slice>,
    ports: &[Port],
    mut endpoints: Vec<Endpoint>,
) {
    let same = |page: &Page<'_>| {
        let mut its = page.ports.clone();
        its.sort();
        its == ports
    };
    for page in pages.iter_mut().filter(|p| same(p) && p.is_changed()) {
        let taken = page.room().min(endpoints.len());
        page.endpoints.extend(endpoints.drain(..taken));
    }
    let fits = |page: &&mut Page<'_>| same(page) && page.room() >= endpoints.len();
    if !endpoints.is_empty()
        && let Some(page) = pages.iter_mut().filter(fits).min_by_key(|p| p.room())
    {
        page.endpoints.append(&mut endpoints);
    }
    while !endpoints.is_empty() {
        let rest = endpoints.split_off(endpoints.len().min(ENDPOINTS_PER_SLICE_MAX));
        let slice = (!spare.is_empty()).then(|| spare.remove(0));
        pages.push(Page { slice, ports: ports.to_vec(), endpoints });
        endpoints = rest;
    }
}

/// What makes an endpoint the same one as before.
fn key(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().map_or("", |t| t.uid.as_str());
    let name = endpoint.target_ref.as_ref().map_or("", |t| t.name.as_str());
    format!("{name}/{uid}/{}", endpoint.addresses.first().map_or("", String::as_str))
}

fn write(
    seen: &Observed,
    family: Family,
    page: &Page<'_>,
    labels: &StringMap,
    trigger: Option<Timestamp>,
) -> Option<Action> {
    let trigger = trigger.map(format_time);
    let Some(slice) = page.slice else {
        return Some(create(seen, family, page, labels, trigger));
    };
    let mut merge = json!({});
    if slice.metadata.labels != *labels {
        let gone = slice.metadata.labels.keys().filter(|k| !labels.contains_key(*k));
        let mut changed: Value = gone.map(|k| (k.clone(), Value::Null)).collect();
        for (key, value) in labels {
            changed[key] = json!(value);
        }
        merge["metadata"]["labels"] = changed;
    }
    if slice.endpoints != page.endpoints {
        merge["endpoints"] = json!(page.endpoints);
    }
    if slice.ports != page.ports {
        merge["ports"] = json!(page.ports);
    }
    if page.is_changed() && trigger.as_deref() > slice.metadata.annotation(TRIGGER_TIME) {
        merge["metadata"]["annotations"] = json!({ TRIGGER_TIME: trigger });
    }
    let target = Target::unchanged(&ENDPOINT_SLICES, &slice.metadata);
    (merge != json!({})).then_some(Action::Edit { target, part: Part::Main, merge })
}

fn create(
    seen: &Observed,
    family: Family,
    page: &Page<'_>,
    labels: &StringMap,
    trigger: Option<String>,
) -> Action {
    let service = &seen.service.metadata;
    let annotations = trigger.map(|t| json!({ TRIGGER_TIME: t })).unwrap_or_else(|| json!({}));
    Action::Create {
        kind: &ENDPOINT_SLICES,
        namespace: service.namespace.clone(),
        body: json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "generateName": format!("{}-", service.name),
                "namespace": service.namespace,
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [controller_reference(&SERVICES, service)],
            },
            "addressType": family.as_str(),
            "endpoints": page.endpoints,
            "ports": page.ports,
        }),
    }
}

fn delete(slice: &Slice) -> Action {
    Action::Delete {
        target: Target::of(&ENDPOINT_SLICES, &slice.metadata),
        grace_seconds: None,
        propagation: Propagation::Background,
    }
}
