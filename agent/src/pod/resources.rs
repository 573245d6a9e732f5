//! What a pod's resource requests and limits mean: its class, its weight against the out-of-memory
//! killer, and whether the node still has room for it.

use super::model::{Container, Millis, Pod, PodSpec};
use super::quantity;

/// Quality-of-service class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QosClass {
    /// Every container has limits for cpu and memory, equal to its requests.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl QosClass {
    /// The name that `status.qosClass` carries.
    pub fn as_str(self) -> &'static str {
        match self {
            QosClass::Guaranteed => "Guaranteed",
            QosClass::Burstable => "Burstable",
            QosClass::BestEffort => "BestEffort",
        }
    }
}

/// Requests and limits of one container or pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Thousandths of a cpu that are asked for.
    pub cpu_request_milli: Option<i64>,
    /// Thousandths of a cpu that are allowed.
    pub cpu_limit_milli: Option<i64>,
    /// Bytes that are asked for.
    pub memory_request_bytes: Option<i64>,
    /// Bytes that are allowed.
    pub memory_limit_bytes: Option<i64>,
}

/// Reads a container's amounts. Requests that are absent are the limits, as the API defaults them.
pub fn of_container(container: &Container) -> Amounts {
    let needs = &container.resources;
    let cpu = |amount: Option<&super::model::Amount>| amount.and_then(|a| quantity::milli(&a.0));
    let memory = |amount: Option<&super::model::Amount>| amount.and_then(|a| quantity::whole(&a.0));
    let cpu_limit_milli = cpu(needs.limits.get("cpu"));
    let memory_limit_bytes = memory(needs.limits.get("memory"));
    Amounts {
        cpu_request_milli: cpu(needs.requests.get("cpu")).or(cpu_limit_milli),
        cpu_limit_milli,
        memory_request_bytes: memory(needs.requests.get("memory")).or(memory_limit_bytes),
        memory_limit_bytes,
    }
}

/// The amounts of a whole pod. Init containers run one after another, so the largest counts, beside the
/// sidecars that run already; a limit holds for the pod only if every container has one.
pub fn of_pod(spec: &PodSpec) -> Amounts {
    let mains: Vec<Amounts> = spec.containers.iter().map(of_container).collect();
    let sidecars: Vec<Amounts> =
        spec.init_containers.iter().filter(|c| c.is_sidecar()).map(of_container).collect();
    let running: Vec<Amounts> = mains.iter().chain(&sidecars).copied().collect();
    let field = |get: fn(&Amounts) -> Option<i64>, all: bool| -> Option<i64> {
        let sum: i64 = running.iter().filter_map(get).fold(0, i64::saturating_add);
        let present = running.iter().filter_map(get).count();
        let mut beside = 0_i64;
        let mut peak = 0_i64;
        let mut inits = 0;
        for container in &spec.init_containers {
            let amount = get(&of_container(container));
            inits += usize::from(amount.is_some());
            let amount = amount.unwrap_or(0);
            peak = peak.max(beside.saturating_add(amount));
            if container.is_sidecar() {
                beside = beside.saturating_add(amount);
            }
        }
        let complete = present == running.len() && !running.is_empty();
        let any = present > 0 || inits > 0;
        (if all { complete } else { any }).then_some(sum.max(peak))
    };
    Amounts {
        cpu_request_milli: field(|a| a.cpu_request_milli, false),
        cpu_limit_milli: field(|a| a.cpu_limit_milli, true),
        memory_request_bytes: field(|a| a.memory_request_bytes, false),
        memory_limit_bytes: field(|a| a.memory_limit_bytes, true),
    }
}

/// The class of a pod.
pub fn qos(spec: &PodSpec) -> QosClass {
    let all = spec.containers.iter().chain(&spec.init_containers);
    let mut guaranteed = true;
    let mut nothing = true;
    for amounts in all.map(of_container) {
        let set = |v: Option<i64>| v.filter(|v| *v > 0);
        let (cpu, memory) = (set(amounts.cpu_limit_milli), set(amounts.memory_limit_bytes));
        nothing &= set(amounts.cpu_request_milli).is_none() && set(amounts.memory_request_bytes).is_none();
        guaranteed &= cpu.is_some()
            && memory.is_some()
            && cpu == amounts.cpu_request_milli
            && memory == amounts.memory_request_bytes;
    }
    match (nothing, guaranteed) {
        (true, _) => QosClass::BestEffort,
        (_, true) => QosClass::Guaranteed,
        _ => QosClass::Burstable,
    }
}

/// What the kernel's out-of-memory killer is told of a container: -997 for guaranteed ones, 1000 for
/// best-effort ones, and between 2 and 999 by the share of the node's memory that was asked for.
pub fn oom_score_adj(class: QosClass, memory_request_bytes: Option<i64>, node_memory_bytes: i64) -> i32 {
    match class {
        QosClass::Guaranteed => -997,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let request = i128::from(memory_request_bytes.unwrap_or(0));
            let share = 1000 - 1000 * request / i128::from(node_memory_bytes.max(1));
            i32::try_from(share.clamp(2, 999)).unwrap_or(999)
        }
    }
}

/// What the node can give to pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocatable {
    /// Thousandths of a cpu.
    pub cpu_milli: i64,
    /// Bytes.
    pub memory_bytes: i64,
    /// Number of pods.
    pub pods: usize,
}

/// Why a pod may not run here, as `status.reason` and `status.message` carry it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// `OutOfpods`, `OutOfcpu` or `OutOfmemory`.
    pub reason: &'static str,
    /// The figures.
    pub message: String,
}

/// Whether `pod` fits beside `admitted`, the requests of the pods that hold resources already.
pub fn admit(pod: &Pod, admitted: &[Amounts], node: &Allocatable) -> Result<(), Rejection> {
    if admitted.len() >= node.pods {
        let message = format!("the node runs {} pods and may run {}", admitted.len(), node.pods);
        return Err(Rejection { reason: "OutOfpods", message });
    }
    let wanted = of_pod(&pod.spec);
    let check = |resource: &'static str, reason, want: Option<i64>, used: i64, has: i64| match want {
        Some(want) if want > 0 && used.saturating_add(want) > has => Err(Rejection {
            reason,
            message: format!("the node lacks {resource}: requested {want}, used {used}, capacity {has}"),
        }),
        _ => Ok(()),
    };
    let used =
        |get: fn(&Amounts) -> Option<i64>| admitted.iter().filter_map(get).fold(0, i64::saturating_add);
    check(
        "cpu (thousandths)",
        "OutOfcpu",
        wanted.cpu_request_milli,
        used(|a| a.cpu_request_milli),
        node.cpu_milli,
    )?;
    check(
        "memory (bytes)",
        "OutOfmemory",
        wanted.memory_request_bytes,
        used(|a| a.memory_request_bytes),
        node.memory_bytes,
    )
}

/// Seconds as the model's milliseconds, without overflow.
pub fn seconds(s: i64) -> Millis {
    s.saturating_mul(1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::model::Amount;

    fn container(pairs: &[(&str, &str, &str)]) -> Container {
        let mut container = Container::default();
        for (what, resource, value) in pairs {
            let map = match *what {
                "r" => &mut container.resources.requests,
                _ => &mut container.resources.limits,
            };
            map.insert((*resource).to_owned(), Amount((*value).to_owned()));
        }
        container
    }

    fn spec(containers: Vec<Container>) -> PodSpec {
        PodSpec { containers, ..PodSpec::default() }
    }

    #[test]
    fn classes() {
        let full = || container(&[("l", "cpu", "1"), ("l", "memory", "1Gi")]);
        assert_eq!(qos(&spec(vec![full()])), QosClass::Guaranteed);
        assert_eq!(qos(&spec(vec![full(), Container::default()])), QosClass::Burstable);
        assert_eq!(qos(&spec(vec![Container::default()])), QosClass::BestEffort);
        assert_eq!(qos(&spec(vec![container(&[("r", "cpu", "0")])])), QosClass::BestEffort);
        let uneven = container(&[("l", "cpu", "1"), ("l", "memory", "1Gi"), ("r", "cpu", "500m")]);
        assert_eq!(qos(&spec(vec![uneven])), QosClass::Burstable);
    }

    #[test]
    fn pod_amounts_count_the_largest_init_and_the_sidecars() {
        let mut pod = spec(vec![container(&[("r", "cpu", "100m"), ("l", "memory", "10")])]);
        let mut sidecar = container(&[("r", "cpu", "50m"), ("l", "memory", "5")]);
        sidecar.restart_policy = Some(super::super::model::RestartPolicy::Always);
        pod.init_containers = vec![sidecar, container(&[("r", "cpu", "300m")])];
        let amounts = of_pod(&pod);
        assert_eq!(amounts.cpu_request_milli, Some(350));
        assert_eq!(amounts.memory_limit_bytes, Some(15));
        assert_eq!(amounts.cpu_limit_milli, None);
    }

    #[test]
    fn oom_scores_are_ordered_by_class() {
        assert_eq!(oom_score_adj(QosClass::Guaranteed, Some(1), 10), -997);
        assert_eq!(oom_score_adj(QosClass::BestEffort, None, 10), 1000);
        assert_eq!(oom_score_adj(QosClass::Burstable, Some(5), 10), 500);
        assert_eq!(oom_score_adj(QosClass::Burstable, Some(10), 10), 2);
        assert_eq!(oom_score_adj(QosClass::Burstable, None, 10), 999);
        assert_eq!(oom_score_adj(QosClass::Burstable, Some(1), 0), 2);
    }

    #[test]
    fn a_full_node_says_what_is_missing() {
        let node = Allocatable { cpu_milli: 1000, memory_bytes: 100, pods: 2 };
        let pod = Pod { spec: spec(vec![container(&[("r", "cpu", "600m")])]), ..Pod::default() };
        let mine = of_pod(&pod.spec);
        assert_eq!(admit(&pod, &[], &node), Ok(()));
        assert_eq!(admit(&pod, &[mine], &node).unwrap_err().reason, "OutOfcpu");
        assert_eq!(admit(&pod, &[mine, mine], &node).unwrap_err().reason, "OutOfpods");
        let greedy = Pod { spec: spec(vec![container(&[("r", "memory", "101")])]), ..Pod::default() };
        assert_eq!(admit(&greedy, &[], &node).unwrap_err().reason, "OutOfmemory");
        let modest = Pod { spec: spec(vec![Container::default()]), ..Pod::default() };
        let crowded = Amounts { cpu_request_milli: Some(5000), ..Amounts::default() };
        assert_eq!(admit(&modest, &[crowded], &node), Ok(()), "asks for nothing");
    }
}
