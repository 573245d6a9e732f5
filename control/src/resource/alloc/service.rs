//! What a Service gets: cluster IPs by its family policy, and node ports. A grant is taken before the write and
//! committed or rolled back after it, so a failed write leaks nothing and two writes never get the same address.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::ip::{IpRange, IpRangeError};
use super::port::{PortRange, PortRangeError, Protocol};
use crate::resource::error::{ApiError, Cause, CauseReason};
use crate::resource::kinds::SERVICES;
use crate::resource::object::{self, int_at, items_at, str_at};

/// Why the configured ranges cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AllocatorError {
    /// A network is unusable.
    #[error("service range")]
    Ip(#[from] IpRangeError),
    /// The port range is unusable.
    #[error("node port range")]
    Port(#[from] PortRangeError),
    /// There must be one range, or one of each family.
    #[error("service ranges must be one network or one of each family, got {count}")]
    Families {
        /// How many networks were given.
        count: usize,
    },
}

/// What one write took and will give back.
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "commit it after the write, or roll it back"]
pub struct Grant {
    taken: Holdings,
    released: Holdings,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Holdings {
    ips: Vec<IpAddr>,
    ports: Vec<(u16, Protocol)>,
}

impl Holdings {
    fn of(service: &Value) -> Self {
        let mut out = Self::default();
        if str_at(service, &["spec", "type"]) != "ExternalName" {
            let listed = items_at(service, &["spec", "clusterIPs"]).iter().filter_map(Value::as_str);
            out.ips.extend(listed.filter_map(|ip| ip.parse::<IpAddr>().ok()));
            if out.ips.is_empty() {
                out.ips.extend(str_at(service, &["spec", "clusterIP"]).parse::<IpAddr>().ok());
            }
        }
        for port in items_at(service, &["spec", "ports"]) {
            if let (Some(number), Some(protocol)) =
                (port_number(port, "nodePort"), Protocol::parse(str_at(port, &["protocol"])))
            {
                out.ports.push((number, protocol));
            }
        }
        if let Some(number) =
            object::at(service, &["spec"]).and_then(|s| port_number(s, "healthCheckNodePort"))
        {
            out.ports.push((number, Protocol::Tcp));
        }
        out
    }

    fn minus(&self, other: &Self) -> Self {
        Self {
            ips: self.ips.iter().filter(|ip| !other.ips.contains(ip)).copied().collect(),
            ports: self.ports.iter().filter(|p| !other.ports.contains(p)).copied().collect(),
        }
    }
}

fn port_number(value: &Value, key: &str) -> Option<u16> {
    value.get(key).and_then(Value::as_u64).and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0)
}

/// The cluster's service addresses.
#[derive(Debug, Clone)]
pub struct ServiceAllocator {
    ranges: Vec<IpRange>,
    ports: PortRange,
}

fn family_name(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

fn invalid(service: &Value, field: String, message: String) -> ApiError {
    let cause = Cause { reason: CauseReason::Invalid, message, field };
    ApiError::invalid(&SERVICES, object::name(service), vec![cause])
}

impl ServiceAllocator {
    /// Empty ranges. The first network's family is the primary one.
    pub fn new(networks: &[IpNetwork], node_ports: (u16, u16)) -> Result<Self, AllocatorError> {
        let families: Vec<bool> = networks.iter().map(IpNetwork::is_ipv4).collect();
        if !matches!(families.as_slice(), [_] | [true, false] | [false, true]) {
            return Err(AllocatorError::Families { count: networks.len() });
        }
        let ranges = networks.iter().map(|n| IpRange::new(*n)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { ranges, ports: PortRange::new(node_ports.0, node_ports.1)? })
    }

    /// The ranges, primary first.
    pub fn ranges(&self) -> &[IpRange] {
        &self.ranges
    }

    /// Takes what a stored service holds, on start. Returns a line for each address that two services hold or that
    /// lies outside the ranges; such services are left as they are.
    pub fn adopt(&mut self, service: &Value) -> Vec<String> {
        let held = Holdings::of(service);
        let who = || format!("service {}/{}", object::namespace(service), object::name(service));
        let mut problems = Vec::new();
        for ip in held.ips {
            if !self.take_ip(ip) {
                problems.push(format!("{}: cluster IP {ip} is outside the ranges or held twice", who()));
            }
        }
        for (port, protocol) in held.ports {
            if !self.ports.take(port, protocol) {
                problems.push(format!("{}: node port {port} is outside the range or held twice", who()));
            }
        }
        problems
    }

    /// Gives back all that a removed service held.
    pub fn release(&mut self, service: &Value) {
        self.free(&Holdings::of(service));
    }

    /// Ends a grant whose write succeeded.
    pub fn commit(&mut self, grant: Grant) {
        self.free(&grant.released);
    }

    /// Ends a grant whose write failed or was a dry run.
    pub fn rollback(&mut self, grant: Grant) {
        self.free(&grant.taken);
    }

    fn free(&mut self, held: &Holdings) {
        for ip in &held.ips {
            for range in &mut self.ranges {
                range.release(*ip);
            }
        }
        for (port, protocol) in &held.ports {
            self.ports.release(*port, *protocol);
        }
    }

    fn take_ip(&mut self, ip: IpAddr) -> bool {
        self.ranges.iter_mut().any(|r| r.take(ip))
    }

    /// Fills in a defaulted Service's addresses: `clusterIP(s)`, `ipFamilies`, `ipFamilyPolicy`, node ports. With
    /// `old`, whatever the update leaves out is carried over. On error nothing is taken.
    pub fn allocate(&mut self, service: &mut Value, old: Option<&Value>) -> Result<Grant, ApiError> {
        if let Some(old) = old {
            carry_over(service, old);
        }
        let before = old.map(Holdings::of).unwrap_or_default();
        let mut taken = Holdings::default();
        let result = self
            .allocate_ips(service, &before, &mut taken)
            .and_then(|()| self.allocate_ports(service, &before, &mut taken));
        if let Err(error) = result {
            self.free(&taken);
            return Err(error);
        }
        let released = before.minus(&Holdings::of(service));
        Ok(Grant { taken, released })
    }

    fn allocate_ips(
        &mut self,
        service: &mut Value,
        before: &Holdings,
        taken: &mut Holdings,
    ) -> Result<(), ApiError> {
        if str_at(service, &["spec", "type"]) == "ExternalName" {
            let spec = object::map_mut(service, "spec");
            for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                spec.remove(key);
            }
            return Ok(());
        }
        let given = given_ips(service)?;
        let headless = given.first().is_some_and(|ip| ip == "None");
        let families = self.families(service, &given, headless)?;
        let ips = if headless {
            vec!["None".to_owned()]
        } else {
            let mut ips = Vec::new();
            for (i, v4) in families.iter().enumerate() {
                let ip = match given.get(i) {
                    Some(text) => self.take_given(service, i, text, *v4, before, taken)?,
                    None => self.take_any(*v4, taken)?,
                };
                ips.push(ip.to_string());
            }
            ips
        };
        let spec = object::map_mut(service, "spec");
        spec.insert("clusterIP".to_owned(), json!(ips[0]));
        spec.insert("clusterIPs".to_owned(), json!(ips));
        let names: Vec<&str> = families.iter().map(|v4| family_name(*v4)).collect();
        spec.insert("ipFamilies".to_owned(), json!(names));
        Ok(())
    }

    /// Decides the families (true is IPv4) from policy, listed families and given addresses, and settles the policy.
    fn families(&self, service: &mut Value, given: &[String], headless: bool) -> Result<Vec<bool>, ApiError> {
        let mut families: Vec<bool> = Vec::new();
        for (i, item) in items_at(service, &["spec", "ipFamilies"]).iter().enumerate() {
            let v4 = match item.as_str() {
                Some("IPv4") => true,
                Some("IPv6") => false,
                _ => {
                    return Err(invalid(
                        service,
                        format!("spec.ipFamilies[{i}]"),
                        format!("Invalid value: {item}: must be IPv4 or IPv6"),
                    ));
                }
            };
            if !self.ranges.iter().any(|r| r.is_ipv4() == v4) {
                return Err(invalid(
                    service,
                    format!("spec.ipFamilies[{i}]"),
                    format!("Invalid value: {item}: not configured on this cluster"),
                ));
            }
            if families.contains(&v4) {
                return Err(invalid(
                    service,
                    format!("spec.ipFamilies[{i}]"),
                    format!("Invalid value: {item}: listed twice"),
                ));
            }
            families.push(v4);
        }
        if families.is_empty() {
            families.extend(given.iter().filter_map(|t| t.parse::<IpAddr>().ok()).map(|ip| ip.is_ipv4()));
        }
        let selects = object::map_at(service, &["spec", "selector"]).is_some_and(|m| !m.is_empty());
        let dual = self.ranges.len() > 1;
        let policy = match str_at(service, &["spec", "ipFamilyPolicy"]) {
            "" if families.len() > 1 => "RequireDualStack",
            "" if headless && !selects && dual => "RequireDualStack",
            "" => "SingleStack",
            policy @ ("SingleStack" | "PreferDualStack" | "RequireDualStack") => policy,
            other => {
                let message = format!("Unsupported value: {other:?}: supported values: \"SingleStack\", \"PreferDualStack\", \"RequireDualStack\"");
                return Err(invalid(service, "spec.ipFamilyPolicy".to_owned(), message));
            }
        }
        .to_owned();
        let primary = families.first().copied().unwrap_or(self.ranges[0].is_ipv4());
        match policy.as_str() {
            "SingleStack" => families = vec![primary],
            "PreferDualStack" if !dual => families = vec![primary],
            "RequireDualStack" if !dual => {
                let message = "Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services".to_owned();
                return Err(invalid(service, "spec.ipFamilyPolicy".to_owned(), message));
            }
            _ => families = vec![primary, !primary],
        }
        object::map_mut(service, "spec").insert("ipFamilyPolicy".to_owned(), Value::String(policy));
        Ok(families)
    }

    fn take_given(
        &mut self,
        service: &Value,
        i: usize,
        text: &str,
        v4: bool,
        before: &Holdings,
        taken: &mut Holdings,
    ) -> Result<IpAddr, ApiError> {
        let refuse = |why: String| {
            Err(invalid(service, format!("spec.clusterIPs[{i}]"), format!("Invalid value: {text:?}: {why}")))
        };
        let Ok(ip) = text.parse::<IpAddr>() else {
            return refuse("must be an IP address or None".to_owned());
        };
        if ip.is_ipv4() != v4 {
            return refuse(format!("must be {} to match ipFamilies", family_name(v4)));
        }
        if before.ips.contains(&ip) {
            return Ok(ip);
        }
        let Some(range) = self.ranges.iter_mut().find(|r| r.is_ipv4() == v4) else {
            return refuse(format!("{} is not configured on this cluster", family_name(v4)));
        };
        if !range.contains(ip) {
            return refuse(format!("not in the service range {}; leave it out to get one", range.network()));
        }
        if !range.take(ip) {
            return refuse("the address is already allocated; choose another or leave it out".to_owned());
        }
        taken.ips.push(ip);
        Ok(ip)
    }

    fn take_any(&mut self, v4: bool, taken: &mut Holdings) -> Result<IpAddr, ApiError> {
        let family = family_name(v4);
        let range = self.ranges.iter_mut().find(|r| r.is_ipv4() == v4);
        let range = range.ok_or_else(|| ApiError::internal(format!("no {family} service range")))?;
        let ip = range.take_next().ok_or_else(|| {
            ApiError::internal(format!("failed to allocate a cluster IP: range {} is full", range.network()))
        })?;
        taken.ips.push(ip);
        Ok(ip)
    }

    fn allocate_ports(
        &mut self,
        service: &mut Value,
        before: &Holdings,
        taken: &mut Holdings,
    ) -> Result<(), ApiError> {
        let kind = str_at(service, &["spec", "type"]).to_owned();
        let balanced = kind == "LoadBalancer";
        let optional = balanced && service["spec"]["allocateLoadBalancerNodePorts"] == false;
        if kind != "NodePort" && !balanced {
            return Ok(());
        }
        let count = items_at(service, &["spec", "ports"]).len();
        for i in 0..count {
            let port = &items_at(service, &["spec", "ports"])[i];
            let Some(protocol) = Protocol::parse(str_at(port, &["protocol"])) else { continue };
            if let Some(number) = port_number(port, "nodePort") {
                self.take_given_port(
                    service,
                    &format!("spec.ports[{i}].nodePort"),
                    (number, protocol),
                    before,
                    taken,
                )?;
            }
        }
        for i in 0..count {
            let ports = items_at(service, &["spec", "ports"]);
            let port = &ports[i];
            let Some(protocol) = Protocol::parse(str_at(port, &["protocol"])) else { continue };
            if optional || port_number(port, "nodePort").is_some() {
                continue;
            }
            let sibling = ports
                .iter()
                .filter(|p| int_at(p, &["port"]) == int_at(port, &["port"]))
                .find_map(|p| port_number(p, "nodePort"))
                .filter(|n| self.ports.take(*n, protocol));
            let number = sibling.or_else(|| self.ports.take_next(protocol));
            let number = self.port_or_full(number)?;
            taken.ports.push((number, protocol));
            service["spec"]["ports"][i]["nodePort"] = json!(number);
        }
        self.allocate_health_port(service, balanced, before, taken)
    }

    fn port_or_full(&self, number: Option<u16>) -> Result<u16, ApiError> {
        let (first, last) = self.ports.bounds();
        number.ok_or_else(|| {
            ApiError::internal(format!("failed to allocate a node port: {first}-{last} is full"))
        })
    }

    fn allocate_health_port(
        &mut self,
        service: &mut Value,
        balanced: bool,
        before: &Holdings,
        taken: &mut Holdings,
    ) -> Result<(), ApiError> {
        if !balanced || str_at(service, &["spec", "externalTrafficPolicy"]) != "Local" {
            return Ok(());
        }
        match port_number(&service["spec"], "healthCheckNodePort") {
            Some(number) => self.take_given_port(
                service,
                "spec.healthCheckNodePort",
                (number, Protocol::Tcp),
                before,
                taken,
            ),
            None => {
                let number = self.ports.take_next(Protocol::Tcp);
                let number = self.port_or_full(number)?;
                taken.ports.push((number, Protocol::Tcp));
                service["spec"]["healthCheckNodePort"] = json!(number);
                Ok(())
            }
        }
    }

    fn take_given_port(
        &mut self,
        service: &Value,
        field: &str,
        port: (u16, Protocol),
        before: &Holdings,
        taken: &mut Holdings,
    ) -> Result<(), ApiError> {
        if before.ports.contains(&port) {
            return Ok(());
        }
        let (first, last) = self.ports.bounds();
        let why = if !self.ports.contains(port.0) {
            format!("provided port is not in the node port range {first}-{last}; leave it out to get one")
        } else if !self.ports.take(port.0, port.1) {
            "provided port is already allocated; choose another or leave it out".to_owned()
        } else {
            taken.ports.push(port);
            return Ok(());
        };
        Err(invalid(service, field.to_owned(), format!("Invalid value: {}: {why}", port.0)))
    }
}

/// `clusterIPs`, or `clusterIP` alone; both must agree.
fn given_ips(service: &mut Value) -> Result<Vec<String>, ApiError> {
    let list: Vec<String> = items_at(service, &["spec", "clusterIPs"])
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    let single = str_at(service, &["spec", "clusterIP"]).to_owned();
    match (single.as_str(), list.first()) {
        ("", None) => Ok(Vec::new()),
        (_, None) => Ok(vec![single]),
        ("", Some(first)) => Err(invalid(
            service,
            "spec.clusterIPs".to_owned(),
            format!("Invalid value: {first:?}: must be empty when clusterIP is not specified"),
        )),
        (one, Some(first)) if one == first => Ok(list),
        (one, Some(first)) => Err(invalid(
            service,
            "spec.clusterIPs[0]".to_owned(),
            format!("Invalid value: {first:?}: must be the same as clusterIP, {one:?}"),
        )),
    }
}

fn wants_ip(service: &Value) -> bool {
    str_at(service, &["spec", "type"]) != "ExternalName"
}

fn wants_ports(service: &Value) -> bool {
    matches!(str_at(service, &["spec", "type"]), "NodePort" | "LoadBalancer")
}

/// Carries allocated values over to an update that leaves them out, and drops those that came with the old type and
/// were sent back unchanged.
fn carry_over(service: &mut Value, old: &Value) {
    let balanced = |service: &Value| str_at(service, &["spec", "type"]) == "LoadBalancer";
    if balanced(old) && !balanced(service) {
        // Nobody sends there any more.
        object::map_mut(service, "status").insert("loadBalancer".to_owned(), json!({}));
    }
    let (ip_kept, ports_kept) =
        (wants_ip(service) && wants_ip(old), wants_ports(service) && wants_ports(old));
    let (ports_dropped, old_ports) =
        (!wants_ports(service) && wants_ports(old), items_at(old, &["spec", "ports"]));
    let local = str_at(service, &["spec", "type"]) == "LoadBalancer"
        && str_at(service, &["spec", "externalTrafficPolicy"]) == "Local";
    let spec = object::map_mut(service, "spec");
    if ip_kept {
        carry_ips(spec, old);
    }
    if let Some(ports) = spec.get_mut("ports").and_then(Value::as_array_mut) {
        for port in ports {
            let same = |p: &&Value| {
                int_at(p, &["port"]) == int_at(port, &["port"])
                    && Protocol::parse(str_at(p, &["protocol"]))
                        == Protocol::parse(str_at(port, &["protocol"]))
            };
            let Some(number) = old_ports.iter().find(same).and_then(|p| port_number(p, "nodePort")) else {
                continue;
            };
            let Some(port) = port.as_object_mut() else { continue };
            let sent = port.get("nodePort").and_then(Value::as_u64).unwrap_or(0);
            if ports_kept && sent == 0 {
                port.insert("nodePort".to_owned(), json!(number));
            } else if ports_dropped && sent == u64::from(number) {
                port.remove("nodePort");
            }
        }
    }
    drop_stale(spec, old);
    let health = object::at(old, &["spec"]).and_then(|s| port_number(s, "healthCheckNodePort"));
    if let Some(health) = health {
        if local && !spec.contains_key("healthCheckNodePort") {
            spec.insert("healthCheckNodePort".to_owned(), json!(health));
        } else if !local && spec.get("healthCheckNodePort").and_then(Value::as_u64) == Some(u64::from(health))
        {
            spec.remove("healthCheckNodePort");
        }
    }
}

/// Drops settings that belong to the old type when the update sends them back unchanged: a client that only changes
/// the type has read them, it does not ask for them.
fn drop_stale(spec: &mut Map<String, Value>, old: &Value) {
    let kind = spec.get("type").and_then(Value::as_str).unwrap_or("").to_owned();
    let exposed = matches!(kind.as_str(), "NodePort" | "LoadBalancer")
        || spec.get("externalIPs").and_then(Value::as_array).is_some_and(|l| !l.is_empty());
    let sticky = spec.get("sessionAffinity").is_some_and(|a| a == "ClientIP");
    for (key, kept) in [
        ("externalTrafficPolicy", exposed),
        ("allocateLoadBalancerNodePorts", kind == "LoadBalancer"),
        ("loadBalancerClass", kind == "LoadBalancer"),
        ("loadBalancerSourceRanges", kind == "LoadBalancer"),
        ("sessionAffinityConfig", sticky),
        ("internalTrafficPolicy", kind != "ExternalName"),
        ("externalName", kind == "ExternalName"),
    ] {
        if !kept && spec.get(key).is_some_and(|v| object::at(old, &["spec", key]) == Some(v)) {
            spec.remove(key);
        }
    }
}

fn carry_ips(spec: &mut Map<String, Value>, old: &Value) {
    let Some(before) = object::map_at(old, &["spec"]) else { return };
    let empty = |v: Option<&Value>| {
        v.is_none_or(|v| v.as_str() == Some("") || v.as_array().is_some_and(Vec::is_empty))
    };
    let sent_one = !empty(spec.get("clusterIP"));
    if sent_one
        && spec.get("clusterIP") != before.get("clusterIP")
        && spec.get("clusterIPs") == before.get("clusterIPs")
    {
        // A patch of the one field must not be measured against the stale other.
        spec.remove("clusterIPs");
    }
    let sent_list = !empty(spec.get("clusterIPs"));
    if !sent_list && (!sent_one || spec.get("clusterIP") == before.get("clusterIP")) {
        for key in ["clusterIP", "clusterIPs"] {
            if let Some(value) = before.get(key) {
                spec.insert(key.to_owned(), value.clone());
            }
        }
    } else if !sent_one && let Some(first) = spec.get("clusterIPs").and_then(|l| l.get(0)).cloned() {
        spec.insert("clusterIP".to_owned(), first);
    }
    for key in ["ipFamilyPolicy", "ipFamilies"] {
        if empty(spec.get(key))
            && let Some(value) = before.get(key)
        {
            spec.insert(key.to_owned(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests;
