//! Pods, containers and volumes.

use super::*;

#[test]
fn pods() {
    creates(
        &PODS,
        &pod(),
        &[
            ("/spec", Value::Null, "spec", "Required"),
            ("/spec/containers", json!([]), "spec.containers", "Required"),
            (
                "/spec/restartPolicy",
                json!("Sometimes"),
                "spec.restartPolicy",
                "\"Always\", \"OnFailure\", \"Never\"",
            ),
            ("/spec/dnsPolicy", json!("X"), "spec.dnsPolicy", "supported values"),
            ("/spec/dnsPolicy", json!("None"), "spec.dnsConfig.nameservers", "at least one"),
            ("/spec/dnsConfig", json!({"nameservers": ["x"]}), "spec.dnsConfig.nameservers[0]", "IP address"),
            (
                "/spec/dnsConfig",
                json!({"nameservers": ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]}),
                "spec.dnsConfig.nameservers",
                "at most 3",
            ),
            ("/spec/dnsConfig", json!({"searches": ["-x"]}), "spec.dnsConfig.searches[0]", "subdomain"),
            (
                "/spec/terminationGracePeriodSeconds",
                json!(-1),
                "spec.terminationGracePeriodSeconds",
                "greater than or equal to 0",
            ),
            ("/spec/activeDeadlineSeconds", json!(0), "spec.activeDeadlineSeconds", "between 1"),
            ("/spec/hostname", json!("a.b"), "spec.hostname", "label"),
            ("/spec/serviceAccountName", json!("A"), "spec.serviceAccountName", "subdomain"),
            ("/spec/nodeName", json!("A"), "spec.nodeName", "subdomain"),
            ("/spec/nodeSelector", json!({"a": "b c"}), "spec.nodeSelector.a", "label value"),
            (
                "/spec/hostAliases",
                json!([{"ip": "x", "hostnames": ["A"]}]),
                "spec.hostAliases[0].hostnames[0]",
                "subdomain",
            ),
            (
                "/spec/tolerations",
                json!([{"operator": "Equal"}]),
                "spec.tolerations[0].operator",
                "must be Exists",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "operator": "Exists", "value": "b"}]),
                "spec.tolerations[0].value",
                "must be empty",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "operator": "In"}]),
                "spec.tolerations[0].operator",
                "supported values",
            ),
            (
                "/spec/tolerations",
                json!([{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}]),
                "spec.tolerations[0].effect",
                "NoExecute",
            ),
            (
                "/spec/securityContext",
                json!({"runAsUser": -1}),
                "spec.securityContext.runAsUser",
                "between 0",
            ),
            (
                "/spec/securityContext",
                json!({"supplementalGroups": [-1]}),
                "spec.securityContext.supplementalGroups[0]",
                "between 0",
            ),
            (
                "/spec/securityContext",
                json!({"seccompProfile": {"type": "Localhost"}}),
                "spec.securityContext.seccompProfile.localhostProfile",
                "Required",
            ),
            (
                "/spec/securityContext",
                json!({"seccompProfile": {"type": "Nope"}}),
                "spec.securityContext.seccompProfile.type",
                "supported",
            ),
            (
                "/spec/readinessGates",
                json!([{"conditionType": "a b"}]),
                "spec.readinessGates[0].conditionType",
                "name part",
            ),
            ("/status/phase", json!("Dancing"), "status.phase", "supported values"),
        ],
    );
}

#[test]
fn features_that_would_be_missed_are_refused() {
    let required = json!({"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "a"}]});
    creates(
        &PODS,
        &pod(),
        &[
            (
                "/spec/ephemeralContainers",
                json!([{"name": "d"}]),
                "spec.ephemeralContainers",
                "not supported",
            ),
            ("/spec/runtimeClassName", json!("kata"), "spec.runtimeClassName", "not supported"),
            ("/spec/priorityClassName", json!("high"), "spec.priorityClassName", "not supported"),
            ("/spec/hostUsers", json!(false), "spec.hostUsers", "user namespaces"),
            ("/spec/os", json!({"name": "windows"}), "spec.os.name", "\"linux\""),
            ("/spec/schedulingGates", json!([{"name": "g"}]), "spec.schedulingGates", "not supported"),
            (
                "/spec/affinity/podAntiAffinity",
                required.clone(),
                "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution",
                "nodeSelector",
            ),
            (
                "/spec/topologySpreadConstraints",
                json!([{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]),
                "spec.topologySpreadConstraints[0].whenUnsatisfiable",
                "ScheduleAnyway",
            ),
            (
                "/spec/volumes/0",
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "x"}}),
                "spec.volumes[0].persistentVolumeClaim",
                "not supported",
            ),
            (
                "/spec/volumes/0",
                json!({"name": "v", "nfs": {"server": "x", "path": "/"}}),
                "spec.volumes[0].nfs",
                "use one of",
            ),
            (
                "/spec/containers/0/volumeDevices",
                json!([{"name": "v", "devicePath": "/dev/x"}]),
                "spec.containers[0].volumeDevices",
                "not supported",
            ),
            (
                "/spec/containers/0/resources/claims",
                json!([{"name": "x"}]),
                "spec.containers[0].resources.claims",
                "not supported",
            ),
        ],
    );
    accepted(
        &PODS,
        &pod(),
        &[
            (
                "/spec/affinity/podAntiAffinity",
                json!({"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1}]}),
            ),
            ("/spec/topologySpreadConstraints", json!([{"whenUnsatisfiable": "ScheduleAnyway"}])),
            ("/spec/hostUsers", json!(true)),
        ],
    );
}

/// Cases below the first container of a good pod: pointer, blamed field, value, message.
fn container_creates(cases: &[(&str, &str, Value, &str)]) {
    let paths: Vec<(String, String)> = cases
        .iter()
        .map(|(pointer, field, ..)| {
            (format!("/spec/containers/0/{pointer}"), format!("spec.containers[0].{field}"))
        })
        .collect();
    let cases: Vec<(&str, Value, &str, &str)> = cases
        .iter()
        .zip(&paths)
        .map(|((_, _, value, says), (pointer, field))| {
            (pointer.as_str(), value.clone(), field.as_str(), *says)
        })
        .collect();
    creates(&PODS, &pod(), &cases);
}

#[test]
fn container_identity() {
    container_creates(&[
        ("name", "name", Value::Null, "Required"),
        ("name", "name", json!("A"), "label"),
        ("image", "image", Value::Null, "Required"),
        ("image", "image", json!(" i"), "whitespace"),
        ("imagePullPolicy", "imagePullPolicy", json!("X"), "supported"),
        ("terminationMessagePolicy", "terminationMessagePolicy", json!("X"), "supported"),
        ("restartPolicy", "restartPolicy", json!("Always"), "init containers"),
    ]);
}

#[test]
fn container_ports() {
    container_creates(&[
        ("ports/0/containerPort", "ports[0].containerPort", Value::Null, "Required"),
        ("ports/0/containerPort", "ports[0].containerPort", json!(70000), "between 1 and 65535"),
        ("ports/0/protocol", "ports[0].protocol", json!("ICMP"), "supported"),
        ("ports/0/name", "ports[0].name", json!("toolongforaportname"), "15"),
        ("ports/1", "ports[1].name", json!({"name": "http", "containerPort": 81}), "Duplicate"),
        ("ports/0/hostPort", "ports[0].hostPort", json!(-1), "between 1"),
    ]);
}

#[test]
fn container_environment() {
    container_creates(&[
        ("env/0/name", "env[0].name", json!("A=B"), "environment variable"),
        (
            "env/0/valueFrom",
            "env[0].valueFrom",
            json!({"fieldRef": {"fieldPath": "metadata.name"}}),
            "`value` is not empty",
        ),
        ("env/0", "env[0].valueFrom", json!({"name": "A", "valueFrom": {}}), "exactly one"),
        (
            "env/0",
            "env[0].valueFrom.fieldRef.fieldPath",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}),
            "supported",
        ),
        (
            "env/0",
            "env[0].valueFrom.fieldRef.fieldPath",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a"}}}),
            "must end",
        ),
        (
            "env/0",
            "env[0].valueFrom.configMapKeyRef.key",
            json!({"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c"}}}),
            "Required",
        ),
        (
            "env/0",
            "env[0].valueFrom.secretKeyRef.name",
            json!({"name": "A", "valueFrom": {"secretKeyRef": {"key": "c"}}}),
            "Required",
        ),
        (
            "env/0",
            "env[0].valueFrom.resourceFieldRef.resource",
            json!({"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "x"}}}),
            "supported",
        ),
        ("envFrom", "envFrom[0]", json!([{}]), "one of configMapRef"),
        ("envFrom", "envFrom[0].configMapRef.name", json!([{"configMapRef": {}}]), "Required"),
        (
            "envFrom",
            "envFrom[0]",
            json!([{"configMapRef": {"name": "a"}, "secretRef": {"name": "b"}}]),
            "both",
        ),
    ]);
}

#[test]
fn container_mounts() {
    container_creates(&[
        ("volumeMounts/0/name", "volumeMounts[0].name", json!("w"), "Not found: \"w\""),
        ("volumeMounts/0/mountPath", "volumeMounts[0].mountPath", Value::Null, "Required"),
        ("volumeMounts/0/mountPath", "volumeMounts[0].mountPath", json!("a:b"), "':'"),
        ("volumeMounts/0/subPath", "volumeMounts[0].subPath", json!("../x"), "'..'"),
        ("volumeMounts/0/subPath", "volumeMounts[0].subPath", json!("/x"), "relative"),
        (
            "volumeMounts/0/mountPropagation",
            "volumeMounts[0].mountPropagation",
            json!("Bidirectional"),
            "privileged",
        ),
        ("volumeMounts/1", "volumeMounts[1].mountPath", json!({"name": "v", "mountPath": "/v"}), "unique"),
    ]);
}

#[test]
fn container_resources() {
    container_creates(&[
        ("resources/requests/cpu", "resources.requests.cpu", json!("2"), "cpu limit of 1"),
        ("resources/limits/memory", "resources.limits.memory", json!("-1"), "greater than or equal to 0"),
        ("resources/limits/disk", "resources.limits.disk", json!("1"), "domain"),
        ("resources/requests/a.b~1gpu", "resources.requests[a.b/gpu]", json!("1"), "limit must be set"),
        ("resources/limits/a.b~1gpu", "resources.limits[a.b/gpu]", json!("500m"), "integer"),
    ]);
}

#[test]
fn container_probes() {
    container_creates(&[
        ("livenessProbe/httpGet/port", "livenessProbe.httpGet.port", json!(0), "between 1"),
        ("livenessProbe/httpGet/port", "livenessProbe.httpGet.port", json!("a_b"), "port name"),
        ("livenessProbe/httpGet/scheme", "livenessProbe.httpGet.scheme", json!("FTP"), "supported"),
        ("livenessProbe/exec", "livenessProbe.httpGet", json!({"command": ["x"]}), "more than 1 handler"),
        (
            "livenessProbe/periodSeconds",
            "livenessProbe.periodSeconds",
            json!(0),
            "greater than or equal to 1",
        ),
        ("livenessProbe/successThreshold", "livenessProbe.successThreshold", json!(2), "must be 1"),
        ("readinessProbe", "readinessProbe", json!({}), "handler type"),
        ("readinessProbe", "readinessProbe.exec.command", json!({"exec": {}}), "Required"),
        (
            "readinessProbe",
            "readinessProbe.terminationGracePeriodSeconds",
            json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 1}),
            "readiness",
        ),
        ("lifecycle", "lifecycle.preStop", json!({"preStop": {}}), "handler type"),
    ]);
}

#[test]
fn container_security() {
    container_creates(&[
        (
            "securityContext",
            "securityContext.allowPrivilegeEscalation",
            json!({"privileged": true, "allowPrivilegeEscalation": false}),
            "privileged",
        ),
        (
            "securityContext",
            "securityContext.allowPrivilegeEscalation",
            json!({"capabilities": {"add": ["SYS_ADMIN"]}, "allowPrivilegeEscalation": false}),
            "SYS_ADMIN",
        ),
    ]);
}

#[test]
fn containers_together() {
    creates(
        &PODS,
        &pod(),
        &[
            (
                "/spec/containers/1",
                json!({"name": "a", "image": "i"}),
                "spec.containers[1].name",
                "Duplicate",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "a", "image": "i"}]),
                "spec.containers[0].name",
                "Duplicate",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i", "readinessProbe": {"exec": {"command": ["x"]}}}]),
                "spec.initContainers[0].readinessProbe",
                "restartPolicy=Always",
            ),
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i", "restartPolicy": "Never"}]),
                "spec.initContainers[0].restartPolicy",
                "supported",
            ),
        ],
    );
    let mut two = pod();
    put(&mut two, "/spec/containers/0/ports/0/hostPort", json!(80));
    put(
        &mut two,
        "/spec/containers/1",
        json!({"name": "b", "image": "i", "ports": [{"containerPort": 81, "hostPort": 80}]}),
    );
    expect(
        &causes(validate_create(&PODS, &ready(&PODS, two.clone()))),
        "spec.containers[1].ports[0].hostPort",
        "80/TCP",
        "host ports",
    );
    put(&mut two, "/spec/containers/1/ports/0/protocol", json!("UDP"));
    assert_eq!(causes(validate_create(&PODS, &ready(&PODS, two))), [], "protocols have ports of their own");
    let mut host = pod();
    put(&mut host, "/spec/hostNetwork", json!(true));
    put(&mut host, "/spec/containers/0/ports/0/hostPort", json!(81));
    expect(
        &causes(validate_create(&PODS, &ready(&PODS, host))),
        "spec.containers[0].ports[0].hostPort",
        "must match",
        "host network",
    );
}

#[test]
fn good_containers() {
    accepted(
        &PODS,
        &pod(),
        &[
            (
                "/spec/initContainers",
                json!([{"name": "i", "image": "i"}, {"name": "s", "image": "s", "restartPolicy": "Always",
                "startupProbe": {"exec": {"command": ["true"]}}}]),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a.b/c']"}}}),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}),
            ),
            (
                "/spec/containers/0/env/1",
                json!({"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": true}}}),
            ),
            ("/spec/containers/0/resources", json!({"limits": {"a.b/gpu": "1"}})),
            ("/spec/containers/0/resources", json!({"limits": {"cpu": "0.1"}, "requests": {"cpu": "100m"}})),
            ("/spec/containers/0/lifecycle", json!({"preStop": {"sleep": {"seconds": 5}}})),
            ("/spec/containers/0/readinessProbe", json!({"tcpSocket": {"port": 80}, "successThreshold": 3})),
            ("/spec/containers/0/readinessProbe", json!({"grpc": {"port": 80}})),
        ],
    );
}

#[test]
fn volumes() {
    let v = |source: Value| {
        let mut volume = json!({"name": "v"});
        volume.as_object_mut().unwrap().extend(source.as_object().unwrap().clone());
        volume
    };
    creates(
        &PODS,
        &pod(),
        &[
            ("/spec/volumes/0/name", json!("A"), "spec.volumes[0].name", "label"),
            ("/spec/volumes/1", json!({"name": "v"}), "spec.volumes[1].name", "Duplicate"),
            (
                "/spec/volumes/0/hostPath",
                json!({"path": "/x"}),
                "spec.volumes[0].hostPath",
                "more than 1 volume type",
            ),
            ("/spec/volumes/0", v(json!({"hostPath": {}})), "spec.volumes[0].hostPath.path", "Required"),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "/a/../b"}})),
                "spec.volumes[0].hostPath.path",
                "'..'",
            ),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "a"}})),
                "spec.volumes[0].hostPath.path",
                "absolute",
            ),
            (
                "/spec/volumes/0",
                v(json!({"hostPath": {"path": "/a", "type": "Dir"}})),
                "spec.volumes[0].hostPath.type",
                "supported",
            ),
            (
                "/spec/volumes/0",
                v(json!({"emptyDir": {"medium": "Gold"}})),
                "spec.volumes[0].emptyDir.medium",
                "Memory",
            ),
            (
                "/spec/volumes/0",
                v(json!({"emptyDir": {"sizeLimit": "-1"}})),
                "spec.volumes[0].emptyDir.sizeLimit",
                "greater",
            ),
            ("/spec/volumes/0", v(json!({"configMap": {}})), "spec.volumes[0].configMap.name", "Required"),
            (
                "/spec/volumes/0",
                v(json!({"secret": {"secretName": "s", "defaultMode": 1000}})),
                "spec.volumes[0].secret.defaultMode",
                "511",
            ),
            (
                "/spec/volumes/0",
                v(json!({"secret": {"secretName": "s", "items": [{"key": "k", "path": "../p"}]}})),
                "spec.volumes[0].secret.items[0].path",
                "'..'",
            ),
            (
                "/spec/volumes/0",
                v(json!({"downwardAPI": {"items": [{"path": "p"}]}})),
                "spec.volumes[0].downwardAPI.items[0]",
                "one of fieldRef",
            ),
            (
                "/spec/volumes/0",
                v(json!({"projected": {"sources": []}})),
                "spec.volumes[0].projected.sources",
                "Required",
            ),
            (
                "/spec/volumes/0",
                v(json!({"projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}})),
                "spec.volumes[0].projected.sources[0].serviceAccountToken",
                "not supported",
            ),
        ],
    );
    accepted(
        &PODS,
        &pod(),
        &[
            ("/spec/volumes/0", v(json!({}))),
            ("/spec/volumes/0", v(json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}))),
            ("/spec/volumes/0", v(json!({"hostPath": {"path": "/a", "type": "DirectoryOrCreate"}}))),
            (
                "/spec/volumes/0",
                v(
                    json!({"projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {"name": "s"}}]}}),
                ),
            ),
        ],
    );
}

#[test]
fn node_affinity() {
    const FIELD: &str =
        "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    let pointer = "/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution";
    let rule = |rule: Value| json!({"nodeSelectorTerms": [{"matchExpressions": [rule]}]});
    let at = |part: &str| format!("{FIELD}[0].matchExpressions[0].{part}");
    let name_rule = json!({"nodeSelectorTerms": [{"matchFields": [{"key": "spec.x", "operator": "In", "values": ["a"]}]}]});
    let name_field = format!("{FIELD}[0].matchFields[0].key");
    creates(
        &PODS,
        &pod(),
        &[
            (pointer, json!({}), FIELD, "at least one"),
            (pointer, rule(json!({"key": "a", "operator": "Is"})), &at("operator"), "supported values"),
            (pointer, rule(json!({"key": "a", "operator": "In"})), &at("values"), "Required"),
            (
                pointer,
                rule(json!({"key": "a", "operator": "Exists", "values": ["b"]})),
                &at("values"),
                "Forbidden",
            ),
            (pointer, rule(json!({"key": "a", "operator": "Gt", "values": ["b"]})), &at("values"), "integer"),
            (pointer, rule(json!({"key": "a b", "operator": "Exists"})), &at("key"), "name part"),
            (pointer, name_rule, &name_field, "metadata.name"),
            (
                "/spec/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution",
                json!([{"weight": 0, "preference": {}}]),
                "spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight",
                "between 1 and 100",
            ),
        ],
    );
    let by_name = json!({"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["a"]}]}]});
    accepted(
        &PODS,
        &pod(),
        &[
            (pointer, rule(json!({"key": "a", "operator": "In", "values": ["b", "c"]}))),
            (pointer, rule(json!({"key": "a", "operator": "Lt", "values": ["5"]}))),
            (pointer, by_name),
        ],
    );
}

#[test]
fn pod_updates() {
    let mut good = pod();
    put(&mut good, "/spec/activeDeadlineSeconds", json!(100));
    put(
        &mut good,
        "/spec/tolerations",
        json!([{"key": "a", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}]),
    );
    updates(
        &PODS,
        &good,
        &[
            ("/metadata/labels", json!({"a": "b"}), "", ""),
            ("/spec/containers/0/image", json!("i:2"), "", ""),
            ("/spec/activeDeadlineSeconds", json!(50), "", ""),
            ("/spec/activeDeadlineSeconds", json!(500), "spec.activeDeadlineSeconds", "lowered"),
            ("/spec/activeDeadlineSeconds", Value::Null, "spec.activeDeadlineSeconds", "lowered"),
            ("/spec/tolerations/1", json!({"key": "b", "operator": "Exists"}), "", ""),
            ("/spec/tolerations/0/tolerationSeconds", json!(9), "", ""),
            ("/spec/tolerations/0/key", json!("c"), "spec.tolerations", "existing tolerations"),
            ("/spec/containers/0/args", json!(["x"]), "spec", "`spec.containers[0]` differs"),
            ("/spec/containers/1", json!({"name": "b", "image": "i"}), "spec", "`spec.containers` differs"),
            ("/spec/restartPolicy", json!("Never"), "spec", "`spec.restartPolicy` differs"),
            ("/spec/containers/0/image", json!(""), "spec.containers[0].image", "Required"),
        ],
    );
    let mut bare = pod();
    put(&mut bare, "/spec/containers/0/image", json!("i:3"));
    assert_eq!(
        causes(validate_update(&PODS, &ready(&PODS, bare), &pod())),
        [],
        "stored without the defaults of today"
    );
}

#[test]
fn what_stays_is_not_checked_again() {
    let mut old = ready(&PODS, pod());
    put(&mut old, "/spec/runtimeClassName", json!("kata"));
    let mut new = old.clone();
    put(&mut new, "/status/phase", json!("Running"));
    assert_eq!(causes(validate_update(&PODS, &new, &old)), []);
}

#[test]
fn causes_are_bounded() {
    let containers: Vec<Value> = (0..200).map(|_| json!({})).collect();
    let mut bad = pod();
    put(&mut bad, "/spec/containers", Value::Array(containers));
    assert_eq!(causes(validate_create(&PODS, &ready(&PODS, bad))).len(), 50);
}
