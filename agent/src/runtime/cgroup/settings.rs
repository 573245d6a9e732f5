//! Limits in the words of the kernel. Pure; the numbers follow kubelet and runc so that a pod moved here
//! weighs what it weighed there.

use super::{Limits, Setting};

/// Length of the CPU bandwidth period.
const CPU_PERIOD_US: u64 = 100_000;
/// Least quota the kernel takes.
const CPU_QUOTA_MIN_US: u64 = 1_000;

fn quota_us(limit_milli: u64) -> u64 {
    (limit_milli.saturating_mul(CPU_PERIOD_US) / 1000).max(CPU_QUOTA_MIN_US)
}

fn shares(request_milli: u64) -> u64 {
    (request_milli.saturating_mul(1024) / 1000).clamp(2, 262_144)
}

/// v2 weight of v1 shares: 1 to 10000, 100 for the default of 1024.
fn weight(shares: u64) -> u64 {
    let l = (shares.clamp(2, 262_144) as f64).log2();
    (10f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil() as u64).clamp(1, 10_000)
}

fn setting(controller: &'static str, file: &'static str, value: impl ToString) -> Setting {
    Setting { controller, file, value: value.to_string(), optional: false }
}

/// What to write in the v2 hierarchy.
pub(super) fn unified(limits: &Limits) -> Vec<Setting> {
    let resources = &limits.resources;
    let mut out = Vec::new();
    if let Some(milli) = resources.cpu_request_milli {
        out.push(setting("cpu", "cpu.weight", weight(shares(milli))));
    }
    if let Some(milli) = resources.cpu_limit_milli {
        out.push(setting("cpu", "cpu.max", format!("{} {CPU_PERIOD_US}", quota_us(milli))));
    }
    if let Some(bytes) = resources.memory_limit_bytes {
        out.push(setting("memory", "memory.max", bytes));
        out.push(Setting { optional: true, ..setting("memory", "memory.swap.max", 0) });
    }
    if limits.oom_group {
        out.push(setting("memory", "memory.oom.group", 1));
    }
    if let Some(count) = resources.pids_max {
        out.push(setting("pids", "pids.max", count));
    }
    out
}

/// What to write in the v1 hierarchies.
pub(super) fn legacy(limits: &Limits) -> Vec<Setting> {
    let resources = &limits.resources;
    let mut out = Vec::new();
    if let Some(milli) = resources.cpu_request_milli {
        out.push(setting("cpu", "cpu.shares", shares(milli)));
    }
    if let Some(milli) = resources.cpu_limit_milli {
        out.push(setting("cpu", "cpu.cfs_period_us", CPU_PERIOD_US));
        out.push(setting("cpu", "cpu.cfs_quota_us", quota_us(milli)));
    }
    if let Some(bytes) = resources.memory_limit_bytes {
        out.push(setting("memory", "memory.limit_in_bytes", bytes));
        out.push(Setting { optional: true, ..setting("memory", "memory.memsw.limit_in_bytes", bytes) });
    }
    if let Some(count) = resources.pids_max {
        out.push(setting("pids", "pids.max", count));
    }
    if limits.restrict_devices {
        out.push(setting("devices", "devices.deny", "a"));
        out.extend(super::device::ALLOWED.iter().map(|d| setting("devices", "devices.allow", d)));
    }
    out
}

/// The `oom_kill` counter of `memory.events` (v2) or `memory.oom_control` (v1).
pub(super) fn oom_kills(text: &str) -> u64 {
    let count = text.lines().find_map(|l| l.strip_prefix("oom_kill "));
    count.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::spec::Resources;

    #[test]
    fn shares_and_weights_are_kubelets() {
        assert_eq!([0, 1, 100, 250, 1000, 4000].map(shares), [2, 2, 102, 256, 1024, 4096]);
        let weights = [100, 250, 500, 1000, 2000, 4000].map(|m| weight(shares(m)));
        assert_eq!(weights, [17, 35, 59, 100, 174, 303]);
    }

    #[test]
    fn quota_has_a_floor() {
        assert_eq!([1, 10, 500, 2000].map(quota_us), [1000, 1000, 50_000, 200_000]);
    }

    #[test]
    fn no_limits_write_nothing() {
        assert!(unified(&Limits::default()).is_empty());
        assert!(legacy(&Limits::default()).is_empty());
    }

    #[test]
    fn limits_are_written_in_an_order_the_kernel_takes() {
        let resources = Resources {
            cpu_request_milli: Some(100),
            cpu_limit_milli: Some(500),
            memory_limit_bytes: Some(1 << 20),
            pids_max: Some(7),
        };
        let limits = Limits { resources, restrict_devices: true, oom_group: true };
        let line = |s: &Setting| format!("{}={}", s.file, s.value);
        let v2: Vec<_> = unified(&limits).iter().map(line).collect();
        let expected = ["cpu.weight=17", "cpu.max=50000 100000", "memory.max=1048576", "memory.swap.max=0"];
        assert_eq!(v2[..4], expected);
        assert_eq!(v2[4..], ["memory.oom.group=1", "pids.max=7"]);
        let v1: Vec<_> = legacy(&limits).iter().map(line).collect();
        let at = |needle: &str| v1.iter().position(|l| l.starts_with(needle)).unwrap();
        assert!(at("memory.limit_in_bytes") < at("memory.memsw.limit_in_bytes"));
        assert!(at("devices.deny=a") < at("devices.allow="));
    }

    #[test]
    fn oom_counters_of_both_versions_are_read() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 1\n"), 1);
        assert_eq!(oom_kills(""), 0);
    }
}
