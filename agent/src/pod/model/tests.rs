//! What of the API's objects is read, and what is made of odd values.

use super::*;

#[test]
fn absent_fields_get_the_defaults_of_the_api() {
    let spec: PodSpec = serde_json::from_str(
        r#"{"containers":[{"name":"a","image":"x","readinessProbe":{"httpGet":{"port":"web"}},
            "ports":[{"name":"web","containerPort":80}],"resources":{"requests":{"cpu":1,"memory":"1Gi"}}}],
            "volumes":[{"name":"v"}]}"#,
    )
    .expect("a short spec");
    let container = &spec.containers[0];
    let probe = container.readiness_probe.as_ref().expect("the probe");
    assert_eq!((probe.timeout_seconds, probe.period_seconds, probe.failure_threshold), (1, 10, 3));
    let http = probe.handler.http_get.as_ref().expect("the handler");
    assert_eq!(container.port(&http.port), Some(80));
    assert_eq!(container.port(&PortRef::Name("other".into())), None);
    assert_eq!(container.port(&PortRef::Number(70000)), None);
    assert_eq!(container.resources.requests["cpu"], Amount("1".into()));
    assert_eq!(spec.termination_grace_period_seconds, 30);
    assert_eq!(spec.restart_policy, RestartPolicy::Always);
    assert_eq!(spec.volumes[0].source, VolumeSource::EmptyDir { memory: false, size_limit: None });
}

#[test]
fn unknown_values_do_not_fail_the_decoding() {
    let spec: PodSpec = serde_json::from_str(
        r#"{"restartPolicy":"Sometimes","dnsPolicy":"X","volumes":[
            {"name":"a","nfs":{"server":"s"}},{"name":"kube-api-access-x1","projected":{"sources":[]}},
            {"name":"b","emptyDir":{"medium":"HugePages"}}]}"#,
    )
    .expect("unknown values");
    assert_eq!(spec.restart_policy, RestartPolicy::Unknown);
    assert_eq!(spec.volumes[0].source, VolumeSource::Unsupported("nfs".into()));
    assert_eq!(spec.volumes[1].source, VolumeSource::ServiceAccountToken);
    assert_eq!(spec.volumes[2].source, VolumeSource::Unsupported("emptyDir on medium HugePages".into()));
}

#[test]
fn a_pod_survives_being_written_down() {
    let text = r#"{"namespace":"n","name":"p","uid":"u","spec":{"containers":[{"name":"c","image":"i",
        "lifecycle":{"preStop":{"exec":{"command":["true"]}}},"env":[{"name":"A","value":"b"}]}],
        "volumes":[{"name":"s","secret":{"secretName":"x","defaultMode":256}},
        {"name":"h","hostPath":{"path":"/x","type":"Directory"}},{"name":"u","nfs":{}},
        {"name":"m","emptyDir":{"medium":"Memory","sizeLimit":"1Mi"}}]}}"#;
    let pod: Pod = serde_json::from_str(text).expect("a pod");
    let again: Pod =
        serde_json::from_str(&serde_json::to_string(&pod).expect("written")).expect("read again");
    assert_eq!(pod, again);
    let VolumeSource::Secret(files) = &pod.spec.volumes[0].source else { panic!("a secret") };
    assert_eq!((files.name.as_str(), files.default_mode), ("x", Some(256)));
}
