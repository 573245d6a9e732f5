//! One run of one guest: boots in about two seconds even where the processor is emulated, runs one command as root and
//! gives its output and exit status back. Whatever becomes of the guest, nothing of it stays on the host.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::proc;

/// What to run, and in what.
pub(crate) struct Guest {
    pub(crate) kernel: Kernel,
    pub(crate) cpus: u8,
    pub(crate) memory_mb: u32,
    pub(crate) timeout: Duration,
    /// Shared for writing, at the same path.
    pub(crate) write: Option<PathBuf>,
    pub(crate) modules: Vec<String>,
    pub(crate) verbose: bool,
    pub(crate) cwd: PathBuf,
    pub(crate) command: Vec<String>,
}

/// The exit status of a guest that was stopped at its time limit, as of timeout(1).
const TIMED_OUT: u8 = 124;

const INIT: &str = include_str!("init.sh");
const BUSYBOX: &str = "/bin/busybox";
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// Boot faster: no self-tests of cryptography, no clearing of memory, no waiting for jitter, and a clock rate given
/// instead of measured. `panic=-1` with qemu's `-no-reboot` turns a dead guest into a finished one.
const KERNEL_ARGS: &str = "console=ttyS0 panic=-1 oops=panic nokaslr mitigations=off cryptomgr.notests=1 no_timer_check \
    init_on_alloc=0 audit=0 apparmor=0 initcall_blacklist=jent_mod_init rcupdate.rcu_cpu_stall_suppress=1 loglevel=5";

/// Runs the guest to its end, copying its output here as it comes, and returns the command's exit status.
pub(crate) fn run(guest: &Guest) -> Result<u8> {
    let work = WorkDir::new()?;
    write_initrd(guest, &work.0.join("initrd"))?;
    for name in ["out", "status", "console"] {
        fs::write(work.0.join(name), "").with_context(|| format!("make {name}"))?;
    }
    let mut shares = vec![Share::start("root", Path::new("/"), true, &work.0)?];
    if let Some(dir) = &guest.write {
        shares.push(Share::start("write", dir, false, &work.0)?);
    }
    let mut command = qemu(guest, &work.0, &shares)?;
    let child = command.spawn().with_context(|| format!("start {}", proc::line(&command)))?;
    let finished = attend(&mut Killed(child), &work.0, guest.timeout)?;
    let console = fs::read(work.0.join("console")).context("read the guest's console")?;
    let console = String::from_utf8_lossy(&console);
    if guest.verbose {
        eprintln!("{console}");
    }
    let status = fs::read_to_string(work.0.join("status")).context("read the guest's status")?;
    match status.trim().parse::<u8>() {
        Ok(status) => Ok(status),
        Err(_) if !finished => {
            eprintln!("the guest was stopped after {} s", guest.timeout.as_secs());
            Ok(TIMED_OUT)
        }
        Err(_) => {
            let lines: Vec<_> = console.lines().collect();
            eprintln!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            bail!("the guest ended without a status; its last messages are above")
        }
    }
}

/// Copies the guest's output until it ends (true) or its time is over (false).
fn attend(machine: &mut Killed, work: &Path, timeout: Duration) -> Result<bool> {
    let mut out = File::open(work.join("out")).context("open the guest's output")?;
    let deadline = Instant::now() + timeout;
    loop {
        let ended = machine.0.try_wait().context("wait for qemu")?.is_some();
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).context("read the guest's output")?;
        std::io::stdout().write_all(&bytes)?;
        std::io::stdout().flush()?;
        if ended || Instant::now() > deadline {
            return Ok(ended);
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}

fn qemu(guest: &Guest, work: &Path, shares: &[Share]) -> Result<Command> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // The smallest machine; without these three parts its clock never starts.
    qemu.args(["-machine", "microvm,pit=on,pic=on,rtc=on,memory-backend=mem"]);
    qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
    qemu.arg("-object").arg(format!("memory-backend-memfd,id=mem,size={}M,share=on", guest.memory_mb));
    let mut append = KERNEL_ARGS.to_owned();
    if hardware_virtualisation()? {
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        qemu.args(["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off"]);
        append.push_str(&format!(" tsc=reliable tsc_early_khz={}", clock_khz()?));
    }
    qemu.args(["-smp", &guest.cpus.to_string(), "-m", &guest.memory_mb.to_string()]);
    qemu.arg("-kernel")
        .arg(guest.kernel.image())
        .arg("-initrd")
        .arg(work.join("initrd"))
        .args(["-append", &append]);
    qemu.arg("-serial").arg(format!("file:{}", work.join("console").display()));
    qemu.args(["-device", "virtio-serial-device"]);
    for port in ["out", "status"] {
        qemu.arg("-chardev").arg(format!("file,id={port},path={}", work.join(port).display()));
        qemu.arg("-device").arg(format!("virtserialport,chardev={port},name={port}"));
    }
    for share in shares {
        qemu.arg("-chardev").arg(format!("socket,id={},path={}", share.tag, share.socket.display()));
        qemu.arg("-device").arg(format!("vhost-user-fs-device,chardev={},tag={}", share.tag, share.tag));
    }
    qemu.stdin(Stdio::null()).stdout(Stdio::null());
    Ok(qemu)
}

/// A /dev/kvm that opens is not enough: without these flags below it, it cannot run an ordinary kernel, and qemu's own
/// fall-back does not notice.
fn hardware_virtualisation() -> Result<bool> {
    let info = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let able = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    Ok(able && File::options().read(true).write(true).open("/dev/kvm").is_ok())
}

fn clock_khz() -> Result<u64> {
    let info = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
    let line =
        info.lines().find(|line| line.starts_with("cpu MHz")).context("/proc/cpuinfo names no clock rate")?;
    let mhz: f64 = line.rsplit(' ').next().unwrap_or_default().parse().context("read the clock rate")?;
    Ok((mhz * 1000.0) as u64)
}

/// The first root filesystem: busybox, the kernel's modules, and this run's command.
fn write_initrd(guest: &Guest, path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let mut out = BufWriter::new(file);
    // The kernel unpacks archives one after another.
    let modules = fs::read(guest.kernel.modules()).context("read the module archive")?;
    out.write_all(&modules).context("write the initrd")?;
    let mut archive = Archive::new(out);
    for name in ["bin", "dev", "etc", "lower", "over", "proc", "root", "run", "sys", "tmp", "top"] {
        archive.directory(name)?;
    }
    archive.device("dev/console", 5, 1)?;
    archive.link("sbin", "bin")?;
    let busybox = fs::read(BUSYBOX).with_context(|| format!("read {BUSYBOX}"))?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    for applet in proc::output(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|name| *name != "busybox")
    {
        archive.link(&format!("bin/{applet}"), "busybox")?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    let words: Vec<_> = guest.command.iter().map(|word| quoted(word)).collect();
    archive.file("command", 0o644, words.join(" ").as_bytes())?;
    let write = guest.write.as_ref().map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    let settings = format!(
        "cwd={}\nwrite={}\nmodules={}\n",
        quoted(&guest.cwd.to_string_lossy()),
        quoted(&write),
        quoted(&guest.modules.join(" "))
    );
    archive.file("settings", 0o644, settings.as_bytes())?;
    archive.finish()?.flush().context("write the initrd")
}

/// One word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A directory of the host that the guest sees.
struct Share {
    tag: &'static str,
    socket: PathBuf,
    _daemon: Killed,
}

impl Share {
    fn start(tag: &'static str, dir: &Path, read_only: bool, work: &Path) -> Result<Share> {
        let socket = work.join(format!("{tag}.socket"));
        // virtiofsd cannot export read-only, so it is given a read-only view, in a mount namespace that ends with it.
        let script = r#"set -e
            if [ "$1" = ro ]; then mount --rbind "$2" "$3"; mount -o remount,bind,ro "$3"; set -- "$1" "$3" "$3" "$4"; fi
            exec "$0" --socket-path="$4" -o source="$2" -o cache=always -o sandbox=chroot"#;
        let view = work.join(format!("{tag}.view"));
        fs::create_dir(&view).with_context(|| format!("make {}", view.display()))?;
        let log = work.join(format!("{tag}.log"));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, VIRTIOFSD]);
        command.arg(if read_only { "ro" } else { "rw" }).arg(dir).arg(&view).arg(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).with_context(|| format!("make {}", log.display()))?);
        let child = command.spawn().with_context(|| format!("start {}", proc::line(&command)))?;
        let mut daemon = Killed(child);
        while !socket.exists() {
            if let Some(status) = daemon.0.try_wait().context("wait for virtiofsd")? {
                bail!("virtiofsd: {status}: {}", fs::read_to_string(&log).unwrap_or_default().trim());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Share { tag, socket, _daemon: daemon })
    }
}

/// A child that does not outlive its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A directory for one run, removed after it.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new() -> Result<WorkDir> {
        let dir = std::env::temp_dir().join(format!("sheave-vm-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).context("protect the work directory")?;
        Ok(WorkDir(dir))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \\", ""] {
            let printed =
                proc::output(Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]));
            assert_eq!(printed.expect("sh runs"), word);
        }
    }
}
