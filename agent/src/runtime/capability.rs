//! Capabilities by name and number. Pure.

/// A capability of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capability(u8);

macro_rules! capabilities {
    ($($name:ident = $number:literal)*) => {
        impl Capability { $(#[allow(dead_code, reason = "the whole list is here, by name")] pub(super) const $name: Capability = Capability($number);)* }
        const NAMES: &[(&str, Capability)] = &[$((stringify!($name), Capability($number))),*];
    };
}

capabilities! {
    CHOWN = 0 DAC_OVERRIDE = 1 DAC_READ_SEARCH = 2 FOWNER = 3 FSETID = 4 KILL = 5 SETGID = 6 SETUID = 7
    SETPCAP = 8 LINUX_IMMUTABLE = 9 NET_BIND_SERVICE = 10 NET_BROADCAST = 11 NET_ADMIN = 12 NET_RAW = 13
    IPC_LOCK = 14 IPC_OWNER = 15 SYS_MODULE = 16 SYS_RAWIO = 17 SYS_CHROOT = 18 SYS_PTRACE = 19
    SYS_PACCT = 20 SYS_ADMIN = 21 SYS_BOOT = 22 SYS_NICE = 23 SYS_RESOURCE = 24 SYS_TIME = 25
    SYS_TTY_CONFIG = 26 MKNOD = 27 LEASE = 28 AUDIT_WRITE = 29 AUDIT_CONTROL = 30 SETFCAP = 31
    MAC_OVERRIDE = 32 MAC_ADMIN = 33 SYSLOG = 34 WAKE_ALARM = 35 BLOCK_SUSPEND = 36 AUDIT_READ = 37
    PERFMON = 38 BPF = 39 CHECKPOINT_RESTORE = 40
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
        NAMES.iter().find(|(n, _)| *n == short).map(|(_, c)| *c)
    }
}

/// The set of a container: the default ones without `drop` and with `add`. The error is a name that is
/// none.
pub(super) fn container_set(add: &[String], drop: &[String], privileged: bool) -> Result<u64, String> {
    let all = NAMES.iter().fold(0, |set, (_, c)| set | c.bit());
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
        assert_eq!(set, Capability::NET_ADMIN.bit());
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
