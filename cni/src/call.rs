//! What a runtime asks for, from the environment. Invariant: a call that this room hands out names nothing that the
//! interface does not allow as a name.

use std::path::PathBuf;

use crate::error::{Error, code};

/// Longest container id, bytes: with the network and the interface it names files and links.
const CONTAINER_BYTES_MAX: usize = 128;
/// Longest name of an interface, bytes, as Linux has it.
const IFNAME_BYTES_MAX: usize = 15;

/// A verb of the interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Connects a container.
    Add,
    /// Disconnects it.
    Del,
    /// Looks whether it is still connected as ADD said.
    Check,
    /// Says whether ADD would work.
    Status,
    /// Disconnects all that are not listed.
    Gc,
    /// Lists the versions that are spoken.
    Version,
}

impl Command {
    /// The verb of that name.
    pub fn parse(name: &str) -> Option<Command> {
        Some(match name {
            "ADD" => Command::Add,
            "DEL" => Command::Del,
            "CHECK" => Command::Check,
            "STATUS" => Command::Status,
            "GC" => Command::Gc,
            "VERSION" => Command::Version,
            _ => return None,
        })
    }

    /// The verb's name.
    pub fn name(self) -> &'static str {
        match self {
            Command::Add => "ADD",
            Command::Del => "DEL",
            Command::Check => "CHECK",
            Command::Status => "STATUS",
            Command::Gc => "GC",
            Command::Version => "VERSION",
        }
    }

    /// True where the call is about one attachment.
    pub fn has_container(self) -> bool {
        matches!(self, Command::Add | Command::Del | Command::Check)
    }

    /// True where the call needs the container's namespace.
    pub fn has_netns(self) -> bool {
        matches!(self, Command::Add | Command::Check)
    }
}

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub command: Command,
    /// `CNI_CONTAINERID`; empty where the verb has none.
    pub container_id: String,
    /// `CNI_NETNS`; may be empty for DEL.
    pub netns: String,
    /// `CNI_IFNAME`; empty where the verb has none.
    pub ifname: String,
    /// `CNI_ARGS`, as it came.
    pub args: String,
    /// `CNI_PATH`, split.
    pub path: Vec<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be the plugin's own.
    pub netns_override: bool,
}

impl Call {
    /// Reads and judges the environment; `None` where nothing is asked for (no `CNI_COMMAND`). Code 4 names every
    /// variable that is missing.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Call>, Error> {
        let get = |name: &str| variable(name).unwrap_or_default();
        let name = get("CNI_COMMAND");
        if name.is_empty() {
            return Ok(None);
        }
        let bad = |what: String| Error::new(code::BAD_ENVIRONMENT, what);
        let command = Command::parse(&name).ok_or_else(|| {
            bad(format!("CNI_COMMAND {name:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION"))
        })?;
        let over = get("CNI_NETNS_OVERRIDE");
        let call = Call {
            command,
            container_id: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            ifname: get("CNI_IFNAME"),
            args: get("CNI_ARGS"),
            path: get("CNI_PATH").split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect(),
            netns_override: over == "1" || over.eq_ignore_ascii_case("true"),
        };
        let needed = [
            ("CNI_CONTAINERID", &call.container_id, command.has_container()),
            ("CNI_NETNS", &call.netns, command.has_netns()),
            ("CNI_IFNAME", &call.ifname, command.has_container()),
        ];
        let missing: Vec<&str> =
            needed.iter().filter(|(_, value, needed)| *needed && value.is_empty()).map(|n| n.0).collect();
        if !missing.is_empty() {
            let these = missing.join(", ");
            return Err(bad(format!("required environment variables are missing: {these}"))
                .with(format!("{} needs them", command.name())));
        }
        if command.has_container() {
            check_container(&call.container_id)?;
            check_ifname(&call.ifname)?;
        }
        Ok(Some(call))
    }
}

/// Refuses what is no container id with code 4.
pub fn check_container(id: &str) -> Result<(), Error> {
    if is_name(id) && id.len() <= CONTAINER_BYTES_MAX {
        return Ok(());
    }
    let rule =
        "must start with a letter or digit, go on with those, '_', '.' or '-', and have at most 128 bytes";
    Err(Error::new(code::BAD_ENVIRONMENT, format!("CNI_CONTAINERID {id:?} {rule}")))
}

/// Refuses what is no name of an interface with code 4.
pub fn check_ifname(name: &str) -> Result<(), Error> {
    let bad = |why: &str| {
        Err(Error::new(code::BAD_ENVIRONMENT, format!("CNI_IFNAME {name:?} is no interface name: {why}")))
    };
    match name {
        "" => bad("it is empty"),
        "." | ".." => bad("it names a directory"),
        _ if name.len() > IFNAME_BYTES_MAX => bad("it is longer than 15 bytes"),
        _ if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) => {
            bad("it has a '/', a ':' or a space in it")
        }
        _ => Ok(()),
    }
}

/// True for what may name a network or a container.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Call>, Error> {
        let map: BTreeMap<&str, &str> = pairs.iter().copied().collect();
        Call::read(|name| map.get(name).map(|value| (*value).to_owned()))
    }

    const FULL: [(&str, &str); 4] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "abc-1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
    ];

    fn with(name: &'static str, value: &'static str) -> Result<Option<Call>, Error> {
        let mut pairs = FULL.to_vec();
        pairs.push((name, value));
        read(&pairs)
    }

    #[test]
    fn every_missing_variable_is_named() {
        let error = read(&[("CNI_COMMAND", "ADD")]).unwrap_err();
        assert_eq!(error.code, code::BAD_ENVIRONMENT);
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            assert!(error.message.contains(name), "{error}");
        }
        let error = read(&[("CNI_COMMAND", "DEL"), ("CNI_IFNAME", "eth0")]).unwrap_err();
        assert!(error.message.contains("CNI_CONTAINERID") && !error.message.contains("CNI_NETNS"));
        for verb in ["GC", "STATUS", "VERSION"] {
            assert!(read(&[("CNI_COMMAND", verb)]).unwrap().is_some());
        }
        assert_eq!(read(&[]), Ok(None));
        assert!(read(&[("CNI_COMMAND", "add")]).unwrap_err().message.contains("\"add\""));
    }

    #[test]
    fn names_are_judged() {
        let call = with("CNI_PATH", "/opt/cni/bin::/usr/lib/cni").unwrap().unwrap();
        assert_eq!((call.path.len(), call.netns_override), (2, false));
        assert!(with("CNI_NETNS_OVERRIDE", "TRUE").unwrap().unwrap().netns_override);
        for bad in ["-a", ".a", "a/b", "a b", "ä", "_x"] {
            assert_eq!(with("CNI_CONTAINERID", bad).unwrap_err().code, 4, "{bad}");
        }
        assert!(check_container(&"x".repeat(129)).is_err());
        for bad in [".", "..", "a/b", "a:b", "a b", "0123456789abcdef", "a\t"] {
            assert_eq!(with("CNI_IFNAME", bad).unwrap_err().code, 4, "{bad}");
        }
        with("CNI_IFNAME", "012345678901234").unwrap();
    }
}
