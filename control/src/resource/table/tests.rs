//! Tables as kubectl prints them.

use serde_json::json;

use super::*;
use crate::resource::kinds::{
    CONFIG_MAPS, DEPLOYMENTS, ENDPOINT_SLICES, EVENTS, LEASES, NAMESPACES, NODES, PODS, REPLICA_SETS,
    SECRETS, SERVICE_ACCOUNTS, SERVICES, kinds,
};

fn now() -> Timestamp {
    "2026-01-01T00:10:00Z".parse().unwrap()
}

const BORN: &str = "2026-01-01T00:05:00Z";

/// The row as a map from column name to cell.
fn cells(kind: &Kind, mut object: Value) -> Value {
    object::map_mut(&mut object, "metadata").insert("creationTimestamp".to_owned(), json!(BORN));
    object::map_mut(&mut object, "metadata").insert("name".to_owned(), json!("x"));
    let row = row(kind, &object, now(), IncludeObject::None);
    let columns = columns(kind);
    let (columns, cells) = (columns.as_array().unwrap(), row["cells"].as_array().unwrap());
    assert_eq!(columns.len(), cells.len());
    columns.iter().zip(cells).map(|(c, v)| (c["name"].as_str().unwrap().to_owned(), v.clone())).collect()
}

#[test]
fn every_kind_fills_its_columns() {
    for kind in kinds() {
        for object in [json!({}), json!(null), json!({"metadata": [], "spec": "x", "status": 3})] {
            let definitions = columns(kind);
            let row = row(kind, &object, now(), IncludeObject::Metadata);
            let cells = row["cells"].as_array().unwrap();
            assert_eq!(definitions.as_array().unwrap().len(), cells.len(), "{}", kind.plural);
            for (definition, cell) in definitions.as_array().unwrap().iter().zip(cells) {
                assert_eq!(
                    definition["type"] == "integer",
                    cell.is_number(),
                    "{} {}",
                    kind.plural,
                    definition["name"]
                );
            }
            assert_eq!(row["object"]["kind"], "PartialObjectMetadata");
        }
    }
}

fn pod_status(status: Value) -> String {
    let mut pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
    pod["status"] = status;
    cells(&PODS, pod)["Status"].as_str().unwrap().to_owned()
}

#[test]
fn pod_states() {
    let running = json!({"name": "a", "ready": true, "state": {"running": {}}});
    let waiting = |reason: &str| json!({"name": "a", "state": {"waiting": {"reason": reason}}});
    let ended = |reason: &str, code: i32| json!({"name": "a", "state": {"terminated": {"reason": reason, "exitCode": code}}});
    for (status, text) in [
        (json!({"phase": "Pending"}), "Pending"),
        (
            json!({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating")]}),
            "ContainerCreating",
        ),
        (json!({"phase": "Running", "containerStatuses": [running]}), "Running"),
        (
            json!({"phase": "Running", "containerStatuses": [waiting("CrashLoopBackOff"), running]}),
            "CrashLoopBackOff",
        ),
        (json!({"phase": "Succeeded", "containerStatuses": [ended("Completed", 0)]}), "Completed"),
        (json!({"phase": "Failed", "containerStatuses": [ended("Error", 1)]}), "Error"),
        (json!({"phase": "Failed", "containerStatuses": [ended("OOMKilled", 137)]}), "OOMKilled"),
        (json!({"phase": "Failed", "containerStatuses": [ended("", 3)]}), "ExitCode:3"),
        (json!({"phase": "Failed", "reason": "Evicted"}), "Evicted"),
        (
            json!({"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"signal": 9, "exitCode": 137}}}]}),
            "Signal:9",
        ),
        (
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [ended("Completed", 0), running]}),
            "Running",
        ),
        (json!({"phase": "Running", "containerStatuses": [ended("Completed", 0), running]}), "NotReady"),
        (
            json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}),
            "SchedulingGated",
        ),
    ] {
        assert_eq!(pod_status(status.clone()), text, "{status}");
    }
}

#[test]
fn deleted_pods_terminate() {
    let pod = |phase: &str, reason: &str| {
        cells(
            &PODS,
            json!({"metadata": {"deletionTimestamp": BORN}, "status": {"phase": phase, "reason": reason}}),
        )["Status"]
            .clone()
    };
    assert_eq!(pod("Running", ""), "Terminating");
    assert_eq!(pod("Running", "NodeLost"), "Unknown");
    assert_eq!(pod("Succeeded", ""), "Succeeded");
}

#[test]
fn init_containers_come_first() {
    let status = |inits: Value, initialized: &str| {
        let pod = json!({
            "spec": {"initContainers": [{"name": "i"}, {"name": "j"}, {"name": "s", "restartPolicy": "Always"}],
                "containers": [{"name": "a"}]},
            "status": {"phase": "Pending", "initContainerStatuses": inits,
                "conditions": [{"type": "Initialized", "status": initialized}],
                "containerStatuses": [{"state": {"waiting": {"reason": "PodInitializing"}}}]},
        });
        cells(&PODS, pod)
    };
    let done = json!({"name": "i", "state": {"terminated": {"exitCode": 0}}, "restartCount": 2});
    let failed = json!({"name": "j", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}});
    let crashing =
        json!({"name": "j", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "restartCount": 3});
    let side =
        json!({"name": "s", "started": true, "ready": true, "state": {"running": {}}, "restartCount": 1});
    let waiting = json!({"name": "j", "state": {"waiting": {"reason": "PodInitializing"}}});
    assert_eq!(status(json!([waiting]), "False")["Status"], "Init:0/3");
    assert_eq!(status(json!([done, waiting]), "False")["Status"], "Init:1/3");
    assert_eq!(status(json!([done, failed]), "False")["Status"], "Init:Error");
    let row = status(json!([done, crashing]), "False");
    assert_eq!((&row["Status"], &row["Restarts"]), (&json!("Init:CrashLoopBackOff"), &json!("5")));
    let row = status(json!([done, done, side]), "True");
    assert_eq!(
        (&row["Status"], &row["Ready"], &row["Restarts"]),
        (&json!("PodInitializing"), &json!("1/2"), &json!("1"))
    );
}

#[test]
fn pod_columns() {
    let pod = json!({
        "spec": {"nodeName": "n1", "containers": [{"name": "a"}, {"name": "b"}], "readinessGates": [{"conditionType": "G"}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.2"}],
            "conditions": [{"type": "G", "status": "True"}],
            "containerStatuses": [
                {"ready": true, "restartCount": 2, "state": {"running": {}},
                    "lastState": {"terminated": {"finishedAt": "2026-01-01T00:09:55Z"}}},
                {"ready": false, "restartCount": 1, "state": {"running": {}},
                    "lastState": {"terminated": {"finishedAt": "2026-01-01T00:09:00Z"}}}]},
    });
    assert_eq!(
        cells(&PODS, pod),
        json!({"Name": "x", "Ready": "1/2", "Status": "Running", "Restarts": "3 (5s ago)", "Age": "5m", "IP": "10.0.0.2",
            "Node": "n1", "Nominated Node": "<none>", "Readiness Gates": "1/1"})
    );
}

#[test]
fn nodes() {
    let node = json!({
        "metadata": {"labels": {"node-role.kubernetes.io/worker": "", "node-role.kubernetes.io/control-plane": "",
            "kubernetes.io/role": "worker"}},
        "spec": {"unschedulable": true},
        "status": {"conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}],
            "nodeInfo": {"kubeletVersion": "v1", "osImage": "Debian", "kernelVersion": "6.1", "containerRuntimeVersion": "sheave://0.1"}},
    });
    assert_eq!(
        cells(&NODES, node),
        json!({"Name": "x", "Status": "Ready,SchedulingDisabled", "Roles": "control-plane,worker", "Age": "5m", "Version": "v1",
            "Internal-IP": "10.0.0.1", "External-IP": "<none>", "OS-Image": "Debian", "Kernel-Version": "6.1",
            "Container-Runtime": "sheave://0.1"})
    );
    let down = json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
    assert_eq!(cells(&NODES, down)["Status"], "NotReady");
    assert_eq!(cells(&NODES, json!({}))["Status"], "Unknown");
}

#[test]
fn services() {
    let ports = json!([{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]);
    let got = cells(
        &SERVICES,
        json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.2", "ports": ports, "selector": {"a": "b", "c": "d"}}}),
    );
    assert_eq!(
        got,
        json!({"Name": "x", "Type": "NodePort", "Cluster-IP": "10.96.0.2", "External-IP": "<none>",
            "Port(s)": "80:30080/TCP,53/UDP", "Age": "5m", "Selector": "a=b,c=d"})
    );
    let external = |spec: Value| cells(&SERVICES, spec)["External-IP"].clone();
    assert_eq!(external(json!({"spec": {"type": "ExternalName", "externalName": "e.com"}})), "e.com");
    assert_eq!(external(json!({"spec": {"type": "LoadBalancer"}})), "<pending>");
    assert_eq!(
        external(json!({"spec": {"type": "ClusterIP", "externalIPs": ["1.1.1.1", "2.2.2.2"]}})),
        "1.1.1.1,2.2.2.2"
    );
    let balanced = json!({"spec": {"type": "LoadBalancer", "externalIPs": ["3.3.3.3"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "1.1.1.1"}, {"hostname": "h"}]}}});
    assert_eq!(external(balanced), "1.1.1.1,h,3.3.3.3");
    let headless = cells(&SERVICES, json!({"spec": {"clusterIP": "None"}}));
    assert_eq!((&headless["Cluster-IP"], &headless["Port(s)"]), (&json!("None"), &json!("<none>")));
}

#[test]
fn workloads() {
    let spec = json!({"replicas": 3, "selector": {"matchLabels": {"app": "w"}, "matchExpressions": [{"key": "t", "operator": "In", "values": ["a", "b"]}]},
        "template": {"spec": {"containers": [{"name": "a", "image": "i:1"}, {"name": "b", "image": "j"}]}}});
    let status = json!({"replicas": 2, "readyReplicas": 1, "updatedReplicas": 2, "availableReplicas": 1});
    let wide = json!({"Containers": "a,b", "Images": "i:1,j", "Selector": "app=w,t in (a,b)"});
    let mut expected = json!({"Name": "x", "Ready": "1/3", "Up-to-date": 2, "Available": 1, "Age": "5m"});
    expected.as_object_mut().unwrap().extend(wide.as_object().unwrap().clone());
    assert_eq!(cells(&DEPLOYMENTS, json!({"spec": spec, "status": status})), expected);
    let mut expected = json!({"Name": "x", "Desired": 3, "Current": 2, "Ready": 1, "Age": "5m"});
    expected.as_object_mut().unwrap().extend(wide.as_object().unwrap().clone());
    assert_eq!(cells(&REPLICA_SETS, json!({"spec": spec, "status": status})), expected);
}

#[test]
fn events() {
    let event = json!({"type": "Warning", "reason": "BackOff", "message": "again \n", "count": 3,
        "firstTimestamp": "2026-01-01T00:05:00Z", "lastTimestamp": "2026-01-01T00:09:50Z",
        "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec.containers{a}"},
        "source": {"component": "agent", "host": "n1"}});
    assert_eq!(
        cells(&EVENTS, event),
        json!({"Last Seen": "10s (x3 over 5m)", "Type": "Warning", "Reason": "BackOff", "Object": "pod/p", "Subobject": "spec.containers{a}",
            "Source": "agent, n1", "Message": "again", "First Seen": "5m", "Count": 3, "Name": "x"})
    );
    let single = json!({"eventTime": "2026-01-01T00:09:59.123456Z", "involvedObject": {"kind": "Node"}, "reportingComponent": "c"});
    let row = cells(&EVENTS, single);
    assert_eq!(
        (&row["Last Seen"], &row["Object"], &row["Source"], &row["Count"]),
        (&json!("1s"), &json!("node"), &json!("c"), &json!(1))
    );
}

#[test]
fn small_kinds() {
    let row = cells(&CONFIG_MAPS, json!({"data": {"a": "1"}, "binaryData": {"b": "MQ=="}}));
    assert_eq!(row, json!({"Name": "x", "Data": 2, "Age": "5m"}));
    let row = cells(&SECRETS, json!({"type": "Opaque", "data": {"a": "MQ=="}}));
    assert_eq!(row, json!({"Name": "x", "Type": "Opaque", "Data": 1, "Age": "5m"}));
    assert_eq!(cells(&SERVICE_ACCOUNTS, json!({})), json!({"Name": "x", "Secrets": 0, "Age": "5m"}));
    assert_eq!(
        cells(&NAMESPACES, json!({"status": {"phase": "Active"}})),
        json!({"Name": "x", "Status": "Active", "Age": "5m"})
    );
    assert_eq!(
        cells(&LEASES, json!({"spec": {"holderIdentity": "h"}})),
        json!({"Name": "x", "Holder": "h", "Age": "5m"})
    );
    let slice = json!({"addressType": "IPv4", "ports": [{"port": 80}, {}],
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}]});
    assert_eq!(
        cells(&ENDPOINT_SLICES, slice),
        json!({"Name": "x", "AddressType": "IPv4", "Ports": "80,*", "Endpoints": "10.0.0.1,10.0.0.2,10.0.0.3 + 1 more...", "Age": "5m"})
    );
    assert_eq!(cells(&ENDPOINT_SLICES, json!({}))["Ports"], "<unset>");
    let policy = json!({"spec": {"podSelector": {"matchLabels": {"app": "a"}}}});
    assert_eq!(
        cells(&crate::resource::kinds::NETWORK_POLICIES, policy),
        json!({"Name": "x", "Pod-Selector": "app=a", "Age": "5m"})
    );
}

#[test]
fn tables_wrap_rows() {
    let object = json!({"metadata": {"name": "x"}, "data": {"a": "1"}});
    let with = row(&CONFIG_MAPS, &object, now(), IncludeObject::Object);
    assert_eq!(with["object"], object);
    let got = table(&CONFIG_MAPS, vec![with], true, "7");
    assert_eq!((&got["kind"], &got["metadata"]["resourceVersion"]), (&json!("Table"), &json!("7")));
    assert_eq!(got["columnDefinitions"][0]["format"], "name");
    assert_eq!(table(&CONFIG_MAPS, vec![], false, "7")["columnDefinitions"], Value::Null);
    assert_eq!(IncludeObject::parse("None"), IncludeObject::None);
    assert_eq!(IncludeObject::parse(""), IncludeObject::Metadata);
}
