//! Where the demo's node lives: a network namespace with an uplink to a second one that stands for the outside, a
//! cgroup, and a directory, all named after this process. Removing goes on past errors and ends with a look for
//! anything left.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::proc;

/// What everything of a demo is called, followed by the id of its process.
const NAME: &str = "sheave-demo-";

/// The name of the node's object.
pub(super) const NODE: &str = "demo";
/// Addresses of documentation (RFC 5737, RFC 3849): they can be nobody's.
const NODE_IP4: &str = "192.0.2.10";
const OUTSIDE_IP4: &str = "192.0.2.1";
const NODE_IP6: &str = "2001:db8::10";
const OUTSIDE_IP6: &str = "2001:db8::1";

/// How long `sheave up` may take to end when asked to.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// What the demo runs.
pub(super) struct Programs {
    pub(super) sheave: PathBuf,
    pub(super) echo: PathBuf,
    pub(super) image: PathBuf,
}

pub(super) struct Place {
    pub(super) programs: Programs,
    /// `None` on the host itself.
    apart: Option<Apart>,
    dir: PathBuf,
    pin_dir: PathBuf,
    node: Option<Child>,
}

/// What keeps the node apart from the host.
struct Apart {
    netns: String,
    outside: String,
    cgroup: PathBuf,
}

impl Place {
    pub(super) fn make(programs: Programs, on_host: bool) -> Result<Place> {
        let name = format!("{NAME}{}", std::process::id());
        let dir = base_dir().join(&name);
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let pin_dir = Path::new("/sys/fs/bpf").join(&name);
        let mut place = Place { programs, apart: None, dir, pin_dir, node: None };
        let made = place.prepare(&name, on_host);
        match made {
            Ok(()) => Ok(place),
            Err(error) => match place.remove() {
                Ok(()) => Err(error),
                Err(also) => Err(error.context(format!("{also:#}"))),
            },
        }
    }

    fn prepare(&mut self, name: &str, on_host: bool) -> Result<()> {
        if !on_host {
            let apart =
                Apart { netns: name.into(), outside: format!("{name}-out"), cgroup: v2_root()?.join(name) };
            // Known before it is made, so that a failure half-way is cleaned up too.
            let apart = self.apart.insert(apart);
            fs::create_dir(&apart.cgroup).with_context(|| format!("make {}", apart.cgroup.display()))?;
            lay_uplink(apart)?;
        }
        let script = self.enter_script();
        fs::write(&script, self.enter_text()).with_context(|| format!("write {}", script.display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("make the script executable")
    }

    /// Starts `sheave up` in the place.
    pub(super) fn start_node(&mut self) -> Result<()> {
        let log = fs::File::create(self.dir.join("sheave.log")).context("make the node's log")?;
        let mut command = self.inside(&self.programs.sheave);
        command.arg("up").args(self.path_flags()).args(["--node-name", NODE]);
        if self.apart.is_some() {
            command.args(["--node-ip", &format!("{NODE_IP4},{NODE_IP6}")]);
        }
        // A group of its own: Ctrl-C is for the demo, which then ends the node in order.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        self.node = Some(command.spawn().with_context(|| format!("start {}", proc::line(&command)))?);
        Ok(())
    }

    /// An error if the node has ended.
    pub(super) fn check_node(&mut self) -> Result<()> {
        let ended = self.node.as_mut().map(Child::try_wait).transpose().context("look after sheave up")?;
        match ended.flatten() {
            Some(status) => bail!("sheave up ended with {status}"),
            None => Ok(()),
        }
    }

    /// A command in the node's network and cgroup.
    pub(super) fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let Some(apart) = &self.apart else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", apart.netns));
        // Not `ip netns exec`: that hides the cgroups by a /sys of its own.
        command
            .args(["sh", "-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
            .arg(&apart.cgroup)
            .arg(program);
        command
    }

    /// A command beyond the node's uplink; `None` where there is no such place.
    pub(super) fn outside(&self, program: impl AsRef<OsStr>) -> Option<Command> {
        let apart = self.apart.as_ref()?;
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", apart.outside)).arg(program);
        Some(command)
    }

    /// Processes in the node's cgroup and below, pods included.
    pub(super) fn pids(&self) -> Vec<u32> {
        match &self.apart {
            Some(apart) => pids_below(&apart.cgroup),
            None => v2_root().map(|root| pids_below(&root.join("kubepods"))).unwrap_or_default(),
        }
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("state/admin.kubeconfig")
    }

    /// A script that runs its arguments as if on the node.
    pub(super) fn enter_script(&self) -> PathBuf {
        self.dir.join("enter")
    }

    pub(super) fn path_flags(&self) -> Vec<String> {
        let dir = |name: &str| self.dir.join(name).display().to_string();
        let mut flags = vec!["--state-dir".into(), dir("state"), "--run-dir".into(), dir("run")];
        flags.extend([
            "--log-dir".into(),
            dir("log"),
            "--pin-dir".into(),
            self.pin_dir.display().to_string(),
        ]);
        if let Some(apart) = &self.apart {
            flags.extend(["--cgroup-path".into(), apart.cgroup.display().to_string()]);
        }
        flags
    }

    /// The last lines of the node's log.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.dir.join("sheave.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    fn enter_text(&self) -> String {
        let line = proc::line(&self.inside("@"));
        let enter = match &self.apart {
            Some(apart) => format!(
                "echo $$ > {}/cgroup.procs\nexec nsenter --net=/run/netns/{} \"$@\"",
                apart.cgroup.display(),
                apart.netns
            ),
            None => "exec \"$@\"".to_owned(),
        };
        let (kubeconfig, echo) = (self.kubeconfig(), &self.programs.echo);
        // `sheave` must find this node's directories, `echo` must not be the shell's.
        format!(
            "#!/bin/sh\n# Runs a command as if on the demo's node ({line}).\nset -e\n\
            export KUBECONFIG={}\ncase \"$1\" in\n\
            sheave) shift; set -- {} \"$@\" {} ;;\necho) shift; set -- {} \"$@\" ;;\nesac\n{enter}\n",
            kubeconfig.display(),
            self.programs.sheave.display(),
            self.path_flags().join(" "),
            echo.display()
        )
    }

    /// Ends the node and its pods and removes everything; an error names what would not go.
    pub(super) fn remove(&mut self) -> Result<()> {
        let mut failures = Vec::new();
        let mut note = |result: Result<()>| {
            if let Err(error) = result {
                failures.push(format!("{error:#}"));
            }
        };
        if let Some(mut node) = self.node.take() {
            note(end(&mut node));
            note(
                proc::output(
                    self.inside(&self.programs.sheave).args(["down", "--purge"]).args(self.path_flags()),
                )
                .map(drop),
            );
        }
        if let Some(apart) = &self.apart {
            note(remove_cgroups(&apart.cgroup));
            note(remove_netns(&apart.netns));
            note(remove_netns(&apart.outside));
        }
        note(unmount_below(&self.dir));
        note(remove_dir(&self.pin_dir));
        note(remove_dir(&self.dir));
        failures.extend(leftovers(&self.dir, &self.pin_dir));
        if failures.is_empty() { Ok(()) } else { bail!("cleaning up:\n  {}", failures.join("\n  ")) }
    }
}

/// Removes what demos left behind that were killed themselves.
pub(super) fn sweep() -> Result<()> {
    let mut names: Vec<String> = Vec::new();
    for dir in [base_dir(), PathBuf::from("/run/netns"), PathBuf::from("/sys/fs/bpf"), v2_root()?] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().trim_end_matches("-out").to_owned();
            let pid = name.strip_prefix(NAME).and_then(|pid| pid.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    for name in names {
        eprintln!("removing what {name} left behind");
        remove_cgroups(&v2_root()?.join(&name))?;
        remove_netns(&name)?;
        remove_netns(&format!("{name}-out"))?;
        unmount_below(&base_dir().join(&name))?;
        remove_dir(&Path::new("/sys/fs/bpf").join(&name))?;
        remove_dir(&base_dir().join(&name))?;
    }
    Ok(())
}

/// A place in memory where there is one: overlays can lie on it even where the host's root is an overlay itself.
fn base_dir() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let in_memory =
        mounts.lines().any(|line| line.split(' ').nth(1) == Some("/run") && line.starts_with("tmpfs "));
    if in_memory { PathBuf::from("/run") } else { std::env::temp_dir() }
}

fn lay_uplink(apart: &Apart) -> Result<()> {
    let ip = |args: &[&str]| proc::output(Command::new("ip").args(args)).map(drop);
    for netns in [&apart.netns, &apart.outside] {
        ip(&["netns", "add", netns])?;
        ip(&["-n", netns, "link", "set", "lo", "up"])?;
    }
    let (node, outside) = (apart.netns.as_str(), apart.outside.as_str());
    ip(&["-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside])?;
    for (netns, ip4, ip6) in [(node, NODE_IP4, NODE_IP6), (outside, OUTSIDE_IP4, OUTSIDE_IP6)] {
        ip(&["-n", netns, "address", "add", &format!("{ip4}/24"), "dev", "eth0"])?;
        ip(&["-n", netns, "address", "add", &format!("{ip6}/64"), "dev", "eth0", "nodad"])?;
        ip(&["-n", netns, "link", "set", "eth0", "up"])?;
    }
    ip(&["-n", node, "route", "add", "default", "via", OUTSIDE_IP4])?;
    ip(&["-n", node, "-6", "route", "add", "default", "via", OUTSIDE_IP6])
}

/// Asks to end, then kills.
fn end(node: &mut Child) -> Result<()> {
    if node.try_wait().context("look after sheave up")?.is_some() {
        return Ok(());
    }
    proc::output(Command::new("kill").args(["-TERM", &node.id().to_string()]))?;
    let deadline = Instant::now() + END_PATIENCE;
    while Instant::now() < deadline {
        if node.try_wait().context("wait for sheave up")?.is_some() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    node.kill().context("kill sheave up")?;
    node.wait().context("wait for sheave up")?;
    bail!("sheave up did not end within {} s of SIGTERM and was killed", END_PATIENCE.as_secs())
}

/// Mount points of cgroup hierarchies, those of v2 first.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let of = |kind: &str| {
        let lines = text.lines().filter(|line| line.split(' ').nth(2) == Some(kind));
        lines.filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from).collect::<Vec<_>>()
    };
    Ok([of("cgroup2"), of("cgroup")].concat())
}

fn v2_root() -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").context("read the mounts")?;
    let line = text.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let point = line.and_then(|line| line.split(' ').nth(1));
    point
        .map(PathBuf::from)
        .context("no cgroup v2 hierarchy is mounted; Sheave needs one for its eBPF programs")
}

fn pids_below(cgroup: &Path) -> Vec<u32> {
    let read = |dir: &PathBuf| fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let texts: Vec<String> = subtree(cgroup).iter().map(read).collect();
    texts.iter().flat_map(|text| text.lines()).filter_map(|line| line.parse().ok()).collect()
}

/// `top` and the cgroups below it, children first.
fn subtree(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(top).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(subtree(&entry.path()));
        }
    }
    found.push(top.to_owned());
    found
}

/// Kills what is inside and removes the cgroup from every hierarchy.
fn remove_cgroups(cgroup: &Path) -> Result<()> {
    if cgroup.exists() {
        fs::write(cgroup.join("cgroup.kill"), "1").with_context(|| format!("kill {}", cgroup.display()))?;
    }
    let name = cgroup.file_name().context("a cgroup has a name")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    for root in hierarchies()? {
        for dir in subtree(&root.join(name)) {
            loop {
                match fs::remove_dir(&dir) {
                    Err(error) if error.kind() == ErrorKind::NotFound => break,
                    // Killed processes take a moment to leave.
                    Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                    result => break result.with_context(|| format!("remove {}", dir.display()))?,
                }
            }
        }
    }
    Ok(())
}

fn remove_netns(name: &str) -> Result<()> {
    if !Path::new("/run/netns").join(name).exists() {
        return Ok(());
    }
    proc::output(Command::new("ip").args(["netns", "delete", name])).map(drop)
}

fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    points.filter(|point| point.starts_with(dir)).collect()
}

fn unmount_below(dir: &Path) -> Result<()> {
    // Innermost first.
    for point in mounts_below(dir).iter().rev() {
        proc::output(Command::new("umount").arg(point))?;
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// What is still there of this demo.
fn leftovers(dir: &Path, pin_dir: &Path) -> Vec<String> {
    let mut left: Vec<String> =
        mounts_below(dir).iter().map(|point| format!("mount {}", point.display())).collect();
    left.extend([dir, pin_dir].iter().filter(|dir| dir.exists()).map(|dir| dir.display().to_string()));
    let mark = dir.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if words.windows(mark.len()).any(|window| window == mark) {
            left.push(format!("process {}", entry.file_name().to_string_lossy()));
        }
    }
    left
}
