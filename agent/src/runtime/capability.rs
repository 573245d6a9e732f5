//! Capabilities by name and number. Pure.

/// A capability of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability(u8);

/// In the order of their numbers.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

impl Capability {
    pub(super) const CHOWN: Capability = Capability(0);
    pub(super) const DAC_OVERRIDE: Capability = Capability(1);
    pub(super) const DAC_READ_SEARCH: Capability = Capability(2);
    pub(super) const FOWNER: Capability = Capability(3);
    pub(super) const FSETID: Capability = Capability(4);
    pub(super) const KILL: Capability = Capability(5);
    pub(super) const SETGID: Capability = Capability(6);
    pub(super) const SETUID: Capability = Capability(7);
    pub(super) const SETPCAP: Capability = Capability(8);
    pub(super) const NET_BIND_SERVICE: Capability = Capability(10);
    pub(super) const NET_RAW: Capability = Capability(13);
    pub(super) const SYS_MODULE: Capability = Capability(16);
    pub(super) const SYS_CHROOT: Capability = Capability(18);
    pub(super) const SYS_PTRACE: Capability = Capability(19);
    pub(super) const SYS_PACCT: Capability = Capability(20);
    pub(super) const SYS_ADMIN: Capability = Capability(21);
    pub(super) const SYS_BOOT: Capability = Capability(22);
    pub(super) const SYS_NICE: Capability = Capability(23);
    pub(super) const SYS_TIME: Capability = Capability(25);
    pub(super) const SYS_TTY_CONFIG: Capability = Capability(26);
    pub(super) const MKNOD: Capability = Capability(27);
    pub(super) const AUDIT_WRITE: Capability = Capability(29);
    pub(super) const SETFCAP: Capability = Capability(31);
    pub(super) const SYSLOG: Capability = Capability(34);
    pub(super) const PERFMON: Capability = Capability(38);
    pub(super) const BPF: Capability = Capability(39);
}

/// What a container gets that asks for nothing.
const DEFAULT: [Capability; 14] = [
    Capability::CHOWN,
    Capability::DAC_OVERRIDE,
    Capability::FSETID,
    Capability::FOWNER,
    Capability::MKNOD,
    Capability::NET_RAW,
    Capability::SETGID,
    Capability::SETUID,
    Capability::SETFCAP,
    Capability::SETPCAP,
    Capability::NET_BIND_SERVICE,
    Capability::SYS_CHROOT,
    Capability::KILL,
    Capability::AUDIT_WRITE,
];

impl Capability {
    /// Its place in a set.
    pub(super) fn bit(self) -> u64 {
        1 << self.0
    }

    /// Whether a set has it.
    pub(super) fn is_in(self, set: u64) -> bool {
        set & self.bit() != 0
    }

    fn parse(name: &str) -> Option<Capability> {
        let upper = name.to_ascii_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        let number = NAMES.iter().position(|n| *n == short)?;
        u8::try_from(number).ok().map(Capability)
    }
}

/// The set of a container: the default ones without `drop` and with `add`. The error is a name that is
/// none.
pub(super) fn container_set(add: &[String], drop: &[String], privileged: bool) -> Result<u64, String> {
    let all = (1 << NAMES.len()) - 1;
    if privileged {
        return Ok(all);
    }
    let bits = |name: &String| match name.as_str() {
        "ALL" => Ok(all),
        name => Capability::parse(name).map(Capability::bit).ok_or_else(|| name.to_owned()),
    };
    let mut set = DEFAULT.iter().fold(0, |set, c| set | c.bit());
    for name in drop {
        set &= !bits(name)?;
    }
    for name in add {
        set |= bits(name)?;
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn the_default_set_is_the_well_known_one() {
        assert_eq!(container_set(&[], &[], false).unwrap(), 0xa804_25fb);
    }

    #[test]
    fn dropping_comes_before_adding() {
        let set = container_set(&names(&["NET_ADMIN"]), &names(&["ALL"]), false).unwrap();
        assert_eq!(set, 1 << 12);
        let set = container_set(&names(&["ALL"]), &names(&["CHOWN"]), false).unwrap();
        assert_eq!(set, (1 << 41) - 1);
    }

    #[test]
    fn spellings() {
        let set = container_set(&[], &names(&["cap_chown", "KILL"]), false).unwrap();
        assert!(!Capability::CHOWN.is_in(set) && !Capability::KILL.is_in(set));
        assert_eq!(container_set(&names(&["NET_ADMlN"]), &[], false).unwrap_err(), "NET_ADMlN");
    }
}
