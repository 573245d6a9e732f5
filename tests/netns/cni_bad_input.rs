//! What is wrong is refused with the field and the value, by the right code, before anything is done; and whatever comes
//! in by the socket, the agent goes on.

#![expect(unsafe_code, reason = "setresuid for one thread, to be somebody else at a socket")]

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sheave_harness::{require_root, wait_for};

use crate::cni_bed::{Bed, Ctr, Plugin, addresses, ips_of, links_of, with};

const NOBODY: libc::uid_t = 65534;

/// A wrong field, the codes that say so, and what the message names.
fn wrong_fields() -> Vec<(Value, &'static [u64], Vec<&'static str>)> {
    let runtime = |value: Value| json!({"runtimeConfig": value});
    let mapping = |value: Value| json!({"runtimeConfig": {"portMappings": [value]}});
    vec![
        (json!({"cniVersion": 1}), &[1, 6, 7], vec!["cniVersion"]),
        (json!({"cniVersion": "1.0.0.0"}), &[1], vec!["1.0.0.0"]),
        (json!({"name": ["n"]}), &[6, 7], vec!["name"]),
        (json!({"socket": 5}), &[7], vec!["socket", "5"]),
        (json!({"spool": {}}), &[7], vec!["spool"]),
        (json!({"ipMasq": "perhaps"}), &[7], vec!["ipMasq", "perhaps"]),
        (json!({"mtu": 12}), &[7], vec!["mtu", "12"]),
        (json!({"mtu": -1}), &[7], vec!["mtu", "-1"]),
        (json!({"mtu": 100_000}), &[7], vec!["mtu", "100000"]),
        (json!({"ipam": "host-local"}), &[7], vec!["ipam"]),
        (json!({"ipam": {"type": 7}}), &[7], vec!["ipam.type", "7"]),
        (json!({"ipam": {"type": "../evil"}}), &[7], vec!["ipam.type", "../evil"]),
        (json!({"ipam": {"type": "no-such-plugin"}}), &[7], vec!["ipam.type", "no-such-plugin"]),
        (json!({"ipam": {"ranges": [[{"subnet": "10.0.0.0/99"}]]}}), &[7], vec!["ipam.ranges[0][0].subnet"]),
        (json!({"dns": "192.0.2.1"}), &[7], vec!["dns"]),
        (json!({"dns": {"nameservers": "192.0.2.1"}}), &[7], vec!["dns.nameservers"]),
        (runtime(json!([])), &[7], vec!["runtimeConfig"]),
        (runtime(json!({"ips": "10.0.0.1"})), &[7], vec!["runtimeConfig.ips"]),
        (runtime(json!({"ips": ["10.0.0.999"]})), &[7], vec!["runtimeConfig.ips[0]", "10.0.0.999"]),
        (runtime(json!({"ips": ["10.244.8.1", "10.244.8.2"]})), &[2, 7], vec!["ips", "10.244.8.2"]),
        (runtime(json!({"mac": "ff:ff:ff:ff:ff:ff"})), &[7], vec!["runtimeConfig.mac", "ff:ff:ff:ff:ff:ff"]),
        (runtime(json!({"mac": "somewhere"})), &[7], vec!["runtimeConfig.mac", "somewhere"]),
        (runtime(json!({"dns": {"servers": 1}})), &[7], vec!["runtimeConfig.dns.servers"]),
        (runtime(json!({"ipRanges": {}})), &[7], vec!["runtimeConfig.ipRanges"]),
        (
            runtime(json!({"ipRanges": [[{"subnet": "x"}]]})),
            &[7],
            vec!["runtimeConfig.ipRanges[0][0].subnet"],
        ),
        (runtime(json!({"portMappings": {}})), &[7], vec!["runtimeConfig.portMappings"]),
        (mapping(json!({"hostPort": 80})), &[7], vec!["portMappings[0]", "containerPort"]),
        (mapping(json!({"hostPort": 70000, "containerPort": 80})), &[7], vec!["hostPort", "70000"]),
        (mapping(json!({"hostPort": 80, "containerPort": 0})), &[7], vec!["containerPort", "0"]),
        (
            mapping(json!({"hostPort": 80, "containerPort": 80, "protocol": "icmp"})),
            &[2],
            vec!["protocol", "icmp"],
        ),
        (
            mapping(json!({"hostPort": 80, "containerPort": 80, "hostIP": "here"})),
            &[7],
            vec!["hostIP", "here"],
        ),
        (runtime(json!({"bandwidth": 1})), &[7], vec!["bandwidth"]),
        (runtime(json!({"bandwidth": {"ingressRate": -1}})), &[7], vec!["bandwidth.ingressRate", "-1"]),
        (runtime(json!({"bandwidth": {"egressRate": 9}})), &[7], vec!["egressRate", "9"]),
        (json!({"args": {"cni": {"ips": ["nowhere"]}}}), &[7], vec!["args.cni.ips[0]", "nowhere"]),
        (json!({"args": {"cni": {"mac": "x"}}}), &[7], vec!["args.cni.mac", "x"]),
        (json!({"prevResult": []}), &[2, 7], vec!["prevResult"]),
        (json!({"prevResult": {"ips": [{"address": "x"}]}}), &[2, 7], vec!["prevResult.ips[0].address"]),
    ]
}

#[test]
fn every_wrong_field_is_named() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(Plugin::Ours);
    let before = bed.at_rest();
    let ctr = Ctr::new();
    for (more, codes, parts) in wrong_fields() {
        let outcome = bed.call("ADD", &ctr, &with(bed.config("n-wrong"), more.clone()));
        let told = outcome.refusal();
        assert!(codes.contains(&told.code), "{more}: {told:?}");
        assert!(parts.iter().all(|part| told.text.contains(part)), "{more} names {parts:?}: {told:?}");
        assert_eq!(links_of(ctr.netns()).len(), 1, "{more}");
    }
    for (args, part) in [("IP=nowhere", "nowhere"), ("MAC=x", "x"), ("IP=10.244.8.300", "10.244.8.300")] {
        let config = bed.config("n-wrong");
        let mut command = bed.prepared("ADD", &ctr, &config);
        command.env("CNI_ARGS", args);
        let told = crate::cni_bed::run(command, config.to_string().as_bytes()).refusal();
        assert!(told.text.contains("CNI_ARGS") && told.text.contains(part), "{args}: {told:?}");
    }
    assert_eq!(bed.traces(), before);
    // It was the configuration, not the container.
    let result = bed.add(&ctr, &bed.config("n-wrong"));
    assert_eq!(addresses(ctr.netns(), "eth0"), ips_of(&result));
    bed.del(&ctr, &bed.config("n-wrong"));
}

#[test]
fn a_path_that_is_no_namespace_is_refused() {
    if !require_root() {
        return;
    }
    let bed = Bed::shared(Plugin::Ours);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("write a file");
    let config = bed.config("n-path");
    let mount = Path::new("/proc/self/ns/mnt");
    for path in
        [file.as_path(), dir.path(), Path::new("/run/netns/no-such-thing"), mount, Path::new("/dev/null")]
    {
        let mut ctr = Ctr::new();
        ctr.netns_path = Some(path.to_owned());
        for verb in ["ADD", "CHECK"] {
            let config = match verb {
                "CHECK" => with(config.clone(), json!({"prevResult": {"cniVersion": "1.0.0"}})),
                _ => config.clone(),
            };
            let told = bed.call(verb, &ctr, &config).refusal();
            // CHECK may notice first that it knows no such attachment.
            assert!([4, 8, 102].contains(&told.code), "{verb} {}: {told:?}", path.display());
            assert!(told.text.contains(&path.display().to_string()), "{verb}: {told:?}");
        }
        bed.del(&ctr, &config);
    }
}

/// Listens as `uid` and answers every call with `reply`, or never where there is none.
fn pretender(path: &Path, uid: Option<libc::uid_t>, reply: Option<&'static [u8]>) {
    let listener = std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            if let Some(uid) = uid {
                become_user(uid);
            }
            UnixListener::bind(path).expect("listen")
        });
        made.join().expect("a listener")
    });
    std::thread::spawn(move || {
        let mut held = Vec::new();
        // Ends with the test program.
        for stream in listener.incoming().flatten() {
            let mut stream: UnixStream = stream;
            if let Some(reply) = reply {
                let mut head = [0; 4];
                stream.read_exact(&mut head).unwrap_or_default();
                let length = u32::try_from(reply.len()).expect("short");
                stream.write_all(&length.to_le_bytes()).unwrap_or_default();
                stream.write_all(reply).unwrap_or_default();
            }
            // Closed only with its end: one that is gone is another case than one that hangs.
            held.push(stream);
        }
    });
}

/// Changes who the calling thread is, and no other.
fn become_user(uid: libc::uid_t) {
    let same: libc::uid_t = libc::uid_t::MAX;
    // SAFETY: a system call with three numbers; the C library, which would tell other threads too, is not asked.
    let done = unsafe { libc::syscall(libc::SYS_setresuid, same, uid, same) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn an_agent_that_is_not_as_it_should_be_is_told_apart() {
    if !require_root() {
        return;
    }
    let bed = Bed::stopped(Plugin::Ours, &[]);
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).expect("set a mode");
    let at = |name: &str| dir.path().join(name);
    pretender(&at("hung"), None, None);
    pretender(&at("other"), None, Some(br#"{"v":99,"code":0,"msg":"","details":""}"#));
    pretender(&at("noise"), None, Some(b"noise"));
    pretender(&at("stranger"), Some(NOBODY), Some(br#"{"v":1,"code":0,"msg":"","details":"","stdout":{}}"#));
    std::fs::write(at("file"), "").expect("write a file");
    let cases = [
        ("hung", &[11][..], "timed out"),
        ("other", &[1], "99"),
        ("noise", &[6, 11], "JSON"),
        ("stranger", &[11, 50], "65534"),
        ("missing", &[11], "missing"),
        ("file", &[11], "file"),
    ];
    // At once: the one that hangs takes as long as a plugin may.
    std::thread::scope(|scope| {
        for (name, codes, part) in cases {
            let (bed, config) = (&bed, config_of(&bed, dir.path(), name));
            let other = config.clone();
            scope.spawn(move || {
                let ctr = Ctr::new();
                let told = bed.call("ADD", &ctr, &config).refusal();
                assert!(codes.contains(&told.code) && told.text.contains(part), "{name}: {told:?}");
                assert_eq!(links_of(ctr.netns()).len(), 1, "{name}");
            });
            scope.spawn(move || {
                let config = other;
                // The deletion waits for an agent; one that answers otherwise is an error, which runtimes repeat.
                let outcome = bed.call("DEL", &Ctr::new(), &config);
                match name {
                    "other" | "noise" => {
                        assert!([1, 6].contains(&outcome.refusal().code), "{name}: {outcome:?}")
                    }
                    _ => assert_eq!(outcome.status, Some(0), "{name}: {outcome:?}"),
                }
                let told = bed.verb("STATUS", &config).refusal();
                assert!([50, 1, 6].contains(&told.code), "{name}: {told:?}");
            });
        }
    });
    for name in ["hung", "missing", "stranger", "file"] {
        let spooled = std::fs::read_dir(at(&format!("{name}.spool"))).into_iter().flatten().flatten();
        let calls = spooled.filter(|entry| entry.path().extension().is_some_and(|ext| ext == "json"));
        assert_eq!(calls.count(), 1, "{name}: DEL is kept");
    }
}

fn config_of(bed: &Bed, dir: &Path, name: &str) -> Value {
    let (socket, spool) = (dir.join(name), dir.join(format!("{name}.spool")));
    with(bed.config("n-agent"), json!({"socket": socket, "spool": spool, "cniVersion": "1.1.0"}))
}

#[test]
fn only_root_is_served_and_noise_does_no_harm() {
    if !require_root() {
        return;
    }
    let bed = Bed::new(Plugin::Ours);
    let socket = bed.socket();
    let mode = |path: &Path| std::fs::metadata(path).expect("look at it").permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    // Were it open to all, still only root would be served.
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).expect("set a mode");
    for dir in socket.ancestors().skip(1).take(2) {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).expect("set a mode");
    }
    let request =
        json!({"v": 1, "command": "STATUS", "container_id": "", "netns": "", "ifname": "", "args": "",
        "config": with(bed.config("n-noise"), json!({"cniVersion": "1.1.0"}))})
        .to_string();
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set a timeout");
        let sent = stream.write_all(bytes).and_then(|()| stream.shutdown(std::net::Shutdown::Write));
        let mut answer = Vec::new();
        // It may have hung up before all was sent.
        stream.read_to_end(&mut answer).ok();
        (sent.is_ok(), String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned())
    };
    let framed =
        |text: &str| [&u32::try_from(text.len()).expect("short").to_le_bytes()[..], text.as_bytes()].concat();
    let good = ask(&framed(&request)).1;
    assert!(good.contains("\"code\":0"), "{good}");
    let denied = std::thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            become_user(NOBODY);
            ask(&framed(&request)).1
        });
        stranger.join().expect("a stranger")
    });
    assert!(!denied.contains("\"code\":0"), "{denied}");
    let other = request.replace("\"v\":1", "\"v\":7");
    assert!(ask(&framed(&other)).1.contains('7'), "names the version");
    for noise in [
        &[][..],
        &[1],
        &[0xff; 64],
        &framed("noise"),
        &framed("{}"),
        &framed("[1]"),
        &framed(&request)[..40],
        &framed(&request.replace("STATUS", "ADD")),
        &framed(&request.replace("STATUS", "NONSENSE")),
        &framed(&request.replace("\"config\":{", "\"config\":[],\"other\":{")),
    ] {
        let answer = ask(noise).1;
        assert!(!answer.contains("\"code\":0"), "{answer}");
    }
    let (ctr, config) = (Ctr::new(), bed.config("n-noise"));
    let result = bed.add(&ctr, &config);
    bed.del(&ctr, &config);
    bed.assert_gone(&result);
    assert!(bed.ended().is_none(), "the agent goes on");
}

#[test]
fn peers_that_overlap_are_refused_by_name() {
    if !require_root() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("peers.toml");
    let node = |name: &str, ip: &str, range: &str| {
        format!("[[node]]\nname = \"{name}\"\nnode-ips = [\"{ip}\"]\npod-cidrs = [\"{range}\"]\n")
    };
    let path = file.display().to_string();
    for (nodes, parts) in [
        (
            [node("a", "192.0.2.31", "10.245.0.0/16"), node("b", "192.0.2.32", "10.245.3.0/24")],
            &["10.245.0.0/16", "10.245.3.0/24", "overlap"][..],
        ),
        (
            [node("a", "192.0.2.31", "10.245.1.0/24"), node("a", "192.0.2.32", "10.245.2.0/24")],
            &["a", "twice"],
        ),
        ([node("a", "192.0.2.31", "10.245.1.0/99"), String::new()], &["pod-cidrs", "10.245.1.0/99"]),
        ([node("a", "nowhere", "10.245.1.0/24"), String::new()], &["node-ips"]),
        (["[[node]]\nnome = 1\n".to_owned(), String::new()], &["nome"]),
    ] {
        std::fs::write(&file, nodes.concat()).expect("write the peers");
        let bed = Bed::stopped(Plugin::Ours, &["--pod-cidr", "10.244.0.0/24", "--peers", &path]);
        bed.launch();
        let ended = wait_for("the agent to refuse", || bed.ended().ok_or("it runs"));
        let log = bed.log();
        assert!(!ended.success() && log.contains("peers.toml"), "{ended}: {log}");
        assert!(parts.iter().all(|part| log.contains(part)), "{parts:?}: {log}");
    }
}
